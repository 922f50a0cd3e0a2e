"""What a wrapper keeps of each kernel: v, g, the axes, and how a call reads w in v's place."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfwn.keras.internals import (
    add_variable,
    in_stateless_scope,
    layers_in,
    read_dtype,
    stored,
    stored_dtype,
    strategy_scope,
)
from tfwn.keras.scope import exact
from tfwn.normalized_variable import Normalized
from tfwn.ops import weight_norm
from tfwn.traces import current_graph, is_within
from tfwn.weight import check_axis, check_mask, directed, masked, norm

TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


class NormalizedKernel(Normalized):
    """One normalized variable of a Keras layer: `v`, `g`, `axis`, `mask`, the layer as `owner`.

    It is used as the variable w, but does not take v's place in the layer, as NormalizedVariable
    does in a tf.Module: Keras saves, freezes and distributes the variables that a layer made.
    """

    def __init__(self, owner, v, g, axis, mask):
        super().__init__(v, g, axis, mask)
        self.owner = owner
        self.unit = None  # What data-dependent initialization sees of it, once it has been here.

    def w(self, dtype=None) -> tf.Tensor:
        """Returns w, of type `dtype`, by default v's."""
        return self.scaled(exact(self.g), dtype)

    def scaled(self, g, dtype=None) -> tf.Tensor:
        """Returns g * v / ||v|| with this g."""
        v = masked(exact(self.v), self.mask)
        return weight_norm(v, g, self.axis, out_dtype=dtype or self.dtype)

    # As of a Keras variable.
    value = property(lambda self: self.w())
    dtype = property(lambda self: stored_dtype(self.v))
    device = property(lambda self: stored(self.v).device)
    path = property(lambda self: self.v.path)

    def check_owner(self) -> None:
        """Refuses an owner that does not use v any more."""
        if not any(value is self.v for value in vars(self.owner).values()):
            raise RuntimeError(
                f"{self.owner.name!r} has another variable than the {self.v.path} that it was "
                "weight-normalized with, as quantize() makes it: call tfwn.fold first, and "
                "quantize() on what it returns"
            )

    def check_mask(self) -> None:
        """Refuses LoRA's additions to a masked kernel."""
        if self.mask is not None and getattr(self.owner, "lora_enabled", False):
            raise ValueError(
                f"{self.owner.name!r} has a kernel_mask, which does not hold for what LoRA adds to "
                "the kernel: call enable_lora on layers without a mask"
            )

    def fold(self) -> None:
        """Sets v = w and g = ||w||: the function stays, also where g was negative."""
        w = self.w()
        self.v.assign(w)
        self.g.assign(norm(w, self.axis))

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


class Reading:
    """What a call reads in the place of v: w, with its g or another one.

    w is computed here, once and outside of any loop in the call, in the type that its owner reads
    it in: no cast, no copy in the variable's type. A tf.function that the call calls computes its
    own: its trace outlives this call.
    """

    def __init__(self, normalized: NormalizedKernel, g: tf.Tensor | None = None):
        normalized.check_mask()
        self._normalized = normalized
        self._g = g
        self._compute()

    def _compute(self):
        self._dtype = read_dtype(self._normalized.owner, self._normalized.v)
        self._graph = current_graph()
        self._w = self._in(self._dtype)

    def _in(self, dtype):
        g = exact(self._normalized.g) if self._g is None else self._g
        return self._normalized.scaled(g, dtype)

    def __call__(self, dtype) -> tf.Tensor:
        """Returns w in this type."""
        return self._w if dtype == self._dtype and is_within(self._graph) else self._in(dtype)

    def assign(self, w) -> None:
        """Sets w, where the call writes its kernel."""
        self._normalized.assign(w)
        self._compute()


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
    """Yields (owner, v) for each variable that `select` chooses in the layer and those in it.

    The owner is the layer that made v, where others have it as an attribute too.
    """
    owners: dict[int, tuple] = {}
    for owner in layers_in(layer):
        for v in vars(owner).values():
            if isinstance(v, keras.Variable) and select(v):
                made = v.path == f"{owner.path}/{v.name}"
                if made or id(v) not in owners:
                    owners[id(v)] = owner, v
    yield from owners.values()


def option(value, v, default=None) -> Any:
    """The option of a wrapper for this variable: of a dict, what it has under v's name."""
    return value.get(v.name, default) if isinstance(value, Mapping) else value


def normalize(wrapper, owner, v) -> NormalizedKernel:
    """Adds g to the wrapper, for a variable v of a layer in it."""
    if v.constraint is not None:
        raise ValueError(
            f"{v.path} has the constraint {v.constraint!r}, which would act on v and not on "
            "w = g * v / ||v||: remove it from the layer"
        )
    axis = option(wrapper.axis, v, "auto")
    axis = unit_axes(owner, v) if isinstance(axis, str) and axis == "auto" else axis
    axes = check_axis(axis, len(v.shape))
    mask = option(wrapper.kernel_mask, v)
    if mask is not None:
        mask = check_mask(mask, v.shape, stored_dtype(v), f"kernel_mask of {v.path}")

    def initial_g(shape, dtype):
        before = exact(v)
        g = norm(masked(before, mask), axes)
        if not in_stateless_scope():  # Where Keras only traces, there is no value yet.
            after, g = directed(before, g, axes, mask)
            if after is not before:
                v.assign(after)
        return g

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
    normalized = NormalizedKernel(owner, v, g, axes, mask)
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
