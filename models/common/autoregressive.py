"""Masked layers: each element of the output a function of the elements of z before it (MADE)."""

import itertools
from typing import Any

import numpy as np
import tensorflow as tf


def mask(inputs: int, outputs: int, order: int, strict: bool) -> np.ndarray:
    """Returns the mask [inputs, outputs] of a masked layer.

    Units have degrees, inputs and outputs each from 0 to order - 1 in equal parts. An output sees
    the inputs of lower degrees, and those of its own unless `strict`.
    """
    i, o = (np.arange(n) * order // n for n in (inputs, outputs))
    return (i[:, None] < o + (not strict)).astype(np.float32)


def window_mask(inputs: int, outputs: int, order: int, strict: bool) -> np.ndarray:
    """Returns the mask [3, 3, inputs, outputs] of a convolution.

    An output sees all maps of the pixels above and to the left of it, and `mask` of its own.
    """
    window = np.zeros([3, 3, inputs, outputs], np.float32)
    window[0] = window[1, 0] = 1
    window[1, 1] = mask(inputs, outputs, order, strict)
    return window


class Autoregressive(tf.Module):
    """m and s of z and a context, which is added to the first hidden layer; ELUs.

    Args:
      layers: makes layers: layers.dense(units, **choices), layers.conv(filters, **choices).
      latents: how many units, or maps, z has.
      hidden: units, or maps, of the hidden layers.
      convolutional: z is [batch, height, width, latents], and its order by rows, columns, maps;
        else [batch, latents].
      **output: choices for the last layer.
    """

    def __init__(self, layers: Any, latents: int, hidden, convolutional: bool = False, **output):
        super().__init__()

        def masked(inputs, outputs, strict, copies=1, **choices):
            make = window_mask if convolutional else mask
            kernel_mask = np.concatenate([make(inputs, outputs, latents, strict)] * copies, -1)
            layer = layers.conv if convolutional else layers.dense
            return layer(copies * outputs, kernel_mask=kernel_mask, **choices)

        sizes = [latents, *hidden]
        # The context brings the bias of the first layer.
        self.hidden = [
            masked(a, b, strict=False, use_bias=index > 0)
            for index, (a, b) in enumerate(itertools.pairwise(sizes))
        ]
        self.output = masked(sizes[-1], latents, strict=True, copies=2, **output)

    def __call__(self, z, context) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns float32 m and s, of z's shape; `context` is as wide as the first hidden layer."""
        first, *rest = self.hidden
        x = tf.nn.elu(first(z) + tf.cast(context, first.compute_dtype))
        for layer in rest:
            x = tf.nn.elu(layer(x))
        return tuple(tf.split(tf.cast(self.output(x), tf.float32), 2, -1))
