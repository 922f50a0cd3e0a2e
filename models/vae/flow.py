"""What both models share: masked networks for the flow, upsampling, the normal density."""

import itertools
import math
from typing import Any

import numpy as np
import tensorflow as tf

from models.common.layers import Layers


def mask(inputs: int, outputs: int, order: int, strict: bool) -> np.ndarray:
    """Returns the mask [inputs, outputs] of a masked layer.

    Inputs, and likewise outputs, are divided evenly among the degrees 0 to order - 1. An output
    sees the inputs of lower degree and, unless `strict`, those of its own degree.
    """
    i, o = (np.arange(n) * order // n for n in (inputs, outputs))
    return (i[:, None] < o + (not strict)).astype(np.float32)


def window_mask(inputs: int, outputs: int, order: int, strict: bool) -> np.ndarray:
    """Returns the mask [3, 3, inputs, outputs] of a masked convolution.

    An output sees all maps of the pixels above and to the left; `mask` applies to its own pixel.
    """
    window = np.zeros([3, 3, inputs, outputs], np.float32)
    window[0] = window[1, 0] = 1
    window[1, 1] = mask(inputs, outputs, order, strict)
    return window


class Autoregressive(tf.Module):
    """Maps z and a context to m and s; their i-th elements depend on z[:i] and the context (MADE).

    The context is added to the first hidden layer's pre-activations; the activations are ELUs.

    Args:
      make: creates the layers.
      latents: units, or maps, of z.
      hidden: units, or maps, of the hidden layers.
      convolutional: z is [batch, height, width, latents], ordered by rows, columns, maps;
        else [batch, latents].
      **output: options of the output layer.
    """

    def __init__(
        self, make: Layers, latents: int, hidden, convolutional: bool = False, **output: Any
    ):
        super().__init__()

        def masked(inputs, outputs, strict, copies=1, **choices):
            one = (window_mask if convolutional else mask)(inputs, outputs, latents, strict)
            layer = make.conv if convolutional else make.dense
            kernel_mask = np.concatenate([one] * copies, -1)
            return layer(copies * outputs, kernel_mask=kernel_mask, **choices)

        sizes = [latents, *hidden]
        # The context includes a bias, so the first layer needs none.
        self.hidden = [
            masked(a, b, strict=False, use_bias=index > 0)
            for index, (a, b) in enumerate(itertools.pairwise(sizes))
        ]
        self.output = masked(sizes[-1], latents, strict=True, copies=2, **output)

    def __call__(self, z, context) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns m and s, float32, of z's shape; `context` has the first hidden layer's shape."""
        first, *rest = self.hidden
        x = tf.nn.elu(first(z) + tf.cast(context, first.compute_dtype))
        for layer in rest:
            x = tf.nn.elu(layer(x))
        return tuple(tf.split(tf.cast(self.output(x), tf.float32), 2, -1))


class Upsampling(tf.Module):
    """A convolution that doubles height and width."""

    def __init__(self, make: Layers, filters: int, kernel: int = 3, **choices: Any):
        super().__init__()
        self.conv = make.conv(4 * filters, kernel, **choices)

    def __call__(self, x):
        """Returns [batch, 2 height, 2 width, filters]."""
        return tf.nn.depth_to_space(self.conv(x), 2)


def log_normal(x, mean, log_sigma) -> tf.Tensor:
    """Returns log N(x; mean, sigma^2), elementwise."""
    return -0.5 * (math.log(2 * math.pi) + tf.square((x - mean) * tf.exp(-log_sigma))) - log_sigma
