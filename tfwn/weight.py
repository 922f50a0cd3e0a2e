"""Weight: one weight tensor, as (v, g) or as w itself. Every layer holds its weights in this."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import tensorflow as tf

from tfwn.initializers import initial_value
from tfwn.ops import weight_norm

if TYPE_CHECKING:
    from typing_extensions import Unpack  # A dependency of TensorFlow's.

PARAMETERIZATIONS = ("weight_norm", "normal")
FLOATS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


class WeightOptions(TypedDict, total=False):
    """The keyword arguments that all weights have in common, see `tfwn.Weight`."""

    parameterization: Literal["weight_norm", "normal"]
    exponential_g: bool
    g_initializer: Any
    dtype: tf.types.experimental.DTypeLike
    compute_dtype: tf.types.experimental.DTypeLike | None


def check_float(name: str, dtype) -> tf.DType:
    """Returns the argument `name` as a type; refuses all but the four floating types."""
    try:
        checked = tf.as_dtype(dtype)
    except TypeError:
        checked = None
    if checked not in FLOATS:
        raise ValueError(
            f"{name} must be float16, bfloat16, float32 or float64, got "
            f"{checked.name if checked else repr(dtype)}: to quantize, train in one of them, then "
            "fold with tfwn.fold"
        )
    return checked


def check_weight_options(**options: Unpack[WeightOptions]) -> dict[str, Any]:
    """Returns the options that all weights have in common, checked and with their defaults."""
    defaults = {
        "parameterization": "weight_norm",
        "exponential_g": False,
        "g_initializer": None,
        "dtype": tf.float32,
        "compute_dtype": None,
    }
    unknown = ", ".join(sorted(options.keys() - defaults.keys()))
    if unknown:
        raise TypeError(f"unknown argument {unknown}; a weight's are {', '.join(defaults)}")
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
    """Returns the axes that index the units, as a sorted tuple of non-negative numbers."""
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
    """Returns ||v||, one for each unit, in v's type; `axis` is what `check_axis` returned."""
    # v . (v / ||v||) has no square that could underflow or overflow, and is 0 for v = 0.
    v = tf.convert_to_tensor(v)
    wide = tf.float64 if v.dtype == tf.float64 else tf.float32
    unit = weight_norm(v, tf.ones([v.shape[a] for a in axis], v.dtype), axis, out_dtype=wide)
    others = [a for a in range(v.shape.rank) if a not in axis]
    return tf.cast(tf.reduce_sum(tf.cast(v, wide) * unit, others), v.dtype)


def zero_units(v, axis: tuple[int, ...]) -> tf.Tensor:
    """Returns, in g's shape, which units of v are all zero."""
    v = tf.convert_to_tensor(v)
    return tf.reduce_all(v == 0, [a for a in range(v.shape.rank) if a not in axis])


def directed(v, g, axis: tuple[int, ...], mask=None) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns v and g for a weight in which every unit learns; v is multiplied by the mask.

    A unit with v = 0 has no direction, so that neither v nor g would ever get a gradient. It gets
    random numbers, the same in each run, and g = 0: its w is 0, and g learns. A unit that is masked
    entirely stays as it is.
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
    """Returns the mask as an array of a weight's shape and type; refuses other shapes."""
    mask = np.asarray(mask, tf.as_dtype(dtype).as_numpy_dtype)
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"{name} must broadcast to the weight's shape {tuple(shape)}, got shape {mask.shape}"
        ) from None


def masked(v, mask):
    """Returns v * mask, or v where there is no mask."""
    return v if mask is None else v * mask


def masked_units(mask, axis: tuple[int, ...]) -> np.ndarray:
    """Returns, in g's shape, which units a mask leaves nothing of."""
    if mask is None:
        return np.zeros([], bool)
    return np.all(mask == 0, tuple(a for a in range(mask.ndim) if a not in axis))


def in_scope_of(variable: tf.Variable):
    """Returns the scope of the strategy that made `variable`, for variables that go with it."""
    strategy = getattr(variable, "distribute_strategy", None)
    if not tf.distribute.has_strategy():
        return strategy.scope() if strategy else contextlib.nullcontext()
    current = tf.distribute.get_strategy()
    if current is not strategy and (strategy or current.num_replicas_in_sync > 1):
        raise ValueError(
            f"{variable.name} was made outside of the {type(current).__name__} in whose scope this "
            "is: weight-normalize the model outside of this scope, or make the model in it"
        )
    return contextlib.nullcontext()


class Weight(tf.Module):
    """A weight in the weight-normalized or in the normal parameterization (paper, section 2).

    "weight_norm": variables v and g, w = g * v / ||v|| (eq. 2); with `exponential_g` v and s, where
    g = exp(s). "normal": the variable w. Both are initialized to the same w: `initializer` makes v,
    g is ||v|| or what `g_initializer` makes, and "normal" computes w from the two. Calling a Weight
    computes w; compute it once if it is needed often, as in a loop.

    A unit with v = 0 has w = 0 whatever its g, and would never learn. It gets a random direction
    and g = 0, so that w is the same and learns.

    Arguments:
      shape: of v and w, with all sizes known.
      axis: the axis or axes that index the output units; the norm is over all the others.
        None: one norm for the whole tensor.
      initializer: of v: a callable(shape, dtype), a Keras name, or a number. Default: normal with
        standard deviation 0.05 (paper, section 3).
      mask: fixed array that broadcasts to `shape`. It multiplies v BEFORE the normalization (MADE).
        A unit that is masked entirely has w = 0 and finite gradients.
      parameterization: "weight_norm" or "normal".
      exponential_g: whether to learn s, with g = exp(s), instead of g. No unit may be 0 then.
      g_initializer: like `initializer`, for g. Default: ||v||.
      dtype: of the variables.
      compute_dtype: of w; default `dtype`. bfloat16 or float16 w from float32 variables cost no
        cast, and the gradients of the variables are float32.
      name: of the module.

    Raises:
      ValueError: an invalid parameterization, dtype, axis, shape or mask.
      tf.errors.InvalidArgumentError: a g that is not positive with `exponential_g`.

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
            raise ValueError(f"shape must be known in full, got {self.shape}")
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
        """Makes v, in `variable` if given, and g or s in its scope; see `assign_v_and_g`."""
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

    def __call__(self) -> tf.Tensor:
        """Returns w, of shape `shape` and type `compute_dtype`."""
        if self.parameterization == "normal":
            return tf.cast(masked(self.w, self.mask), self.compute_dtype)
        return self._normalized(self.get_g())

    def rows(self, indices) -> tf.Tensor:
        """Returns tf.gather(w, indices) for axis 0; only these rows of v are normalized."""
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
        """Returns v / ||v||, or the same w / ||w|| for "normal", in `compute_dtype`."""
        return self._normalized(tf.ones(self.g_shape, self.dtype))

    def get_g(self) -> tf.Tensor:
        """Returns g, of shape `g_shape`: g itself, exp(s), or ||w|| for "normal"."""
        if self.parameterization == "normal":
            return norm(masked(self.w, self.mask), self.axis)
        return tf.exp(self.s) if self.exponential_g else tf.convert_to_tensor(self.g)

    def set_g(self, g) -> None:
        """Sets g and keeps the direction; for "normal" w becomes g * w / ||w||.

        A unit with v = 0 stays w = 0, as in `assign_v_and_g`.
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
        """Sets v and g; for "normal" w becomes g * v / ||v||.

        A unit with v = 0 gets a random direction and g = 0, so that w is 0 and learns.
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

    def _normalized(self, g):
        v = self.w if self.parameterization == "normal" else self.v
        return weight_norm(masked(v, self.mask), g, self.axis, out_dtype=self.compute_dtype)

    def check_g(self, g) -> None:
        """Raises an error for a g that this weight cannot have, with `exponential_g`."""
        if self.exponential_g:
            self._log(g)

    def _log(self, g):
        # A unit that is masked entirely has w = 0 whatever its g; log(1) keeps s finite.
        g = tf.where(masked_units(self.mask, self.axis), tf.ones_like(g), g)
        tf.debugging.assert_positive(
            g,
            "g must be positive where g = exp(s): use exponential_g=False for units that are zero "
            "or for negative g",
        )
        return tf.math.log(g)
