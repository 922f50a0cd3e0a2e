"""WeightNormalization: a wrapper that weight-normalizes any Keras 3 layer.

The wrapped layer is never changed. Its kernel variable is v, the wrapper adds g, and whatever the
layer reads as its kernel while it is called is w = g * v / ||v|| (paper, eq. 2).
"""

import contextlib
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from tfwn.keras.data_dependent_init import (
    DEPTHWISE,
    INITIALIZABLE,
    TRANSPOSED,
    initializing_call,
    refuse,
)
from tfwn.keras.scope import Substitution, exact
from tfwn.layer import is_initializing
from tfwn.ops import weight_norm
from tfwn.weight import check_axis, norm

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "tfwn.keras needs Keras on TensorFlow, but the Keras backend is "
        f"{keras.backend.backend()!r}: set KERAS_BACKEND=tensorflow before Keras is imported"
    )


@keras.saving.register_keras_serializable(package="tfwn")
class WeightNormalization(keras.layers.Wrapper):
    """Weight-normalizes the kernels of a Keras layer: w = g * v / ||v|| (paper, section 2, eq. 2).

    Any layer can be wrapped: Dense, convolutions, EinsumDense, recurrent layers, and layers that
    hold others, as MultiHeadAttention, Bidirectional and TimeDistributed do. Each kernel in it gets
    its own g, at first ||v||, so that wrapping alone changes no output. w is computed once per
    call, outside any loop over time. Optimizers see v (the layer's own kernel variable) and g.
    Regularizers act on w.

    Arguments:
      layer: the layer to normalize, built or not.
      data_init: False. Data-dependent initialization is a call of its own,
        `tfwn.data_dependent_init(model, batch)`; it never happens in the first call of the layer.
      weight_names: names of the variables to normalize. Default: those called "kernel",
        "embeddings" or something ending in "_kernel".
      axis: the axis or axes of v that index its output units, the norm runs over all the others;
        None: one norm for the whole tensor. A dict gives one for each variable's name. Default:
        by the type of the layer that owns the variable, the last axis where the type is unknown.
      kwargs: name, trainable, dtype: of the wrapper, by default the layer's own.

    Inputs, outputs, masks and call arguments are the layer's. Attributes: `layer`, and
    `normalized`, which has v, g, axis and w() of each normalized variable.

    Raises:
      ValueError: `data_init=True`; a layer with no variable to normalize, or with a constraint on
        one (it would act on v, not on w).

    >>> import keras
    >>> layer = tfwn.keras.WeightNormalization(keras.layers.Dense(2))
    >>> layer(tf.ones([1, 3])).shape
    TensorShape([1, 2])
    >>> [tuple(variable.shape) for variable in layer.trainable_variables]
    [(2,), (3, 2), (2,)]
    """

    def __init__(self, layer, data_init=False, *, weight_names=None, axis="auto", **kwargs):
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(f"layer must be a Keras layer, got {layer!r}")
        if isinstance(layer, WeightNormalization):
            raise ValueError(f"layer is weight-normalized already: {layer.name!r}")
        if data_init:
            raise ValueError(
                "data_init=True is not an argument of the layer here: build the model, then call "
                "tfwn.data_dependent_init(model, batch) once before training"
            )
        # Keras reads from these signatures which arguments, masks and shapes to pass.
        object.__setattr__(self, "call", _with_signature(self._call, layer.call))
        self.build.__signature__ = inspect.signature(layer.build)  # type: ignore[attr-defined]
        super().__init__(
            layer, **{"dtype": layer.dtype_policy, "trainable": layer.trainable} | kwargs
        )
        self.weight_names = None if weight_names is None else list(weight_names)
        self.axis = axis
        self.supports_masking = layer.supports_masking
        self.normalized: tuple[NormalizedVariable, ...] = ()

    def build(self, *shapes, **named_shapes):
        """Builds the layer, and makes a g for each of its kernels."""
        if not self.layer.built:
            self.layer.build(*shapes, **named_shapes)
            self.layer.built = True
        self._build_shapes = [list(shapes), dict(named_shapes)]
        found = list(self._find())
        if not found:
            paths = [variable.path for variable in self.layer.variables]
            raise ValueError(
                f"layer {self.layer.name!r} has no variable to normalize, its variables after "
                f"build() are {paths}: name those to normalize in weight_names, and if there are "
                "none yet, call the layer once before it is wrapped"
            )
        self._check_names({v.name for _, v in found})
        # A tuple: Keras' tracker would make a layer's list of variables of a list.
        self.normalized = tuple(self._normalize(*one) for one in found)
        # tf.train.Checkpoint saves what is an attribute.
        for i, one in enumerate(self.normalized):
            setattr(self, "g" if len(found) == 1 else f"g_{i}", one.g)
        # Where data-dependent initialization marks that it has been here; saved with the model.
        self.initialized = None
        if self.can_initialize():
            self.initialized = self.add_weight(
                shape=(), dtype="bool", initializer="zeros", trainable=False, name="initialized"
            )

    def _find(self):
        """Yields (owner, v) for each variable to normalize."""
        seen = set()
        for owner in self.layer._flatten_layers():
            if isinstance(owner, WeightNormalization):
                raise ValueError(f"layer {self.layer.name!r} holds {owner!r}: normalize it once")
            for v in vars(owner).values():
                if isinstance(v, keras.Variable) and id(v) not in seen and self._is_weight(v):
                    seen.add(id(v))
                    yield owner, v

    def _check_names(self, selected):
        """Refuses names of `weight_names` and `axis` that no variable has."""
        names = {v.name for v in self.layer.variables}
        axis = self.axis if isinstance(self.axis, Mapping) else ()
        for argument, unknown in (
            ("weight_names", set(self.weight_names or ()) - selected),
            ("axis", set(axis) - names),
        ):
            if unknown:
                raise ValueError(
                    f"{argument} names {', '.join(sorted(unknown))}, which layer "
                    f"{self.layer.name!r} does not have; it has {', '.join(sorted(names))}"
                )

    def _is_weight(self, variable) -> bool:
        if self.weight_names is not None:
            return variable.name in self.weight_names
        return is_weight(variable)

    def _normalize(self, owner, v) -> "NormalizedVariable":
        axis = self.axis.get(v.name, "auto") if isinstance(self.axis, Mapping) else self.axis
        axis = unit_axes(owner, v) if isinstance(axis, str) and axis == "auto" else axis
        axes = check_axis(axis, len(v.shape))
        if v.constraint is not None:
            raise ValueError(
                f"{v.path} has the constraint {v.constraint!r}, which would act on v and not on "
                "w = g * v / ||v||: remove it from the layer"
            )
        g = self.add_weight(
            shape=[v.shape[a] for a in axes],
            initializer=lambda shape, dtype: norm(exact(v), axes),
            dtype=v._dtype,
            trainable=v.trainable,
            autocast=False,
            name=_relative_path(v, self.layer) + "_g",
        )
        normalized = NormalizedVariable(owner, v, g, axes)
        if v.regularizer is not None:
            v.regularizer = _OfWeight(v.regularizer, normalized)
        return normalized

    def _call(self, *args, **kwargs):
        if is_initializing():
            return self._initialize_and_call(*args, **kwargs)
        for n in self.normalized:
            if not any(value is n.v for value in vars(n.owner).values()):
                raise RuntimeError(
                    f"{n.owner.name!r} has another variable than the {n.v.path} that it was "
                    "weight-normalized with, as quantize() makes it: do that to what tfwn.fold "
                    "returns"
                )
        # A type the layer computes in, w comes out in it: no cast, no copy in the variable's type.
        with Substitution([(n.v, n.w(n.v.dtype)) for n in self.normalized]) as scope:
            outputs = self.layer(*args, **kwargs)
        for loss in scope.own_losses:
            self.add_loss(loss)
        return outputs

    def _initialize_and_call(self, *args, **kwargs):
        if not self.can_initialize():
            refuse(self.layer)
        with contextlib.ExitStack() as stack:
            for normalized in self.normalized:
                stack.enter_context(initializing_call(self, normalized))
            return self.layer(*args, **kwargs)

    def can_initialize(self) -> bool:
        """Whether `tfwn.data_dependent_init` can set g and the bias of this layer."""
        owners = [normalized.owner for normalized in self.normalized]
        return all(isinstance(o, INITIALIZABLE) and owners.count(o) == 1 for o in owners)

    def fold(self) -> keras.layers.Layer:
        """Writes w into the layer's kernels and returns the layer, plain again (the inverse).

        >>> import keras
        >>> layer = tfwn.keras.WeightNormalization(keras.layers.Dense(2))
        >>> x = tf.ones([1, 3])
        >>> bool(tf.reduce_all(layer(x) == layer.fold()(x)))
        True
        """
        for normalized in self.normalized:
            normalized.v.assign(normalized.w())
            # With v = w the wrapper is what it was: also where g was negative.
            normalized.g.assign(norm(exact(normalized.v), normalized.axis))
            if isinstance(normalized.v.regularizer, _OfWeight):
                normalized.v.regularizer = normalized.v.regularizer.regularizer
        return self.layer

    def compute_output_shape(self, *args, **kwargs):
        """The layer's own."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        """The layer's own."""
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_mask(self, *args, **kwargs):
        """The layer's own."""
        return self.layer.compute_mask(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The arguments, from which `from_config` makes the same layer without its variables."""
        config = super().get_config()
        config.update(weight_names=self.weight_names, axis=self.axis)
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes a layer from what `get_config` returned."""
        config = dict(config)
        inner = dict(config.pop("layer"))
        if "go_backwards" in config:  # written by keras.layers.Bidirectional
            inner["config"] = dict(inner["config"]) | {"go_backwards": config.pop("go_backwards")}
        axis = config.get("axis", "auto")
        config["axis"] = tuple(axis) if isinstance(axis, list) else axis
        layer = keras.saving.deserialize_keras_object(inner, custom_objects=custom_objects)
        return cls(layer, **config)

    def get_build_config(self):
        """The shapes that the layer was built with."""
        return {"shapes": self._build_shapes} if self.built else None

    def build_from_config(self, config):
        """Builds the layer with the shapes from `get_build_config`."""
        shapes, named_shapes = config["shapes"]
        self.build(*map(_as_shape, shapes), **{k: _as_shape(s) for k, s in named_shapes.items()})


def _forwarded(name: str) -> property:
    """An attribute of the wrapped layer, for keras.layers.Bidirectional and users of RNNs."""

    def assign(self, value):
        setattr(self.layer, name, value)

    return property(lambda self: getattr(self.layer, name), assign)


for _name in (
    *("go_backwards", "return_sequences", "return_state", "stateful", "unroll"),
    *("zero_output_for_mask", "states", "reset_state"),
):
    setattr(WeightNormalization, _name, _forwarded(_name))


class NormalizedVariable:
    """One normalized variable of a Keras layer: `v` and `g`, the `axis` of g in v, its `owner`."""

    def __init__(self, owner, v, g, axis):
        self.owner = owner
        self.v = v
        self.g = g
        self.axis = axis

    def w(self, dtype=None) -> tf.Tensor:
        """Returns w = g * v / ||v||, of type `dtype`, by default v's."""
        return self.scaled(exact(self.g), dtype)

    def scaled(self, g, dtype=None) -> tf.Tensor:
        """Returns g * v / ||v|| with this g."""
        return weight_norm(exact(self.v), g, self.axis, out_dtype=dtype or self.v._dtype)


class _OfWeight(keras.regularizers.Regularizer):
    """The regularizer of a variable v, on w."""

    def __init__(self, regularizer, normalized):
        self.regularizer = regularizer
        self.normalized = normalized

    def __call__(self, v):
        return self.regularizer(self.normalized.w())


def is_weight(variable: keras.Variable) -> bool:
    """Whether the variable is normalized by default."""
    return variable.name in ("kernel", "embeddings") or variable.name.endswith("_kernel")


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


def _relative_path(v, layer) -> str:
    return v.path.removeprefix(f"{layer.path}/").replace("/", "_")


def _with_signature(function, model):
    @functools.wraps(model)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


def _as_shape(shape):
    """A shape from JSON: a list of sizes is a tuple again."""
    if isinstance(shape, (list, tuple)):
        return tuple(_as_shape(s) if isinstance(s, (list, tuple)) else s for s in shape)
    return shape
