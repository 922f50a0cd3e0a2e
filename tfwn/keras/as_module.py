"""AsModule: presents a weight-normalized Keras layer to tfwn.convert as a layer of tfwn."""

import keras
import tensorflow as tf

from tfwn.keras.normalized import DEPTHWISE, TRANSPOSED
from tfwn.keras.wrapper import WeightNormalization

_RECURRENT = (keras.layers.SimpleRNN, keras.layers.LSTM, keras.layers.GRU)
_CELLS = (keras.layers.SimpleRNNCell, keras.layers.LSTMCell, keras.layers.GRUCell)
_KINDS = (
    ((*_RECURRENT, *_CELLS), "recurrent"),
    (keras.layers.Dense, "dense"),
    (DEPTHWISE, "depthwise"),
    (TRANSPOSED, "transposed"),
    ((keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D), "convolution"),
    (keras.layers.Embedding, "embedding"),
)


class AsModule:
    """A Keras layer's wrapper with the attributes of the corresponding layer of tfwn.

    `kind` is the kind of the layer, or "" if tfwn has no counterpart. Other attributes, such as
    `groups`, are read from the Keras layer.
    """

    def __init__(self, wrapper):
        self.kind = ""
        if not isinstance(wrapper, WeightNormalization):
            raise ValueError(
                f"{wrapper.name!r} is not weight-normalized: wrap it in "
                "tfwn.keras.WeightNormalization, and call tfwn.fold afterwards to unwrap it"
            )
        self._wrapper = wrapper
        layer = wrapper.layer
        self.kind = next((kind for classes, kind in _KINDS if isinstance(layer, classes)), "")
        self.name = wrapper.name
        self.gru = isinstance(layer, keras.layers.GRU | keras.layers.GRUCell)
        self.one_step = isinstance(layer, _CELLS)
        self._owner = layer.cell if isinstance(layer, _RECURRENT) else layer

    def __getattr__(self, name):
        if name in ("weight", "recurrent_weight"):
            if self._wrapper.built:
                return self._weight(name)
            raise AttributeError(name)
        return getattr(self._wrapper.layer, name)

    def __repr__(self):
        return repr(self._wrapper)

    def build(self, input_shape) -> None:
        """Creates the variables; for a recurrent layer, [batch, in] means [batch, time, in]."""
        if self.kind == "recurrent" and not self.one_step:
            input_shape = [input_shape[0], None, *input_shape[1:]]
        self._wrapper.build(tuple(input_shape))

    @property
    def b(self) -> keras.Variable | None:
        """The bias, or None."""
        return getattr(self._owner, "bias", None)

    def _weight(self, attribute):
        names = (
            ("recurrent_kernel",)
            if attribute == "recurrent_weight"
            else ("kernel", "embeddings", "depthwise_kernel")
        )
        for normalized in self._wrapper.normalized:
            if normalized.owner is self._owner and normalized.v.name in names:
                return _Weight(normalized)
        return _Plain(next(v for v in self._owner.weights if v.name in names))


class _Weight:
    """Presents v and g of a wrapper as a `tfwn.Weight`."""

    parameterization = "weight_norm"
    exponential_g = False

    def __init__(self, normalized):
        self.v, self.axis, self.mask = normalized.v, normalized.axis, normalized.mask
        self.shape = normalized.get_shape()
        self.dtype = tf.as_dtype(normalized.dtype)
        self.assign, self.assign_v_and_g = normalized.assign, normalized.assign_v_and_g
        self.get_g = lambda: normalized.g
        self._w = normalized.w

    def __call__(self, dtype):
        return self._w(dtype)


class _Plain:
    """Presents a variable that the wrapper does not normalize as a `tfwn.Weight`."""

    parameterization = "normal"
    exponential_g = False
    mask = None
    axis = ()

    def __init__(self, variable):
        self._variable = variable
        self.shape = tf.TensorShape(variable.shape)
        self.dtype = tf.as_dtype(variable._dtype)
        self.assign = variable.assign

    def __call__(self, dtype):
        return tf.cast(self._variable.value, dtype)
