"""Data-dependent initialization of weight-normalized Keras layers, using the hook in tfwn.layer."""

import contextlib
import functools
import math

import keras
import tensorflow as tf

from tfwn.keras.internals import layers_in, stored, stored_dtype
from tfwn.keras.normalized import DEPTHWISE, TRANSPOSED, Reading
from tfwn.keras.scope import Substitution
from tfwn.layer import initialize, is_initializing, refuse_initialization
from tfwn.weight import directed, masked, norm

# Layers with one kernel and the pre-activation x . w + b. Separable convolutions have two kernels.
INITIALIZABLE = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    *TRANSPOSED,
    *DEPTHWISE,
)

# Recurrent layers (paper, section 3) and embeddings.
NOT_INITIALIZABLE = (keras.layers.RNN, keras.layers.Bidirectional, keras.layers.Embedding)


class _Unit:
    """Presents a layer with one kernel to data-dependent initialization as a layer of tfwn."""

    def __init__(self, wrapper, normalized):
        owner = normalized.owner
        # What `init_scale` receives, so that users can compare it with the layers in their model.
        self.keras_layer = wrapper if owner is wrapper.layer else owner
        self.name = wrapper.name if owner is wrapper.layer else normalized.v.path
        self.weight = self
        self._axis, self._mask = normalized.axis, normalized.mask
        self._v, self._g = stored(normalized.v), stored(normalized.g)
        self.b = None
        g_shape = normalized.g.shape
        if owner.bias is not None:
            self.b = _Bias(stored(owner.bias), _bias_order(owner, len(g_shape)), g_shape)
        self.initialized = wrapper.initialized
        self.restored = False
        self.variables = [self._v, self._g, self.initialized]
        if self.b is not None:
            self.variables.append(self.b.variable)

    def get_g(self):
        """Like `tfwn.Weight.get_g`, but 0 for a unit with v = 0, because its w is 0."""
        g = tf.convert_to_tensor(self._g)
        zero = norm(masked(self._v, self._mask), self._axis) == 0
        return tf.where(zero, tf.zeros_like(g), g)

    def set_g(self, g):
        """Like `tfwn.Weight.set_g`; a unit with v = 0 gets a random direction."""
        g = tf.reshape(tf.cast(g, self._g.dtype), self._g.shape)
        v, g = directed(self._v, g, self._axis, self._mask)
        self._v.assign(v)
        self._g.assign(g)


class _Bias:
    """A bias that has the units in another order and shape than g."""

    def __init__(self, variable, order, g_shape):
        self.variable = variable
        self.dtype = variable.dtype
        self._order = order
        self._g_shape = g_shape

    def assign(self, b):
        """Sets the bias to b, which has one element per unit, in g's order."""
        b = tf.transpose(tf.reshape(b, self._g_shape), self._order)
        self.variable.assign(tf.reshape(b, self.variable.shape))


def _einsum_letters(owner) -> tuple[str, str, str]:
    """Returns the letters of an EinsumDense's units (in kernel order), output and bias."""
    inputs, output = owner.equation.replace(" ", "").split("->")
    units = "".join(c for c in inputs.split(",")[1] if c in output and c != ".")
    return units, output, "".join(c for c in output if c in (owner.bias_axes or ""))


def _bias_order(owner, rank) -> list[int]:
    if not isinstance(owner, keras.layers.EinsumDense):
        return list(range(rank))
    units, _, bias = _einsum_letters(owner)
    if sorted(bias) != sorted(units):
        raise RuntimeError(
            f"data-dependent initialization cannot center {owner.name!r}: its bias_axes "
            f"{owner.bias_axes!r} are not the axes {units!r} of its output units: pass these axes"
        )
    return [units.index(letter) for letter in bias]


def _units_last(owner, t) -> tf.Tensor:
    """Returns t with all axes that index units moved to the end and merged into one."""
    rank = t.shape.rank
    axes = [1] if getattr(owner, "data_format", None) == "channels_first" else [rank - 1]
    if isinstance(owner, keras.layers.EinsumDense):
        units, output, _ = _einsum_letters(owner)
        before = output.partition("...")[0]
        axes = [
            output.index(c) if c in before else rank - len(output) + output.index(c) for c in units
        ]
    t = tf.transpose(t, [a for a in range(rank) if a not in axes] + axes)
    count = math.prod(t.shape[rank - len(axes) :])
    return tf.reshape(t, tf.concat([tf.shape(t)[: rank - len(axes)], [count]], 0))


class _InitializingCall:
    """Replaces the `call` of a kernel's owner: sets g and the bias, then calls the layer."""

    def __init__(self, wrapper, normalized):
        if normalized.unit is None:  # Shared by all calls; the first sets the layer.
            normalized.unit = _Unit(wrapper, normalized)
        self._unit = normalized.unit
        # If this pass built the layer and it is already marked, a deferred restore has set it.
        self._unit.restored = wrapper.built_while_initializing
        self._normalized = normalized
        self._call = normalized.owner.call
        self.users = 0

    def __call__(self, *args, **kwargs):
        n = self._normalized
        ones = tf.ones(n.g.shape, stored_dtype(n.g))
        values = [(n.v, Reading(n, ones))]
        if n.owner.bias is not None:
            values.append((n.owner.bias, tf.zeros(n.owner.bias.shape, n.owner.bias.dtype)))
        activation, n.owner.activation = n.owner.activation, None
        try:
            with Substitution(values):
                t = self._call(*args, **kwargs)
        finally:
            n.owner.activation = activation
        initialize(self._unit, _units_last(n.owner, t))
        with Substitution([(n.v, Reading(n))]):
            return self._call(*args, **kwargs)


@contextlib.contextmanager
def initializing_call(wrapper, normalized):
    """While active, the owner of this kernel initializes itself when it is called."""
    owner = normalized.owner
    hook = vars(owner).get("call")
    if not isinstance(hook, _InitializingCall):
        hook = _InitializingCall(wrapper, normalized)
        object.__setattr__(owner, "call", hook)
    hook.users += 1  # Replicas take turns in here.
    try:
        yield
    finally:
        hook.users -= 1
        if not hook.users:
            object.__delattr__(owner, "call")


@contextlib.contextmanager
def all_time_steps():
    """While active, layers in a TimeDistributed are initialized from all time steps.

    TimeDistributed calls its layer once per step, so otherwise the first step alone would set it.
    With batch normalization in the layer, it does, because its statistics are those of one step.
    """
    cls = keras.layers.TimeDistributed
    call = cls.call

    @functools.wraps(call)
    def merged(self, inputs, training=None, mask=None):
        if (
            is_initializing()
            and tf.executing_eagerly()
            and not any(
                isinstance(one, keras.layers.BatchNormalization) for one in layers_in(self.layer)
            )
        ):
            one = None if mask is None else one_step(mask)
            call(self, one_step(inputs), training=training, mask=one)  # Sets the layers in it.
        return call(self, inputs, training=training, mask=mask)

    def one_step(x):
        return tf.reshape(x, [-1, 1, *x.shape[2:]])

    cls.call = merged
    try:
        yield
    finally:
        cls.call = call


def refuse(layer):
    """Raises the error for a layer that cannot be initialized from data."""
    if isinstance(layer, NOT_INITIALIZABLE):
        refuse_initialization(layer)
    raise RuntimeError(
        f"data-dependent initialization reached the layer {layer.name!r} "
        f"({type(layer).__name__}), whose pre-activations are unknown: normalize the Dense, "
        "EinsumDense and convolution layers in it one by one, or initialize the model without it"
    )
