"""NormalizedVariable: what `reparameterize` puts in the place of a variable w of a tf.Module."""

import tensorflow as tf

from tfwn.ops import weight_norm
from tfwn.weight import check_axis, in_scope_of, norm, with_direction


class NormalizedVariable(tf.Module):
    """Holds v and g, and is used as the variable w = g * v / ||v|| (paper, eq. 2) that it replaces.

    TensorFlow converts it to the tensor w. A tf.function that has it as an argument gets this
    tensor. What a tf.Variable can do and this cannot, such as an update of single rows, raises an
    AttributeError that says so. It is not a tf.Variable for isinstance and tf.is_tensor.

    Arguments:
      v: the variable; it is not changed. `assign` gives a direction to units that are zero.
      axis: the axis or axes that index the units.
    """

    def __init__(self, v: tf.Variable, axis):
        super().__init__(name="normalized")
        self.v = v
        self.axis = check_axis(axis, v.shape.rank)
        with in_scope_of(v):
            self.g = tf.Variable(norm(v, self.axis), trainable=v.trainable, name="g")

    def value(self) -> tf.Tensor:
        """Returns w."""
        return weight_norm(self.v, self.g, self.axis)

    def read_value(self) -> tf.Tensor:
        """Returns w."""
        return self.value()

    def assign(self, value, use_locking=False, name=None, read_value=True):
        """Sets w: v = w and g = ||w||; a unit with w = 0 gets a random direction."""
        w = tf.convert_to_tensor(value, self.dtype)
        if not w.shape.is_compatible_with(self.shape):
            raise ValueError(f"w must have shape {self.shape}, got {w.shape}")
        self.g.assign(norm(w, self.axis))
        self.v.assign(with_direction(w, self.axis))
        return self if read_value else None

    def assign_add(self, delta, use_locking=False, name=None, read_value=True):
        """Adds `delta` to w."""
        return self.assign(self.value() + delta, read_value=read_value)

    def assign_sub(self, delta, use_locking=False, name=None, read_value=True):
        """Subtracts `delta` from w."""
        return self.assign(self.value() - delta, read_value=read_value)

    def sparse_read(self, indices, name=None) -> tf.Tensor:
        """Returns the rows of w at `indices`; with axis 0 only these are normalized."""
        if self.axis != (0,):
            return tf.gather(self.value(), indices, name=name)
        flat = tf.reshape(indices, [-1])
        w = weight_norm(tf.gather(self.v, flat), tf.gather(self.g, flat), 0)
        return tf.reshape(w, tf.concat([tf.shape(indices), self.shape[1:]], 0), name=name)

    def gather_nd(self, indices, name=None) -> tf.Tensor:
        """Returns tf.gather_nd(w, indices)."""
        return tf.gather_nd(self.value(), indices, name=name)

    def get_shape(self) -> tf.TensorShape:
        """Returns the shape of w."""
        return self.shape

    def set_shape(self, shape) -> None:
        """Raises a ValueError if the shape of w is not compatible with `shape`."""
        self.shape.assert_is_compatible_with(shape)

    def numpy(self):
        """Returns w as an array."""
        if not tf.executing_eagerly():
            # Where TensorFlow tries __array__ first, as tf.stack does, it expects this error.
            raise NotImplementedError("numpy() is only available in eager execution")
        return self.value().numpy()

    def __array__(self, dtype=None, copy=None):
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __tf_tensor__(self, dtype=None, name=None):
        return tf.convert_to_tensor(self.value(), dtype=dtype, name=name)

    def __tf_tracing_type__(self, context):
        return tf.TensorSpec(self.shape, self.dtype)

    def __len__(self):
        return self.shape[0]

    def __iter__(self):
        return iter(tf.unstack(self.value()))

    def __repr__(self):
        return (
            f"<tfwn.NormalizedVariable {self.name!r} shape={tuple(self.shape)} "
            f"dtype={self.dtype.name} axis={self.axis}, whose variables are .v and .g>"
        )

    # By identity, unlike ==, which compares elements.
    __hash__ = object.__hash__

    def __getattr__(self, name):
        if name in _ONLY_OF_VARIABLES:
            raise AttributeError(
                f"a weight-normalized variable has no {name!r}: w = g * v / ||v|| is computed from "
                "two variables, its .v and .g. Use these, or tfwn.fold for a plain variable"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _of_v(name: str) -> property:
    return property(lambda self: getattr(self.v, name))


for _name in ("shape", "dtype", "name", "trainable", "device", "synchronization", "aggregation"):
    setattr(NormalizedVariable, _name, _of_v(_name))


def _operator(name: str):
    return lambda self, *arguments: getattr(self.value(), name)(*arguments)


for _name in tf.Tensor.OVERLOADABLE_OPERATORS | {"__bool__", "__int__", "__float__"}:
    setattr(NormalizedVariable, _name, _operator(_name))

_ONLY_OF_VARIABLES = {
    *(name for name in dir(tf.Variable) if not name.startswith("_")),
    *("_unique_id", "handle", "is_initialized"),
} - set(dir(NormalizedVariable))
