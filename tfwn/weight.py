"""Weight: one weight tensor, as (v, g) or as w itself. Every layer holds its weights in this."""

import operator
from collections.abc import Iterable

import numpy as np
import tensorflow as tf

from tfwn.ops import weight_norm

PARAMETERIZATIONS = ("weight_norm", "normal")


def initial_value(initializer, shape, dtype) -> tf.Tensor:
    """The tensor an initializer makes: a number, a Keras name or a callable(shape, dtype)."""
    if isinstance(initializer, str):
        initializer = tf.keras.initializers.get(initializer)
    if not callable(initializer):
        return tf.fill(shape, tf.cast(initializer, dtype))
    return tf.cast(tf.convert_to_tensor(initializer(shape, dtype=dtype.name)), dtype)


def check_weight_options(
    *,
    parameterization="weight_norm",
    exponential_g=False,
    g_initializer=None,
    dtype=tf.float32,
    compute_dtype=None,
) -> dict:
    """The options common to all weights, checked and completed: see `Weight`."""
    if parameterization not in PARAMETERIZATIONS:
        raise ValueError(
            f"parameterization must be one of {PARAMETERIZATIONS}, got {parameterization!r}"
        )
    dtype = tf.as_dtype(dtype)
    compute_dtype = dtype if compute_dtype is None else tf.as_dtype(compute_dtype)
    for name, value in (("dtype", dtype), ("compute_dtype", compute_dtype)):
        if value not in (tf.float16, tf.bfloat16, tf.float32, tf.float64):
            raise ValueError(
                f"{name} must be float16, bfloat16, float32 or float64, got {value.name}"
            )
    return {
        "parameterization": parameterization,
        "exponential_g": exponential_g,
        "g_initializer": g_initializer,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
    }


def check_axis(axis, rank: int) -> tuple[int, ...]:
    """The axes that index the units, as a sorted tuple of non-negative numbers."""
    axes = () if axis is None else tuple(axis) if isinstance(axis, Iterable) else (axis,)
    try:
        axes = tuple(operator.index(a) for a in axes)
    except TypeError:
        raise ValueError(f"axis must be an int, a sequence of ints or None, got {axis!r}") from None
    for a in axes:
        if not -rank <= a < rank:
            raise ValueError(
                f"axis must lie in [{-rank}, {rank}) for a weight of rank {rank}, got {a}"
            )
    positive = tuple(sorted(a % rank for a in axes))
    if len(set(positive)) != len(positive):
        raise ValueError(f"axis must name each axis once, got {axis}")
    return positive


def norm(v, axis: tuple[int, ...]) -> tf.Tensor:
    """||v||, one for each unit, in v's type; `axis` as from `check_axis`."""
    # v . (v / ||v||): no square, so nothing under- or overflows, and 0 for v = 0.
    v = tf.convert_to_tensor(v)
    wide = tf.float64 if v.dtype == tf.float64 else tf.float32
    unit = weight_norm(v, tf.ones([v.shape[a] for a in axis], v.dtype), axis, out_dtype=wide)
    others = [a for a in range(v.shape.rank) if a not in axis]
    return tf.cast(tf.reduce_sum(tf.cast(v, wide) * unit, others), v.dtype)


def with_direction(v, axis: tuple[int, ...]) -> tf.Tensor:
    """v, where each unit that is all zero has random numbers, the same in each run.

    v = 0 has no direction, so that neither v nor g would ever get a gradient. Set g from the old
    v, g = ||v|| = 0: w stays 0, and g learns.
    """
    v = tf.convert_to_tensor(v)
    others = [a for a in range(v.shape.rank) if a not in axis]
    zero = tf.reduce_all(v == 0, others, keepdims=True)
    if tf.executing_eagerly() and not bool(tf.reduce_any(zero)):
        return v
    wide = tf.float64 if v.dtype == tf.float64 else tf.float32
    direction = tf.random.stateless_normal(v.shape, [0, 0], stddev=0.05, dtype=wide)
    return tf.where(zero, tf.cast(direction, v.dtype), v)


class Weight(tf.Module):
    """A weight in the weight-normalized or in the normal parameterization (paper, section 2).

    "weight_norm": variables v and g, w = g * v / ||v|| (eq. 2); with `exponential_g` v and s, where
    g = exp(s). "normal": the variable w. Both begin as the same function: v comes from
    `initializer`, g = ||v|| unless `g_initializer` says otherwise, and "normal" folds the same v
    and g into w. Calling a Weight computes w; keep it where it is needed often, as in a loop.

    Arguments:
      shape: of v and w, all sizes known.
      axis: the axis or axes that index the output units; the norm runs over all the others.
        None: one norm for the whole tensor.
      initializer: of v: a callable(shape, dtype), a Keras initializer or its name, or a number.
        Default: normal with standard deviation 0.05 (paper, section 3).
      mask: fixed array that broadcasts to `shape`. It multiplies v BEFORE the normalization (MADE);
        a unit that is masked entirely has w = 0 and finite gradients.
      parameterization: "weight_norm" or "normal".
      exponential_g: learn s, with g = exp(s), instead of g.
      g_initializer: as `initializer`, for g. Default: ||v||.
      dtype: of the variables.
      compute_dtype: of w; default `dtype`. float32 variables with bfloat16 or float16 w cost no
        cast, and their gradients come back in float32.
      name: of the module.

    Raises:
      ValueError: a bad parameterization, dtype, axis, shape, mask or g.

    >>> weight = tfwn.Weight([3, 2], initializer="ones", g_initializer=2.0)
    >>> [variable.shape.as_list() for variable in (weight.v, weight.g)]
    [[3, 2], [2]]
    >>> print(tf.norm(weight(), axis=0).numpy().round(3))
    [2. 2.]
    """

    def __init__(
        self, shape, axis=-1, *, initializer=None, mask=None, name="weight", **weight_options
    ):
        super().__init__(name=name)
        options = check_weight_options(**weight_options)
        self.parameterization = options["parameterization"]
        self.exponential_g = options["exponential_g"]
        self.dtype = options["dtype"]
        self.compute_dtype = options["compute_dtype"]
        self.shape = tf.TensorShape(shape)
        if not self.shape.is_fully_defined():
            raise ValueError(f"shape must be known in full, got {self.shape}")
        self.axis = check_axis(axis, self.shape.rank)
        self.mask = None if mask is None else self._checked_mask(mask)
        with tf.init_scope(), self.name_scope:
            self._make_variables(initializer, options["g_initializer"])

    def _checked_mask(self, mask) -> np.ndarray:
        mask = np.asarray(mask, self.dtype.as_numpy_dtype)
        try:
            return np.broadcast_to(mask, self.shape)
        except ValueError:
            raise ValueError(
                f"mask must broadcast to the weight's shape {self.shape}, got shape {mask.shape}"
            ) from None

    def _make_variables(self, initializer, g_initializer):
        initializer = (
            tf.random_normal_initializer(0.0, 0.05) if initializer is None else initializer
        )
        v = self._masked(initial_value(initializer, self.shape, self.dtype))
        g = (
            None
            if g_initializer is None
            else initial_value(g_initializer, self.g_shape, self.dtype)
        )
        if self.parameterization == "normal":
            self.w = tf.Variable(v if g is None else weight_norm(v, g, self.axis), name="w")
            return
        self.v = tf.Variable(v, name="v")
        g = norm(v, self.axis) if g is None else g
        if self.exponential_g:
            self.s = tf.Variable(self._log(g), name="s")
        else:
            self.g = tf.Variable(g, name="g")

    @property
    def g_shape(self) -> tf.TensorShape:
        """The shape of g: the sizes of v along `axis`."""
        return tf.TensorShape([self.shape[a] for a in self.axis])

    def __call__(self) -> tf.Tensor:
        """Returns w, of shape `shape` and type `compute_dtype`."""
        if self.parameterization == "normal":
            return tf.cast(self._masked(self.w), self.compute_dtype)
        return self._normalized(self.get_g())

    def rows(self, indices) -> tf.Tensor:
        """Returns tf.gather(w, indices) for axis 0, normalizing only these rows of v."""
        if self.axis != (0,) or self.mask is not None:
            raise ValueError(
                f"rows of a weight need axis=0 and no mask, got axis={self.axis} and "
                f"{'no ' if self.mask is None else 'a '}mask: gather from weight() instead"
            )
        if self.parameterization == "normal":
            return tf.cast(tf.gather(self.w, indices), self.compute_dtype)
        flat = tf.reshape(indices, [-1])
        v = tf.gather(self.v, flat)
        g = tf.exp(tf.gather(self.s, flat)) if self.exponential_g else tf.gather(self.g, flat)
        w = weight_norm(v, g, 0, out_dtype=self.compute_dtype)
        return tf.reshape(w, tf.concat([tf.shape(indices), self.shape[1:]], 0))

    def direction(self) -> tf.Tensor:
        """Returns v / ||v|| (w / ||w||, the same, for "normal") in `compute_dtype`."""
        return self._normalized(tf.ones(self.g_shape, self.dtype))

    def get_g(self) -> tf.Tensor:
        """Returns g, of shape `g_shape`: g itself, exp(s), or ||w|| for "normal"."""
        if self.parameterization == "normal":
            return norm(self._masked(self.w), self.axis)
        return tf.exp(self.s) if self.exponential_g else tf.convert_to_tensor(self.g)

    def set_g(self, g) -> None:
        """Sets g and keeps the direction; for "normal" w becomes g * w / ||w||."""
        g = tf.reshape(tf.cast(g, self.dtype), self.g_shape)
        if self.parameterization == "normal":
            self.w.assign(weight_norm(self._masked(self.w), g, self.axis))
        elif self.exponential_g:
            self.s.assign(self._log(g))
        else:
            self.g.assign(g)

    def assign(self, w) -> None:
        """Makes `w` the effective weight: v = w and g = ||w||."""
        w = self._masked(tf.cast(w, self.dtype))
        if self.parameterization == "normal":
            self.w.assign(w)
        else:
            self.v.assign(w)
            self.set_g(norm(w, self.axis))

    def _masked(self, v):
        return v if self.mask is None else v * self.mask

    def _normalized(self, g):
        v = self.w if self.parameterization == "normal" else self.v
        return weight_norm(self._masked(v), g, self.axis, out_dtype=self.compute_dtype)

    def _log(self, g):
        # A unit with v = 0 has w = 0 whatever its g; log(1) keeps s finite.
        g = tf.where(g == 0, tf.ones_like(g), g)
        tf.debugging.assert_positive(
            g, "g must be positive where g = exp(s); use exponential_g=False for g of either sign"
        )
        return tf.math.log(g)
