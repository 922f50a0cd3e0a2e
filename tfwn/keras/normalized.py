"""A wrapper's state for each kernel: v, g and the axes, and how a call reads w in place of v."""

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfwn.keras.internals import (
    add_variable,
    autocast_off,
    hidden_from_gradients,
    in_stateless_scope,
    layers_in,
    read_dtype,
    stored,
    stored_dtype,
    strategy_scope,
    tracked_lists,
)
from tfwn.keras.scope import exact
from tfwn.modules import attributes
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

# From the id of each v to the wrapper that normalizes it, until this is folded.
wrappers: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


class NormalizedKernel(Normalized):
    """A normalized variable of a Keras layer: `v`, `g`, `axis`, `mask`, and the layer as `owner`.

    It acts as the variable w. Unlike NormalizedVariable in a tf.Module, it does not replace v in
    the layer, because Keras saves, freezes and distributes the variables that a layer created.
    """

    def __init__(self, owner, v, g, axis, mask):
        super().__init__(v, g, axis, mask)
        self.owner = owner
        self.unit = None  # Created by data-dependent initialization as its view of the layer.

    def w(self, dtype=None) -> tf.Tensor:
        """Returns w in `dtype`, by default that in which v is read: in a call, it is autocast."""
        return self.scaled(exact(self.g), dtype)

    def scaled(self, g, dtype=None) -> tf.Tensor:
        """Returns g * v / ||v|| for the given g."""
        v = masked(exact(self.v), self.mask)
        return weight_norm(v, g, self.axis, out_dtype=dtype or self.dtype)

    # Attributes that a Keras variable has.
    value = property(lambda self: self.w())
    ndim = property(lambda self: len(self.v.shape))
    device = property(lambda self: stored(self.v).device)
    path = property(lambda self: self.v.path)

    def check_owner(self) -> None:
        """Raises RuntimeError if the owner no longer uses v."""
        if not any(v is self.v for v in own_variables(self.owner)):
            raise RuntimeError(
                f"{self.owner.name!r} has another variable than the {self.v.path} with which it "
                "was weight-normalized, for example after quantize(): call tfwn.fold first, then "
                "quantize() on what it returns"
            )

    def assign(self, value, use_locking=False, name=None, read_value=True):
        """Sets w: v = w and g = ||w||; a unit with w = 0 gets a random direction."""
        with autocast_off():
            value = tf.cast(value, self.dtype)
            return super().assign(value, use_locking, name, read_value)

    def assign_v_and_g(self, v, g) -> None:
        """Sets v and g; a unit with v = 0 gets a random direction and g = 0."""
        with autocast_off():
            super().assign_v_and_g(v, g)

    def sparse_read(self, indices, name=None) -> tf.Tensor:
        """Returns the rows of w at `indices`; with axis=0 and no mask, normalizes only these."""
        with autocast_off():
            rows = super().sparse_read(indices, name)
        return tf.cast(rows, self.dtype)

    def fold(self) -> None:
        """Sets v = w and g = ||w||, which does not change w, even where g was negative."""
        w = self.w(stored_dtype(self.v))
        self.v.assign(w)
        self.g.assign(norm(w, self.axis))

    def merged_g(self) -> tf.Tensor | keras.Variable:
        """Returns the g for the kernel that the owner saves.

        With LoRA, the owner saves its kernel plus the product of the two low-rank factors. Because
        v and g are frozen then, setting v = w loses nothing.
        """
        if not getattr(self.owner, "lora_enabled", False):
            return self.g
        self.fold()
        merged = getattr(self.owner, self.v.name)
        return norm(tf.convert_to_tensor(merged), self.axis)


class Reading:
    """What a call reads in place of v: w, computed with its own g or another one.

    w is computed here, once and outside any loop in the call, directly in the dtype in which its
    owner reads it, without a cast. A tf.function that the call calls computes its own w, because
    its trace outlives this call. A function with a custom gradient may read w only if it is an
    argument: TensorFlow finds no variable in w, and keras.remat runs its function again after this
    call, when it would read v.
    """

    def __init__(self, normalized: NormalizedKernel, g: tf.Tensor | None = None):
        owner = normalized.owner
        if normalized.mask is not None and getattr(owner, "lora_enabled", False):
            raise ValueError(
                f"{owner.name!r} has a kernel_mask, which does not apply to what LoRA adds to the "
                "kernel: call enable_lora only on layers without a mask"
            )
        self._normalized = normalized
        self._g = g
        self._hidden = hidden_from_gradients(normalized.v)
        self._compute()

    def _compute(self):
        self._dtype = read_dtype(self._normalized.owner, self._normalized.v)
        self._graph = current_graph()
        self._w = self._in(self._dtype)

    def _in(self, dtype):
        g = exact(self._normalized.g) if self._g is None else self._g
        return self._normalized.scaled(g, dtype)

    def __call__(self, dtype) -> tf.Tensor:
        """Returns w in this dtype."""
        if hidden_from_gradients(self._normalized.v) > self._hidden:
            raise RuntimeError(
                f"{self._normalized.v.path} is read in a function with a custom gradient, such as "
                "that of keras.remat or tf.recompute_grad, so v and g would get no gradient: "
                "normalize the layers that the function calls one by one, use keras.RematScope "
                "instead of keras.remat, or pass tf.convert_to_tensor(kernel) to the function as "
                "an argument"
            )
        return self._w if dtype == self._dtype and is_within(self._graph) else self._in(dtype)

    def assign(self, w) -> None:
        """Sets w when the call writes to its kernel."""
        self._normalized.assign(w)
        self._compute()


class Gain(keras.Variable):
    """The variable g, which is trainable exactly when its v is."""

    _followed: keras.Variable | None = None

    def follow(self, v: keras.Variable) -> None:
        """Makes g trainable exactly when v is."""
        self._followed = v

    @property
    def trainable(self):
        """Whether v is trainable."""
        return self._followed is None or self._followed.trainable

    @trainable.setter
    def trainable(self, value):
        """Has no effect, because Keras sets it for all variables of a layer, including v."""


class OfWeight(keras.regularizers.Regularizer):
    """Applies the regularizer of a variable v to w."""

    def __init__(self, regularizer, normalized):
        self.regularizer = regularizer
        self.normalized = normalized

    def __call__(self, v):
        """Returns the loss of w, although Keras passes v."""
        return self.regularizer(self.normalized.w())


def is_weight(variable: keras.Variable) -> bool:
    """Returns whether the variable is normalized by default."""
    return variable.name in ("kernel", "embeddings") or variable.name.endswith("_kernel")


def own_variables(layer: keras.layers.Layer) -> Iterator[keras.Variable]:
    """Yields the variables in the layer's attributes, then those in lists, tuples and dicts there.

    Keras' own lists are left out, because they also contain variables that were replaced.
    """
    return _variables_in([value for _, value in attributes(layer)], tracked_lists(layer))


def _variables_in(values: list, ignored: list) -> Iterator[keras.Variable]:
    yield from (value for value in values if isinstance(value, keras.Variable))
    for value in values:
        if isinstance(value, list | tuple | dict) and not any(value is one for one in ignored):
            inner = value.values() if isinstance(value, dict) else value
            yield from _variables_in(list(inner), ignored)


def find(layer, select: Callable[[keras.Variable], bool]) -> Iterator[tuple]:
    """Yields (owner, v) for each variable that `select` chooses in the layer and the layers in it.

    If several layers have v in their attributes, the owner is the one that created it.
    """
    owners: dict[int, tuple] = {}
    for owner in layers_in(layer):
        for v in own_variables(owner):
            if select(v):
                made = v.path == f"{owner.path}/{v.name}"
                if made or id(v) not in owners:
                    owners[id(v)] = owner, v
    yield from owners.values()


def check_free(v: keras.Variable) -> None:
    """Raises ValueError if a wrapper normalizes v already."""
    if id(v) in wrappers:
        gc.collect()  # Deletes wrappers that the program no longer uses.
    if id(v) in wrappers:
        raise ValueError(
            f"{v.path} is normalized by the wrapper {wrappers[id(v)].name!r} already, and a second "
            "one would train its own g: call that wrapper instead, or call its fold() before you "
            "wrap the layer again"
        )


def option(value, v, default=None) -> Any:
    """Returns a wrapper's option for v: if it is a dict, its value for v's name."""
    return value.get(v.name, default) if isinstance(value, Mapping) else value


def normalize(wrapper, owner, v) -> NormalizedKernel:
    """Adds g to the wrapper for a variable v of `owner` and returns the NormalizedKernel."""
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
        if not in_stateless_scope():  # While Keras only traces, v has no value.
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
    regularizer = own_regularizer(v)
    if regularizer is not None:
        v.regularizer = OfWeight(regularizer, normalized)
    return normalized


def own_regularizer(v: keras.Variable) -> keras.regularizers.Regularizer | None:
    """Returns the variable's regularizer as its layer set it."""
    return v.regularizer.regularizer if isinstance(v.regularizer, OfWeight) else v.regularizer


def unit_axes(owner: keras.layers.Layer, v: keras.Variable) -> int | tuple[int, ...]:
    """Returns the axes of a Keras layer's kernel that index its output units."""
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
                "kernel, so there is no axis to normalize over: pass axis"
            )
        return axes
    return -1
