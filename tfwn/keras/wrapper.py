"""WeightNormalization: a wrapper that weight-normalizes a Keras 3 layer.

The wrapped layer is never changed. Its kernel variable is v, and the wrapper adds g. While the
layer is called, its kernel reads as w = g * v / ||v|| (paper, eq. 2).
"""

import contextlib
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfwn.keras import internals
from tfwn.keras.data_dependent_init import (
    INITIALIZABLE,
    NOT_INITIALIZABLE,
    initializing_call,
    refuse,
)
from tfwn.keras.normalized import (
    NormalizedKernel,
    Reading,
    check_free,
    find,
    is_weight,
    normalize,
    own_regularizer,
    wrappers,
)
from tfwn.keras.scope import Substitution
from tfwn.layer import is_initializing
from tfwn.modules import refuse_keras_2

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "tfwn.keras needs Keras on TensorFlow, but the Keras backend is "
        f"{keras.backend.backend()!r}: set KERAS_BACKEND=tensorflow before importing Keras"
    )


@keras.saving.register_keras_serializable(package="tfwn")
class WeightNormalization(keras.layers.Wrapper, internals.DropoutRNNCell):
    """Weight-normalizes the kernels of the wrapped Keras layer: w = g * v / ||v|| (paper, eq. 2).

    Any layer that has kernels or embeddings can be wrapped: Dense, convolutions, EinsumDense,
    recurrent layers, and layers that contain others, such as MultiHeadAttention, Bidirectional and
    TimeDistributed. Each kernel gets its own g, initialized to ||v||, so wrapping alone does not
    change the outputs. w is computed once per call, outside any loop over time. Optimizers see v
    (the layer's own kernel variable) and g. Regularizers act on w.

    Arguments:
      layer: the layer to normalize, built or not.
      data_init: must be False. For data-dependent initialization, call
        `tfwn.data_dependent_init(model, batch)`. It never happens in the layer's first call.
      weight_names: name or names of the variables to normalize. Default: "kernel", "embeddings" and
        all names that end in "_kernel".
      axis: the axis or axes of v that index its output units; the norm is over all other axes. None
        means one norm for the whole tensor. A dict maps names of variables to their axes. Default:
        depends on the type of the layer that owns the variable; the last axis for unknown types.
      kernel_mask: fixed array that broadcasts to v, or a dict that maps names of variables to such
        arrays. It multiplies v before the normalization, so w is 0 where the mask is 0 and the norm
        is over the other elements.
      kwargs: name, trainable and dtype of the wrapper, by default the layer's. trainable=False
        freezes the layer, too.

    Inputs, outputs, masks and call arguments are those of the layer. `wrapper.layer` is the layer.
    `wrapper.normalized` contains an object for each normalized variable, with v, g, axis and w().
    The layer's other public attributes can be read and set through the wrapper; in a subclass they
    can only be read.

    Raises:
      ValueError: if `data_init` is True, the layer is already weight-normalized or quantized, it
        has no variable to normalize, or such a variable has a constraint (which would act on v, not
        on w) or is normalized by another wrapper.
      RuntimeError: when called, if the layer reads a kernel in a function with a custom gradient,
        such as keras.remat, in which v and g would get no gradient.

    >>> import keras
    >>> layer = tfwn.keras.WeightNormalization(keras.layers.Dense(2))
    >>> layer(tf.ones([1, 3])).shape
    TensorShape([1, 2])
    >>> [tuple(variable.shape) for variable in layer.trainable_variables]
    [(2,), (3, 2), (2,)]
    """

    # Declared here, so that __setattr__ does not set the attributes of this name in the layer.
    weight_names: list[str] | None = None
    axis: Any = "auto"
    kernel_mask: Any = None
    normalized: tuple[NormalizedKernel, ...] = ()
    initialized: tf.Variable | None = None
    built_while_initializing = False

    def __init__(
        self,
        layer,
        data_init=False,
        *,
        weight_names=None,
        axis="auto",
        kernel_mask=None,
        **kwargs,
    ):
        _check_layer(layer)
        if data_init:
            raise ValueError(
                "data_init must be False, got True: to initialize from data, build the model, then "
                "call tfwn.data_dependent_init(model, batch) once before training"
            )
        # From these signatures, Keras learns which arguments, masks and shapes to pass.
        if type(self).call is __class__.call:  # type: ignore[name-defined]
            object.__setattr__(self, "call", _with_signature(self.call, layer.call))
        self.build.__signature__ = inspect.signature(layer.build)  # type: ignore[attr-defined]
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        options = {
            "name": layer.name,
            "dtype": layer.dtype_policy,
            "trainable": layer.trainable,
            "autocast": layer.autocast,
        }
        super().__init__(layer, **options | kwargs)
        if not self.trainable:
            layer.trainable = False
        internals.pass_arguments_on(self, layer)
        if weight_names is not None:
            self.weight_names = [weight_names] if isinstance(weight_names, str) else [*weight_names]
        self.axis = axis
        if isinstance(kernel_mask, Mapping):
            self.kernel_mask = {name: np.asarray(mask) for name, mask in kernel_mask.items()}
        elif kernel_mask is not None:
            self.kernel_mask = np.asarray(kernel_mask)
        self.supports_masking = layer.supports_masking
        # Whether data-dependent initialization has set this layer. Saved with the model, but not
        # among its weights, so that arithmetic on weights cannot change it. Created here, so that a
        # checkpoint can be restored before the layer is built.
        if not isinstance(layer, NOT_INITIALIZABLE):
            with tf.init_scope():
                self.initialized = tf.Variable(False, trainable=False, name="initialized")

    def build(self, *shapes, **named_shapes):
        """Builds the layer and creates a g for each of its kernels."""
        if self.normalized:
            raise ValueError(f"{self.name!r} is built already: call it, or build another wrapper")
        internals.build_from_shape(self.layer, *shapes, **named_shapes)
        self._build_shapes = [list(shapes), dict(named_shapes)]
        self.built_while_initializing = is_initializing()
        _check_layer(self.layer)
        found = list(find(self.layer, self._is_weight))
        if not found:
            paths = [variable.path for variable in self.layer.variables]
            raise ValueError(
                f"layer {self.layer.name!r} has no variable to normalize; its variables after "
                f"build() are {paths}: name those to normalize in weight_names, or if there are "
                "none yet, call the layer once before wrapping it"
            )
        self._check_names({v.name for _, v in found})
        for _, v in found:
            check_free(v)
        self._forget_traces()
        # A tuple, because Keras' tracker would wrap a list in one of its own.
        self.normalized = tuple(normalize(self, *one) for one in found)
        wrappers.update((id(one.v), self) for one in self.normalized)
        # tf.train.Checkpoint saves attributes only.
        for i, one in enumerate(self.normalized):
            super().__setattr__("g" if len(found) == 1 else f"g_{i}", one.g)
        if self.initialized is not None and not self.can_initialize():
            del self.initialized  # Removes it from checkpoints, too.
            self.initialized = None

    def _maybe_build(self, call_spec):
        # Keras marks a layer as built even if it could not build it from its saved configuration.
        if not self.normalized:
            self.built = False
            internals.build_by_call(self.layer, call_spec)
        super()._maybe_build(call_spec)

    def _check_names(self, selected):
        """Raises ValueError for names in the arguments that no variable has."""
        names = {v.name for v in self.layer.variables}
        axis = self.axis if isinstance(self.axis, Mapping) else ()
        mask = self.kernel_mask if isinstance(self.kernel_mask, Mapping) else ()
        for argument, unknown in (
            ("weight_names", set(self.weight_names or ()) - selected),
            ("axis", set(axis) - names),
            ("kernel_mask", set(mask) - selected),
        ):
            if unknown:
                raise ValueError(
                    f"{argument} names {', '.join(sorted(unknown))}, which layer "
                    f"{self.layer.name!r} does not have; it has {', '.join(sorted(names))}"
                )

    def _forget_traces(self):
        """Drops traces of the layer's tf.functions, which read its kernels as they were then."""
        internals.check_layer_traces(self.layer)
        internals.forget_layer_traces(self.layer)

    def _is_weight(self, variable) -> bool:
        if self.weight_names is not None:
            return variable.name in self.weight_names
        return is_weight(variable)

    def call(self, *args, **kwargs):
        """Calls the layer with w as its kernels."""
        # Keras traces a model that it builds, before it calls it.
        if is_initializing() and not internals.in_stateless_scope():
            return self._initialize_and_call(*args, **kwargs)
        for one in self.normalized:
            one.check_owner()
        # Computes w in the rematerialized function: its gradients reach only variables and inputs.
        return internals.rematerialized(self.layer, self._call_with_w, args, kwargs)

    def _call_with_w(self, *args, **kwargs):
        with self._reading_w() as scope, internals.without_remat(self.layer):
            outputs = self.layer(*args, **kwargs)
        for loss in scope.own_losses:
            self.add_loss(loss)
        return outputs

    def _reading_w(self, **options) -> Substitution:
        """Returns a scope in which kernels of the layer read as w."""
        return Substitution([(one.v, Reading(one)) for one in self.normalized], **options)

    def _initialize_and_call(self, *args, **kwargs):
        if not self.can_initialize():
            refuse(self.layer)
        with contextlib.ExitStack() as stack:
            for normalized in self.normalized:
                stack.enter_context(initializing_call(self, normalized))
            stack.enter_context(internals.without_remat(self.layer))
            outputs = self.layer(*args, **kwargs)
        self.built_while_initializing = False
        return outputs

    def can_initialize(self) -> bool:
        """Returns whether `tfwn.data_dependent_init` can set g and the bias of this layer."""
        owners = [normalized.owner for normalized in self.normalized]
        return not isinstance(self.layer, NOT_INITIALIZABLE) and all(
            isinstance(o, INITIALIZABLE) and owners.count(o) == 1 for o in owners
        )

    def fold(self) -> keras.layers.Layer:
        """Writes w into the layer's kernels and returns the plain layer under the wrapper's name.

        >>> import keras
        >>> layer = tfwn.keras.WeightNormalization(keras.layers.Dense(2))
        >>> x = tf.ones([1, 3])
        >>> bool(tf.reduce_all(layer(x) == layer.fold()(x)))
        True
        """
        for normalized in self.normalized:
            normalized.check_owner()
        self._forget_traces()
        self.layer.name = self.name
        for normalized in self.normalized:
            wrappers.pop(id(normalized.v), None)
            normalized.fold()
            normalized.v.regularizer = own_regularizer(normalized.v)
        return self.layer

    def quantize(self, mode=None, **kwargs):
        """Raises ValueError, because only the plain layer can be quantized."""
        raise ValueError(
            f"{self.name!r} is weight-normalized: call tfwn.fold first, then quantize() on what it "
            "returns"
        )

    def __getattr__(self, name):
        # Forwards the layer's own attributes, such as `receptive_field`, with w as its kernel.
        layer = vars(self).get("layer")
        if layer is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if isinstance(inspect.getattr_static(type(layer), name, None), property):
            with self._reading_w():
                value = getattr(layer, name)
        else:
            value = getattr(layer, name)
        if inspect.ismethod(value) and value.__self__ is layer:
            return self._method(value)
        normalized = {id(one.v): one for one in self.normalized}
        if any(id(leaf) in normalized for leaf in keras.tree.flatten(value)):
            return keras.tree.map_structure(lambda leaf: normalized.get(id(leaf), leaf), value)
        return value

    def __setattr__(self, name, value):
        # Sets the layer's own attributes, such as `activation`, as __getattr__ reads them. A
        # subclass keeps what is set in it, because it may have attributes with the same names.
        cls = type(self)
        own = cls is not __class__ or name.startswith("_")  # type: ignore[name-defined]
        own = own or name in vars(self) or hasattr(cls, name)
        if own or name not in dir(vars(self).get("layer")):
            super().__setattr__(name, value)
        else:
            setattr(self.layer, name, value)

    def _method(self, method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            with self._reading_w(initialize_variables=True):
                return method(*args, **kwargs)

        return call

    def compute_output_shape(self, *args, **kwargs):
        """Returns the output shape of the layer."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        """Returns the output spec of the layer."""
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_mask(self, *args, **kwargs):
        """Returns the output mask of the layer."""
        return self.layer.compute_mask(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, from which `from_config` recreates the layer without variables."""
        config = super().get_config()
        if not internals.has_own_build(self.layer):
            # It would mark the layer as built, although only a call builds it.
            config["layer"].pop("build_config", None)
        mask = keras.saving.serialize_keras_object(self.kernel_mask)
        config.update(weight_names=self.weight_names, axis=self.axis, kernel_mask=mask)
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Creates a layer from the result of `get_config`."""
        config = dict(config)
        inner = dict(config.pop("layer"))
        if "go_backwards" in config:  # written by keras.layers.Bidirectional
            inner["config"] = dict(inner["config"]) | {"go_backwards": config.pop("go_backwards")}
        axis = config.get("axis", "auto")
        config["axis"] = tuple(axis) if isinstance(axis, list) else axis
        mask = config.get("kernel_mask")
        config["kernel_mask"] = keras.saving.deserialize_keras_object(mask)
        layer = keras.saving.deserialize_keras_object(inner, custom_objects=custom_objects)
        return cls(layer, **config)

    def get_build_config(self):
        """Returns the shapes with which the layer was built."""
        return {"shapes": self._build_shapes} if self.built else None

    def build_from_config(self, config):
        """Builds the layer with the shapes from `get_build_config`, unless it needs a call."""
        shapes, named_shapes = config["shapes"]
        shapes = [_as_shape(shape) for shape in shapes]
        named_shapes = {name: _as_shape(shape) for name, shape in named_shapes.items()}
        internals.build_from_shape(self.layer, *shapes, **named_shapes)
        if not internals.waits_for_call(self.layer):
            self.build(*shapes, **named_shapes)

    def save_own_variables(self, store):
        """Saves g and whether the layer was initialized from data."""
        for i, one in enumerate(self.normalized):
            store[f"g_{i}"] = one.merged_g()
        if self.normalized and self.initialized is not None:
            store["initialized"] = self.initialized

    def load_own_variables(self, store):
        """Loads saved variables, whose names were numbers before the release of tfwn 0.1.0."""
        names = set(store.keys())
        gains = [one.g for one in self.normalized]
        new = {f"g_{i}": g for i, g in enumerate(gains)}
        old = {str(i): g for i, g in enumerate(sorted(gains, key=lambda g: not g.trainable))}
        if gains and self.initialized is not None:
            new["initialized"] = old[str(len(gains))] = self.initialized
        variables = new if names == set(new) else old
        shapes = {name: tuple(store[name].shape) for name in names}
        expected = {name: tuple(variable.shape) for name, variable in variables.items()}
        if shapes != expected:
            raise ValueError(
                f"the file's variables for {self.name!r} have the shapes {shapes}, but those of "
                f"tfwn.keras.WeightNormalization have {expected}: load the file of a folded or "
                "plain model into a plain model, then call tfwn.reparameterize on it"
            )
        for name, variable in variables.items():
            variable.assign(store[name])


def _check_layer(layer):
    """Raises an error if `layer` cannot be wrapped."""
    if not isinstance(layer, keras.layers.Layer):
        refuse_keras_2(layer)
        raise ValueError(f"layer must be a Keras layer, got {layer!r}")
    if isinstance(layer, WeightNormalization):
        raise ValueError(f"layer {layer.name!r} is already weight-normalized: wrap it only once")
    for one in internals.layers_in(layer):
        if isinstance(one, WeightNormalization):
            raise ValueError(f"layer {layer.name!r} contains {one!r}: wrap only one of the two")
        if one.quantization_mode is not None:
            raise ValueError(
                f"layer {one.name!r} has the quantized dtype {one.dtype_policy.name!r}, which v "
                "cannot have: weight-normalize it in a float dtype, then call quantize() on what "
                "tfwn.fold returns"
            )


def _forwarded(name: str) -> property:
    """Returns a property for an attribute of the layer that Keras sets or looks up in the class."""

    def assign(self, value):
        setattr(self.layer, name, value)

    return property(lambda self: getattr(self.layer, name), assign)


for _name in (
    *("go_backwards", "return_sequences", "return_state", "stateful", "unroll"),
    *("zero_output_for_mask", "states", "reset_state"),
    *("state_size", "output_size", "get_initial_state"),
):
    setattr(WeightNormalization, _name, _forwarded(_name))


def _of_cell(name: str):
    """Returns a method with which keras.layers.RNN draws or resets a cell's dropout masks."""

    def call(self, *inputs):
        """Calls the cell's method of this name; returns None if the cell has no dropout masks."""
        if isinstance(self.layer, internals.DropoutRNNCell):
            return getattr(self.layer, name)(*inputs)

    call.__name__ = name
    return call


for _mask in ("dropout_mask", "recurrent_dropout_mask"):
    for _name in (f"get_{_mask}", f"reset_{_mask}"):
        setattr(WeightNormalization, _name, _of_cell(_name))


def _with_signature(function, model):
    @functools.wraps(model)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


def _as_shape(shape):
    """Returns a shape from JSON with its lists converted back to tuples."""
    if isinstance(shape, (list, tuple)):
        return tuple(_as_shape(s) if isinstance(s, (list, tuple)) else s for s in shape)
    return shape
