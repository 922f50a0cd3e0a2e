"""Stand-ins for a variable w that is computed as g * v / ||v||."""

import tensorflow as tf

from tfwn.ops import weight_norm
from tfwn.weight import check_axis, check_mask, directed, in_scope_of, masked, norm


class Normalized:
    """Acts as a variable w = g * v / ||v|| (paper, eq. 2), where `mask` first multiplies v.

    TensorFlow converts it to the tensor w. A tf.function called with it receives this tensor.
    Methods of a tf.Variable that it does not support, such as updates of single rows, raise an
    AttributeError that says so. It is neither an instance of tf.Variable nor a tensor for
    tf.is_tensor.
    """

    def __init__(self, v, g, axis: tuple[int, ...], mask=None):
        self.v = v
        self.g = g
        self.axis = axis
        self.mask = mask

    def w(self, dtype=None) -> tf.Tensor:
        """Returns w in `dtype`, by default that of v."""
        return weight_norm(masked(self.v, self.mask), self.g, self.axis, out_dtype=dtype)

    def value(self) -> tf.Tensor:
        """Returns w."""
        return self.w()

    def read_value(self) -> tf.Tensor:
        """Returns w."""
        return self.w()

    def assign_v_and_g(self, v, g) -> None:
        """Sets v and g; a unit with v = 0 gets a random direction and g = 0."""
        v, g = directed(tf.cast(v, self.dtype), tf.cast(g, self.dtype), self.axis, self.mask)
        self.v.assign(v)
        self.g.assign(g)

    def assign(self, value, use_locking=False, name=None, read_value=True):
        """Sets w: v = w and g = ||w||; a unit with w = 0 gets a random direction."""
        w = masked(tf.convert_to_tensor(value, self.dtype), self.mask)
        if not w.shape.is_compatible_with(self.shape):
            raise ValueError(f"w must have shape {self.shape}, got {w.shape}")
        self.assign_v_and_g(w, norm(w, self.axis))
        return self if read_value else None

    def assign_add(self, delta, use_locking=False, name=None, read_value=True):
        """Adds `delta` to w."""
        return self.assign(self.w() + delta, read_value=read_value)

    def assign_sub(self, delta, use_locking=False, name=None, read_value=True):
        """Subtracts `delta` from w."""
        return self.assign(self.w() - delta, read_value=read_value)

    def sparse_read(self, indices, name=None) -> tf.Tensor:
        """Returns the rows of w at `indices`; with axis=0 and no mask, normalizes only these."""
        if self.axis != (0,) or self.mask is not None:
            return tf.gather(self.w(), indices, name=name)
        flat = tf.reshape(indices, [-1])
        w = weight_norm(tf.gather(self.v, flat), tf.gather(self.g, flat), 0)
        return tf.reshape(w, tf.concat([tf.shape(indices), self.shape[1:]], 0), name=name)

    def gather_nd(self, indices, name=None) -> tf.Tensor:
        """Returns tf.gather_nd(w, indices)."""
        return tf.gather_nd(self.w(), indices, name=name)

    def get_shape(self) -> tf.TensorShape:
        """Returns the shape of w."""
        return tf.TensorShape(self.shape)

    def set_shape(self, shape) -> None:
        """Raises a ValueError if the shape of w is not compatible with `shape`."""
        self.get_shape().assert_is_compatible_with(shape)

    def numpy(self):
        """Returns w as an array."""
        if not tf.executing_eagerly():
            # TensorFlow expects this error where it tries __array__ first, as tf.stack does.
            raise NotImplementedError("numpy() is only available in eager execution")
        return self.w().numpy()

    def __array__(self, dtype=None, copy=None):
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __tf_tensor__(self, dtype=None, name=None):
        return tf.convert_to_tensor(self.w(), dtype=dtype, name=name)

    def __tf_tracing_type__(self, context):
        return tf.TensorSpec(self.shape, self.dtype)

    def __len__(self):
        return self.shape[0]

    def __iter__(self):
        return iter(tf.unstack(self.w()))

    def __repr__(self):
        return (
            f"<tfwn.{type(self).__name__} {self.name!r} shape={tuple(self.shape)} "
            f"dtype={tf.as_dtype(self.dtype).name} axis={self.axis}, with variables .v and .g>"
        )

    # Hashes by identity, although == compares elements.
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
    setattr(Normalized, _name, _of_v(_name))


def _operator(name: str):
    return lambda self, *arguments: getattr(self.w(), name)(*arguments)


for _name in tf.Tensor.OVERLOADABLE_OPERATORS | {"__bool__", "__int__", "__float__"}:
    setattr(Normalized, _name, _operator(_name))

_ONLY_OF_VARIABLES = {
    *(name for name in dir(tf.Variable) if not name.startswith("_")),
    *("_unique_id", "_id", "handle", "is_initialized"),  # A GradientTape reads "_id".
} - set(dir(Normalized))


class NormalizedVariable(Normalized, tf.Module):
    """The object with which `reparameterize` replaces a tf.Module's variable; see `Normalized`.

    Arguments:
      v: the variable, which is not changed here. `assign_v_and_g` gives a direction to zero units.
      axis: the axis or axes that index the units.
      mask: fixed array that broadcasts to v, or None.
    """

    def __init__(self, v: tf.Variable, axis, mask=None):
        tf.Module.__init__(self, name="normalized")
        axis = check_axis(axis, v.shape.rank)
        mask = None if mask is None else check_mask(mask, v.shape, v.dtype)
        with in_scope_of(v):
            g = tf.Variable(norm(masked(v, mask), axis), trainable=v.trainable, name="g")
        super().__init__(v, g, axis, mask)
