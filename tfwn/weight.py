"""Weight: one weight tensor, stored as v and g or as w. All layers keep their weights in it."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import tensorflow as tf

from tfwn.initializers import initial_value
from tfwn.ops import FLOATS, weight_norm

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Installed with TensorFlow.

PARAMETERIZATIONS = ("weight_norm", "normal")


class WeightOptions(TypedDict, total=False):
    """Keyword arguments common to all weights; see `tfwn.Weight`."""

    parameterization: Literal["weight_norm", "normal"]
    exponential_g: bool
    g_initializer: Any
    dtype: tf.types.experimental.DTypeLike
    compute_dtype: tf.types.experimental.DTypeLike | None


def check_float(name: str, dtype) -> tf.DType:
    """Returns the argument `name` as a tf.DType; raises ValueError unless it is in `FLOATS`."""
    try:
        checked = tf.as_dtype(dtype)
    except TypeError:
        checked = None
    if checked not in FLOATS:
        raise ValueError(
            f"{name} must be float16, bfloat16, float32 or float64, got "
            f"{checked.name if checked else repr(dtype)}: to quantize, train in one of these, then "
            "call tfwn.fold and quantize the result"
        )
    return checked


def check_weight_options(**options: Unpack[WeightOptions]) -> dict[str, Any]:
    """Checks the options common to all weights and fills in their defaults."""
    defaults = {
        "parameterization": "weight_norm",
        "exponential_g": False,
        "g_initializer": None,
        "dtype": tf.float32,
        "compute_dtype": None,
    }
    unknown = ", ".join(sorted(options.keys() - defaults.keys()))
    if unknown:
        raise TypeError(f"unknown argument {unknown}; the weight options are {', '.join(defaults)}")
    checked: dict[str, Any] = defaults | options
    if checked["parameterization"] not in PARAMETERIZATIONS:
        raise ValueError(
            f"parameterization must be one of {PARAMETERIZATIONS}, got "
            f"{checked['parameterization']!r}"
        )
    checked["dtype"] = check_float("dtype", checked["dtype"])
    if checked["compute_dtype"] is None:
        checked["compute_dtype"] = checked["dtype"]
    checked["compute_dtype"] = check_float("compute_dtype", checked["compute_dtype"])
    return checked


def check_axis(axis, rank: int) -> tuple[int, ...]:
    """Returns the axes that index the units, as a sorted tuple of nonnegative ints."""
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
        raise ValueError(f"axis must not repeat an axis, got {axis}")
    return positive


def norm(v, axis: tuple[int, ...]) -> tf.Tensor:
    """Returns ||v||, one value per unit, in v's dtype; `axis` is a result of `check_axis`."""
    # Computed as v . (v / ||v||): no square underflows or overflows, and v = 0 yields 0.
    v = tf.convert_to_tensor(v)
    wide = tf.float64 if v.dtype == tf.float64 else tf.float32
    unit = weight_norm(v, tf.ones([v.shape[a] for a in axis], v.dtype), axis, out_dtype=wide)
    others = [a for a in range(v.shape.rank) if a not in axis]
    return tf.cast(tf.reduce_sum(tf.cast(v, wide) * unit, others), v.dtype)


def zero_units(v, axis: tuple[int, ...]) -> tf.Tensor:
    """Returns a Boolean tensor of g's shape that marks the units with v = 0."""
    v = tf.convert_to_tensor(v)
    return tf.reduce_all(v == 0, [a for a in range(v.shape.rank) if a not in axis])


def directed(v, g, axis: tuple[int, ...], mask=None) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns v, multiplied by the mask, and g, changed where needed so that every unit can learn.

    A unit with v = 0 has no direction, so neither its v nor its g would ever receive a gradient. It
    gets a random v, the same in every run, and g = 0, so its w is still 0 but g can learn. A unit
    that is masked entirely is not changed.
    """
    v, g = masked(tf.convert_to_tensor(v), mask), tf.convert_to_tensor(g)
    zero = zero_units(v, axis) & ~masked_units(mask, axis)
    if tf.executing_eagerly() and not bool(tf.reduce_any(zero)):
        return v, g
    wide = tf.float64 if v.dtype == tf.float64 else tf.float32
    direction = tf.random.stateless_normal(v.shape, [0, 0], stddev=0.05, dtype=wide)
    kept = [v.shape[a] if a in axis else 1 for a in range(v.shape.rank)]
    v = tf.where(tf.reshape(zero, kept), masked(tf.cast(direction, v.dtype), mask), v)
    return v, tf.where(zero, tf.zeros_like(g), g)


def check_mask(mask, shape, dtype, name="mask") -> np.ndarray:
    """Returns the mask as an array broadcast to this shape; raises ValueError if that fails."""
    mask = np.asarray(mask, tf.as_dtype(dtype).as_numpy_dtype)
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"{name} must broadcast to the weight's shape {tuple(shape)}, got shape {mask.shape}"
        ) from None


def masked(v, mask):
    """Returns v * mask, or v if there is no mask."""
    return v if mask is None else v * mask


def masked_units(mask, axis: tuple[int, ...]) -> np.ndarray:
    """Returns a Boolean array, to broadcast to g's shape, that marks the units masked entirely."""
    if mask is None:
        return np.zeros([], bool)
    return np.all(mask == 0, tuple(a for a in range(mask.ndim) if a not in axis))


def in_scope_of(variable: tf.Variable):
    """Returns the strategy scope in which to create variables that accompany `variable`."""
    strategy = getattr(variable, "distribute_strategy", None)
    if not tf.distribute.has_strategy():
        return strategy.scope() if strategy else contextlib.nullcontext()
    current = tf.distribute.get_strategy()
    if current is not strategy and (strategy or current.num_replicas_in_sync > 1):
        raise ValueError(
            f"{variable.name} was created outside the scope of the current "
            f"{type(current).__name__}: weight-normalize the model outside this scope, or create "
            "the model in it"
        )
    return contextlib.nullcontext()


class Weight(tf.Module):
    """A weight in the weight-normalized or the normal parameterization (paper, section 2).

    With "weight_norm", the variables are v and g, and w = g * v / ||v|| (eq. 2). `exponential_g`
    replaces g with s, where g = exp(s). With "normal", the only variable is w. Both start from the
    same w: v comes from `initializer`, g is ||v|| or comes from `g_initializer`, and "normal"
    computes w from these. Each call of a Weight computes w, so call it only once where w is used
    several times, as in a loop.

    A unit with v = 0 has w = 0 for any g and would never learn. It gets a random direction and
    g = 0, so its w is unchanged but can learn.

    Arguments:
      shape: shape of v and w, fully defined.
      axis: the axis or axes that index the output units. The norm is over all other axes. None
        means one norm for the whole tensor.
      initializer: initializer of v: a callable(shape, dtype), a Keras name, or a number. Default:
        normal with standard deviation 0.05 (paper, section 3).
      mask: fixed array that broadcasts to `shape`. It multiplies v BEFORE the normalization, for
        example for MADE. A unit that is masked entirely has w = 0 and finite gradients.
      parameterization: "weight_norm" or "normal".
      exponential_g: whether to learn s, with g = exp(s), instead of g. Requires a positive g.
      g_initializer: initializer of g, in the same forms as `initializer`. Default: ||v||.
      dtype: dtype of the variables.
      compute_dtype: dtype of w. Default: `dtype`. Computing w in bfloat16 or float16 from float32
        variables needs no cast, and the variables' gradients are float32.
      name: name of the module.

    Raises:
      ValueError: if the parameterization, a dtype, axis, shape or mask is invalid.
      tf.errors.InvalidArgumentError: if g is not positive with `exponential_g`.

    >>> weight = tfwn.Weight([3, 2], initializer="ones", g_initializer=2.0)
    >>> [variable.shape.as_list() for variable in (weight.v, weight.g)]
    [[3, 2], [2]]
    >>> print(tf.norm(weight(), axis=0).numpy().round(3))
    [2. 2.]
    """

    def __init__(
        self,
        shape,
        axis: int | Sequence[int] | None = -1,
        *,
        initializer=None,
        mask=None,
        name="weight",
        **weight_options: Unpack[WeightOptions],
    ):
        super().__init__(name=name)
        options = check_weight_options(**weight_options)
        self.parameterization = options["parameterization"]
        self.exponential_g = options["exponential_g"]
        self.dtype = options["dtype"]
        self.compute_dtype = options["compute_dtype"]
        self.shape = tf.TensorShape(shape)
        if not self.shape.is_fully_defined():
            raise ValueError(f"shape must be fully defined, got {self.shape}")
        self.axis = check_axis(axis, self.shape.rank)
        self.mask = None if mask is None else check_mask(mask, self.shape, self.dtype)
        with tf.init_scope(), self.name_scope:
            self._make_variables(initializer, options["g_initializer"])

    def _make_variables(self, initializer, g_initializer):
        if initializer is None:
            initializer = tf.random_normal_initializer(0.0, 0.05)
        v = masked(initial_value(initializer, self.shape, self.dtype), self.mask)
        g = norm(v, self.axis)
        if g_initializer is not None:
            g = initial_value(g_initializer, self.g_shape, self.dtype)
        if self.parameterization == "normal":
            self.w = tf.Variable(
                v if g_initializer is None else weight_norm(v, g, self.axis), name="w"
            )
        else:
            self.make_v_and_g(v, g)

    def make_v_and_g(self, v, g, variable: tf.Variable | None = None) -> None:
        """Creates v (or reuses `variable`) and g or s, with the values of `assign_v_and_g`."""
        v, g = directed(v, g, self.axis, self.mask)
        s = self._log(g) if self.exponential_g else None
        if variable is None:
            self.v = tf.Variable(v, name="v")
        else:
            self.v = variable
            self.v.assign(v)
        with in_scope_of(self.v), self.name_scope:
            if self.exponential_g:
                self.s = tf.Variable(s, name="s")
            else:
                self.g = tf.Variable(g, name="g")

    @property
    def g_shape(self) -> tf.TensorShape:
        """The shape of g: the sizes of v along `axis`."""
        return tf.TensorShape([self.shape[a] for a in self.axis])

    def __call__(self, dtype=None) -> tf.Tensor:
        """Returns w, with shape `shape`, in `dtype`, by default `compute_dtype`."""
        dtype = dtype or self.compute_dtype
        if self.parameterization == "normal":
            return tf.cast(masked(self.w, self.mask), dtype)
        return self._normalized(self.get_g(), dtype)

    def rows(self, indices) -> tf.Tensor:
        """Returns tf.gather(w, indices), normalizing only these rows; needs axis=0 and no mask."""
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
        """Returns v / ||v||, or w / ||w|| for "normal", in `compute_dtype`."""
        return self._normalized(tf.ones(self.g_shape, self.dtype), self.compute_dtype)

    def get_g(self) -> tf.Tensor:
        """Returns g, of shape `g_shape`: g itself, exp(s), or ||w|| for "normal"."""
        if self.parameterization == "normal":
            return norm(masked(self.w, self.mask), self.axis)
        return tf.exp(self.s) if self.exponential_g else tf.convert_to_tensor(self.g)

    def set_g(self, g) -> None:
        """Sets g without changing the direction; for "normal", sets w to g * w / ||w||.

        A unit with v = 0 keeps w = 0, as in `assign_v_and_g`.
        """
        v = self.w if self.parameterization == "normal" else self.v
        self.assign_v_and_g(v, tf.reshape(tf.cast(g, self.dtype), self.g_shape))

    def assign(self, w) -> None:
        """Sets the weight to `w`: v = w and g = ||w||."""
        w = masked(tf.cast(w, self.dtype), self.mask)
        if self.parameterization == "normal":
            self.w.assign(w)
        else:
            self.assign_v_and_g(w, norm(w, self.axis))

    def assign_v_and_g(self, v, g) -> None:
        """Sets v and g; for "normal", sets w to g * v / ||v||.

        A unit with v = 0 gets a random direction and g = 0, so its w is 0 but can learn.
        """
        v = masked(tf.cast(v, self.dtype), self.mask)
        if self.parameterization == "normal":
            self.w.assign(weight_norm(v, g, self.axis))
            return
        v, g = directed(v, tf.cast(g, self.dtype), self.axis, self.mask)
        s = self._log(g) if self.exponential_g else None
        self.v.assign(v)
        if self.exponential_g:
            self.s.assign(s)
        else:
            self.g.assign(g)

    def _normalized(self, g, dtype):
        v = self.w if self.parameterization == "normal" else self.v
        return weight_norm(masked(v, self.mask), g, self.axis, out_dtype=dtype)

    def check_g(self, g) -> None:
        """Raises InvalidArgumentError if `exponential_g` is set and g is not positive."""
        if self.exponential_g:
            self._log(g)

    def _log(self, g):
        # A unit that is masked entirely has w = 0 for any g; log(1) keeps its s finite.
        g = tf.where(masked_units(self.mask, self.axis), tf.ones_like(g), g)
        tf.debugging.assert_positive(
            g,
            "g must be positive where g = exp(s): use exponential_g=False if a unit is zero or its "
            "g is negative",
        )
        return tf.math.log(g)
