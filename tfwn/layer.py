"""Base classes of all layers: variables created once, and the computation act(x . w + b).

Data-dependent initialization (paper, section 3) hooks in here and nowhere else. While
`initializing(callback)` is active, each feed-forward layer passes t = x . v / ||v||, with the units
on the last axis, to callback(layer, t) before it computes its output. The callback sets g with
layer.weight.set_g(g), layer.b unless it is None, and layer.initialized. The layer then computes its
output with the new values.
"""

from __future__ import annotations

import contextlib
import contextvars
import numbers
import sys
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tfwn.activations import get_activation
from tfwn.initializers import initial_value, snake_case
from tfwn.weight import Weight, WeightOptions, check_weight_options

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Installed with TensorFlow.

# Shared, because a layer with its own lock could not be copied. Reentrant, because layers nest.
_lock = threading.RLock()
_callback: contextvars.ContextVar[Callable | None] = contextvars.ContextVar(
    "tfwn_initialization", default=None
)


class LayerOptions(WeightOptions, total=False):
    """Keyword arguments common to Dense and the convolutions; see `tfwn.Dense`."""

    kernel_initializer: Any
    bias_initializer: Any
    kernel_mask: Any
    name: str | None


@contextlib.contextmanager
def initializing(callback):
    """While active, feed-forward layers in this thread call callback(layer, t); see above."""
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


def is_initializing() -> bool:
    """Returns whether data-dependent initialization is running in this thread."""
    return _callback.get() is not None


def initialize(layer, t) -> None:
    """Passes layer and t to the initialization running in this thread, if any."""
    if callback := _callback.get():
        callback(layer, t)


def refuse_initialization(layer) -> None:
    """Raises RuntimeError if data-dependent initialization is running; it cannot set `layer`."""
    if is_initializing():
        raise RuntimeError(
            f"data-dependent initialization reached the layer {layer.name!r} "
            f"({type(layer).__name__}). Recurrent layers and embeddings cannot be initialized from "
            "data: initialize only the feed-forward part of the model, with the output of this "
            "layer as its batch"
        )


class Layer(tf.Module):
    """A module that creates its variables in `_initialize`, when it receives its first input."""

    def __init__(self, name=None):
        super().__init__(name=name or snake_case(type(self).__name__))
        self._built = False

    def build(self, input_shape) -> None:
        """Creates the variables for inputs of this shape; does nothing if they exist.

        Calling the layer also builds it. Safe in several threads and inside a tf.function.
        """
        if self._built:
            return
        self._warn_in_keras()
        with _lock:
            if not self._built:
                with tf.init_scope(), self.name_scope:
                    self._initialize(tf.TensorShape(input_shape))
                self._built = True

    def _initialize(self, input_shape: tf.TensorShape) -> None:
        raise NotImplementedError

    def _warn_in_keras(self) -> None:
        # Keras has no public interface for this. Looking in sys.modules avoids importing it.
        state = sys.modules.get("keras.src.backend.common.global_state")
        if state and state.get_global_attribute("current_call_ctx"):
            warnings.warn(
                f"{self.name!r} creates its variables in the call of a Keras layer or model. Keras "
                "neither trains nor saves the variables of a tf.Module: use a Keras layer in "
                "tfwn.keras.WeightNormalization instead",
                stacklevel=5,  # Points to the caller of a feed-forward layer.
            )


def check_positive(name: str, value) -> int:
    """Returns `value` as an int; raises ValueError unless it is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


class FeedForward(Layer):
    """Base of Dense and the convolutions: act(x . w + b). Subclasses define the shapes and x . w.

    A subclass sets `_rank` (the rank of the inputs; 0 means at least 2) and implements
    `_weight_shape` and `_linear`. `data_format` is "channels_last" unless the subclass changes it.
    """

    # `initialized` is saved with the layer but is not in `variables`, because averages, noise and
    # norms over these must not include it.
    _TF_MODULE_IGNORED_PROPERTIES = frozenset(
        {"initialized", *tf.Module._TF_MODULE_IGNORED_PROPERTIES}
    )

    data_format = "channels_last"
    _rank = 0
    _axis: int | tuple[int, ...] = -1

    def __init__(
        self,
        activation=None,
        use_bias=True,
        *,
        kernel_initializer=None,
        bias_initializer="zeros",
        kernel_mask=None,
        name=None,
        **weight_options: Unpack[WeightOptions],
    ):
        super().__init__(name=name)
        self.activation = get_activation(activation)
        self.use_bias = use_bias
        self.kernel_initializer = kernel_initializer
        self.bias_initializer = bias_initializer
        self.kernel_mask = kernel_mask
        self._weight_options = check_weight_options(**weight_options)
        self.compute_dtype = self._weight_options["compute_dtype"]
        self._channels = None
        self.b = None
        # Whether data-dependent initialization has set this layer. Created here rather than with
        # the other variables, so that restoring a checkpoint sets it at once.
        with tf.init_scope(), self.name_scope:
            self.initialized = tf.Variable(False, trainable=False, name="initialized")

    def __call__(self, inputs, w=None) -> tf.Tensor:
        """Returns act(x . w + b).

        Arguments:
          inputs: x, cast to the layer's compute_dtype.
          w: the effective weight, if the caller has already computed it, as in a loop. Default:
            `self.weight()`.
        """
        outputs = self.pre_activation(inputs, w)
        return outputs if self.activation is None else self.activation(outputs)

    def pre_activation(self, inputs, w=None) -> tf.Tensor:
        """Returns x . w + b, without the activation; same arguments as calling the layer."""
        x = tf.cast(inputs, self.compute_dtype)
        self._check_rank(x.shape)
        self.build(x.shape)
        self._check_channels(x.shape)
        first = self.data_format == "channels_first"
        if first:
            # TensorFlow's CPU kernels support channels_last only. On a GPU, Grappler and XLA remove
            # unneeded transposes.
            x = tf.transpose(x, [0, *range(2, self._rank), 1])
        if is_initializing():
            initialize(self, self._linear(x, self.weight.direction()))
            w = None  # The caller computed it from the old g.
        outputs = self._linear(x, self.weight() if w is None else w)
        if self.b is not None:
            outputs = tf.nn.bias_add(outputs, tf.cast(self.b, self.compute_dtype))
        return (
            tf.transpose(outputs, [0, self._rank - 1, *range(1, self._rank - 1)])
            if first
            else outputs
        )

    def _initialize(self, input_shape):
        self._check_rank(input_shape)
        channels = input_shape[1 if self.data_format == "channels_first" else -1]
        if channels is None:
            raise ValueError(
                f"inputs of {self.name!r} must have a known number of channels (the "
                f"{'second' if self.data_format == 'channels_first' else 'last'} axis) when the "
                f"layer creates its variables, got shape {input_shape}: set it with tf.ensure_shape"
            )
        self.weight = Weight(
            self._weight_shape(channels),
            self._axis,
            initializer=self.kernel_initializer,
            mask=self.kernel_mask,
            **self._weight_options,
        )
        if self.use_bias:
            shape = [self.weight.g_shape.num_elements()]
            self.b = tf.Variable(
                initial_value(self.bias_initializer, shape, self._weight_options["dtype"]), name="b"
            )
        self._channels = channels

    def _check_rank(self, shape):
        rank = shape.rank
        if rank is None or (rank != self._rank if self._rank else rank < 2):
            rule = self._rank or "at least 2"
            raise ValueError(f"inputs of {self.name!r} must have rank {rule}, got shape {shape}")

    def _check_channels(self, shape):
        channels = shape[1 if self.data_format == "channels_first" else -1]
        if channels is not None and channels != self._channels:
            raise ValueError(
                f"inputs of {self.name!r} must have {self._channels} channels, as when the layer "
                f"was built, got {channels} in shape {shape}"
            )

    def _weight_shape(self, channels: int) -> list[int]:
        raise NotImplementedError

    def _linear(self, x, w) -> tf.Tensor:
        raise NotImplementedError
