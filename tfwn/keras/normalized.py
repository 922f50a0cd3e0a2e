"""What a wrapper keeps of each kernel: v, g, the axes, and how a call reads w in v's place."""

from collections.abc import Callable, Iterator, Mapping

import keras
import tensorflow as tf

from tfwn.keras.data_dependent_init import DEPTHWISE, TRANSPOSED
from tfwn.keras.internals import (
    add_variable,
    in_stateless_scope,
    layers_in,
    read_dtype,
    stored_dtype,
    strategy_scope,
)
from tfwn.keras.scope import exact
from tfwn.ops import weight_norm
from tfwn.weight import check_axis, norm, with_direction


class NormalizedVariable:
    """One normalized variable of a Keras layer: `v` and `g`, the `axis` of g in v, its `owner`."""

    def __init__(self, owner, v, g, axis):
        self.owner = owner
        self.v = v
        self.g = g
        self.axis = axis
        self.unit = None  # What data-dependent initialization sees of it, once it has been here.

    def w(self, dtype=None) -> tf.Tensor:
        """Returns w = g * v / ||v||, of type `dtype`, by default v's."""
        return self.scaled(exact(self.g), dtype)

    def scaled(self, g, dtype=None) -> tf.Tensor:
        """Returns g * v / ||v|| with this g."""
        return weight_norm(exact(self.v), g, self.axis, out_dtype=dtype or stored_dtype(self.v))

    def reading(self) -> Callable[[str], tf.Tensor]:
        """What a call reads in the place of v: a function of the type to read it in.

        w is computed here, once and outside of any loop in the call, in the type that its owner
        reads it in: no cast, no copy in the variable's type.
        """
        owner_dtype = read_dtype(self.owner, self.v)
        w = self.w(owner_dtype)
        return lambda dtype: w if dtype == owner_dtype else self.w(dtype)

    def check_owner(self) -> None:
        """Refuses an owner that does not use v any more."""
        if not any(value is self.v for value in vars(self.owner).values()):
            raise RuntimeError(
                f"{self.owner.name!r} has another variable than the {self.v.path} that it was "
                "weight-normalized with, as quantize() makes it: call tfwn.fold first, and "
                "quantize() on what it returns"
            )

    def fold(self) -> None:
        """Sets v = w and g = ||w||: the function stays, also where g was negative."""
        self.v.assign(self.w())
        self.g.assign(norm(exact(self.v), self.axis))

    def merged_g(self) -> tf.Tensor | keras.Variable:
        """The g that belongs to the kernel that the owner writes into files.

        With LoRA, that is its kernel plus the product of the two low-rank factors. v and g are
        frozen then, so that v = w can be set without a loss.
        """
        if not getattr(self.owner, "lora_enabled", False):
            return self.g
        self.fold()
        merged = getattr(self.owner, self.v.name)
        return norm(tf.convert_to_tensor(merged), self.axis)


class Gain(keras.Variable):
    """g: it trains exactly when the v that it follows does."""

    _followed: keras.Variable | None = None

    def follow(self, v: keras.Variable) -> None:
        """From now on trains when v does."""
        self._followed = v

    @property
    def trainable(self):
        """As of v."""
        return self._followed is None or self._followed.trainable

    @trainable.setter
    def trainable(self, value):
        """Without effect: Keras sets it for all variables of a layer, v among them."""


class OfWeight(keras.regularizers.Regularizer):
    """The regularizer of a variable v, on w."""

    def __init__(self, regularizer, normalized):
        self.regularizer = regularizer
        self.normalized = normalized

    def __call__(self, v):
        """The loss of w; Keras hands over v."""
        return self.regularizer(self.normalized.w())


def is_weight(variable: keras.Variable) -> bool:
    """Whether the variable is normalized by default."""
    return variable.name in ("kernel", "embeddings") or variable.name.endswith("_kernel")


def find(layer, select: Callable[[keras.Variable], bool]) -> Iterator[tuple]:
    """Yields (owner, v) for each variable that `select` chooses in the layer and those in it."""
    seen = set()
    for owner in layers_in(layer):
        for v in vars(owner).values():
            if isinstance(v, keras.Variable) and id(v) not in seen and select(v):
                seen.add(id(v))
                yield owner, v


def normalize(wrapper, owner, v) -> NormalizedVariable:
    """Adds g to the wrapper, for a variable v of a layer in it."""
    if v.constraint is not None:
        raise ValueError(
            f"{v.path} has the constraint {v.constraint!r}, which would act on v and not on "
            "w = g * v / ||v||: remove it from the layer"
        )
    axis = wrapper.axis.get(v.name, "auto") if isinstance(wrapper.axis, Mapping) else wrapper.axis
    axis = unit_axes(owner, v) if isinstance(axis, str) and axis == "auto" else axis
    axes = check_axis(axis, len(v.shape))

    def initial_g(shape, dtype):
        before = exact(v)
        if not in_stateless_scope():  # Where Keras only traces, there is no value yet.
            after = with_direction(before, axes)
            if after is not before:
                v.assign(after)
        return norm(before, axes)

    with strategy_scope(v):
        g = add_variable(
            wrapper,
            Gain,
            shape=[v.shape[a] for a in axes],
            initializer=initial_g,
            dtype=stored_dtype(v),
            autocast=False,
            name=v.path.removeprefix(f"{wrapper.layer.path}/").replace("/", "_") + "_g",
        )
    g.follow(v)
    normalized = NormalizedVariable(owner, v, g, axes)
    if v.regularizer is not None:
        v.regularizer = OfWeight(v.regularizer, normalized)
    return normalized


def unit_axes(owner: keras.layers.Layer, v: keras.Variable) -> int | tuple[int, ...]:
    """The axes of a Keras layer's kernel that index its output units."""
    if v.name == "depthwise_kernel" or isinstance(owner, DEPTHWISE):
        return (-2, -1)
    if isinstance(owner, TRANSPOSED):
        return -2
    if isinstance(owner, keras.layers.Embedding):
        return 0
    if isinstance(owner, keras.layers.EinsumDense):
        inputs, output = owner.equation.replace(" ", "").split("->")
        kernel = inputs.split(",")[1]
        axes = tuple(i for i, letter in enumerate(kernel) if letter in output)
        if len(axes) == len(kernel):
            raise ValueError(
                f"the equation {owner.equation!r} of {owner.name!r} sums over no axis of its "
                "kernel, so that there is no norm: give axis"
            )
        return axes
    return -1
