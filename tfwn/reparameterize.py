"""reparameterize: replaces w with v and g in an existing model. fold: changes them back to w."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfwn.layer import Layer
from tfwn.modules import attributes, is_keras_layer, refuse_keras_2, submodules
from tfwn.normalized_variable import NormalizedVariable
from tfwn.ops import weight_norm
from tfwn.traces import check_traces, forget_traces
from tfwn.weight import Weight, check_axis, masked

# Variables of rank 2 and more with these names are not weights.
_NOT_WEIGHTS = ("b", "bias", "offset", "scale", "beta", "gamma")


def reparameterize(
    model,
    *,
    select: Callable[[tf.Variable], bool] | None = None,
    axis: int | Sequence[int] | Callable[[tf.Variable], Any] | str | None = "auto",
    kernel_mask: Callable[[Any], Any] | None = None,
):
    """Weight-normalizes the weights of an existing model in place: v = w and g = ||w||.

        w = g * v / ||v||                                                   (paper, eq. 2)

    The model's outputs are unchanged, up to the rounding of one product. Its weight variables
    become v, and each gets a new variable g. A unit with w = 0 gets a random direction v and g = 0,
    so that it can learn. `fold` is the inverse.

    - In a tf.Module (from Sonnet or your own), an attribute that holds a variable w is replaced
      with an object that TensorFlow converts to the tensor w = g * v / ||v||, so the module's own
      code runs unchanged. This includes variables in lists, tuples and dicts. Keras layers in the
      module are changed as in a Keras model.
    - tfwn's own layers switch from the parameterization "normal" to "weight_norm".
    - In a Keras model of any kind, layers are wrapped in `tfwn.keras.WeightNormalization`, in
      place, and a built optimizer loses its state. A single Keras layer is returned in its
      wrapper.

    Arguments:
      model: the model, after its first call, so that its variables exist. Its methods that are
        tf.functions are retraced. A tf.function outside the model keeps the old w if it is already
        traced, so call `reparameterize` before tracing it.
      select: for tf.Modules, a function that returns whether a variable is a weight. Default:
        trainable variables of rank 2 or more whose units have more than one element and whose name
        is not "b", "bias", "offset", "scale", "beta" or "gamma".
      axis: for tf.Modules, the axis or axes of w that index its units, see `tfwn.weight_norm`, or a
        function that returns them for a variable. Default: depends on the class name of the module:
        -2 if it contains "Transpose", (-2, -1) for "Depthwise", 0 for "Embed", otherwise -1.
      kernel_mask: a function that returns the mask of a variable w of a tf.Module or Keras layer:
        an array that broadcasts to w, or None. The mask multiplies v before the normalization, so w
        is 0 where the mask is 0. tfwn's own layers take `kernel_mask` when they are created.

    Returns:
      `model` itself, or the wrapper if it is a single Keras layer.

    Raises:
      ValueError: if no weight is found, an axis or mask is invalid, `kernel_mask` returns no mask,
        a layer of tfwn or Keras has no variables yet, `select` or `axis` is passed and the model
        contains a Keras layer to wrap, or an attribute of the model holds a tf.function that is
        already traced. In this case, nothing is changed.
      TypeError: if the model contains layers of Keras 2.

    >>> class Linear(tf.Module):
    ...     def __init__(self):
    ...         self.w = tf.Variable([[3.0, 0.0], [4.0, 1.0]])
    ...     def __call__(self, x):
    ...         return x @ self.w
    >>> model = tfwn.reparameterize(Linear())
    >>> model.w.g.numpy()
    array([5., 1.], dtype=float32)
    >>> model(tf.ones([1, 2])).numpy()
    array([[7., 1.]], dtype=float32)
    >>> tfwn.fold(model).w.numpy()
    array([[3., 0.],
           [4., 1.]], dtype=float32)
    """
    chosen = select is not None or not (isinstance(axis, str) and axis == "auto")
    if is_keras_layer(model):
        if chosen:
            raise _only_for_modules(model)
        return _keras_module().reparameterize(model, kernel_mask)
    _check_module("reparameterize", model)
    refuse_keras_2(model)
    masks: list = []

    def mask_of(variable):
        masks.append(kernel_mask(variable) if kernel_mask else None)
        return masks[-1]

    walk = _Walk(model, lambda owner, value: _normalized(owner, value, select, axis, mask_of))
    weights = walk.weights("normal")
    to_wrap = _with_plain_kernels(walk.keras_layers)
    if chosen and to_wrap:
        raise _only_for_modules(to_wrap[0])
    if not (weights or walk.replaced or to_wrap):
        names = [variable.name for variable in model.variables]
        raise ValueError(
            f"reparameterize found no weight in {type(model).__name__}, whose variables are {names}"
            ": call the module once to create its variables, or choose its weights with `select`"
        )
    no_mask = kernel_mask is not None and all(mask is None for mask in masks)
    if no_mask and not to_wrap:
        raise ValueError("kernel_mask returned no mask for any weight")
    for weight in weights:
        weight.check_g(weight.get_g())
    walk.change_keras(
        lambda layers: _keras_module().reparameterize(
            layers, mask_of if kernel_mask else None, required=no_mask
        )
    )
    walk.change()
    for _, variable in walk.replaced:
        variable.assign_v_and_g(variable.v, variable.g)
    for weight in weights:
        _set_weight_norm(weight)
    return model


def fold(model):
    """Folds v and g back into w, in place; the inverse of `reparameterize`.

    The model then has plain variables w = g * v / ||v|| and uses only TensorFlow's own operations.
    Its outputs are unchanged, and its SavedModel loads and serves where tfwn is not installed.

    Arguments:
      model: a tf.Module (tfwn's own layers change to the parameterization "normal"), or a Keras
        layer or model that contains `tfwn.keras.WeightNormalization`.

    Returns:
      `model` itself, or the wrapped layer if it is a `tfwn.keras.WeightNormalization`.

    Raises:
      ValueError: if nothing in the model is weight-normalized, a layer of tfwn or Keras has no
        variables yet, or an attribute of the model holds a tf.function that is already traced. In
        this case, nothing is changed.

    >>> layer = tfwn.Dense(2)
    >>> x = tf.ones([1, 3])
    >>> y = layer(x)
    >>> folded = tfwn.fold(layer)
    >>> bool(tf.reduce_all(folded(x) == y)), [v.shape.as_list() for v in folded.trainable_variables]
    (True, [[2], [3, 2]])
    """
    if is_keras_layer(model):
        return _keras_module().fold(model)
    _check_module("fold", model)
    walk = _Walk(model, _folded)
    weights = walk.weights("weight_norm")
    wrapped = _wrappers(walk.keras_layers)
    if not (weights or walk.replaced or wrapped):
        refuse_keras_2(model)
        raise ValueError(f"fold found nothing weight-normalized in {type(model).__name__}")
    if wrapped:
        walk.change_keras(_keras_module().fold)
    walk.change()
    for normalized, v in walk.replaced:
        v.assign(normalized.value())
    for weight in weights:
        _set_normal(weight)
    return model


class _Walk:
    """Finds the values in a model's attributes for which `replace` returns others.

    Nothing is changed before `change_keras`, which changes all or nothing, and `change`, which
    cannot fail.
    """

    def __init__(self, model: tf.Module, replace: Callable[[Any, Any], Any]):
        self._model = model
        self._replace = replace
        # Includes the old value, because its id could be reused if it were garbage collected.
        self._values: dict[int, tuple[Any, Any]] = {}
        self.replaced: list[tuple[Any, Any]] = []
        self.keras_layers: list = []
        self._modules = [m for m in submodules(model) if isinstance(m, tf.Module)]
        # tfwn's own layers keep their parameters in Weights, which are changed separately.
        self._owners = [
            m for m in self._modules if not isinstance(m, Layer | Weight | NormalizedVariable)
        ]
        for module in self._modules:
            check_traces(module)
        for owner in self._owners:
            for _, value in attributes(owner):
                self._find(owner, value)

    def _find(self, owner, value) -> None:
        if isinstance(value, list | tuple):
            for item in value:
                self._find(owner, item)
        elif isinstance(value, dict):
            self._find(owner, list(value.values()))
        elif id(value) not in self._values:
            keras = is_keras_layer(value)
            new = value if keras else self._replace(owner, value)
            self._values[id(value)] = value, new
            if keras:
                self.keras_layers.append(value)
            elif new is not value:
                self.replaced.append((value, new))

    def weights(self, parameterization: str) -> list[Weight]:
        """Returns the weights of tfwn's layers that have this parameterization."""
        for module in self._modules:
            options = getattr(module, "_weight_options", {})
            if (
                isinstance(module, Layer)
                and not module._built
                and options.get("parameterization") == parameterization
            ):
                raise ValueError(
                    f"the layer {module.name!r} in {type(self._model).__name__} has no variables "
                    "yet: call the model once, or call layer.build(input_shape)"
                )
        weights = [m for m in self._modules if isinstance(m, Weight)]
        return [weight for weight in weights if weight.parameterization == parameterization]

    def change_keras(self, change: Callable[[Any], Any]) -> None:
        """Changes the Keras layers as parts of one Keras model, so that an error changes none."""
        if not self.keras_layers:
            return
        import keras

        whole = keras.Model(name=type(self._model).__name__)
        whole.parts = self.keras_layers
        change(whole)
        for old, new in zip(self.keras_layers, whole.parts, strict=True):
            self._values[id(old)] = old, new

    def change(self) -> None:
        """Replaces the values and drops earlier traces."""
        for module in self._modules:
            forget_traces(module)
        for owner in self._owners:
            for name, value in attributes(owner):
                new = self._new(value)
                if new is not value:
                    setattr(owner, name, new)

    def _new(self, value):
        if isinstance(value, list | tuple):
            items = [self._new(item) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            if hasattr(value, "_make"):
                return value._make(items)  # Not type(value), which may be TensorFlow's wrapper.
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, dict):
            changed = {key: self._new(item) for key, item in value.items()}
            if all(changed[key] is value[key] for key in changed):
                return value
            table = copy.copy(value)  # Keeps the type, such as defaultdict.
            table.update(changed)
            return table
        return self._values.get(id(value), (value, value))[1]


def _normalized(owner, value, select, axis, mask_of):
    """Returns the replacement of an attribute's value, or the value if it is not a weight."""
    if not isinstance(value, tf.Variable) or not (select or _may_be_weight)(value):
        return value
    if callable(axis):
        axis = axis(value)
    elif isinstance(axis, str) and axis == "auto":
        axis = _unit_axis(type(owner).__name__)
    axis = check_axis(axis, value.shape.rank)
    units = math.prod(value.shape[a] for a in axis)
    if select is None and value.shape.num_elements() <= units:
        return value
    return NormalizedVariable(value, axis, mask_of(value))


def _folded(owner, value):
    return value.v if isinstance(value, NormalizedVariable) else value


def _may_be_weight(variable: tf.Variable) -> bool:
    name = variable.name.rpartition("/")[2].partition(":")[0]
    return (
        variable.trainable
        and variable.dtype.is_floating
        and variable.shape.rank >= 2
        and name not in _NOT_WEIGHTS
    )


def _unit_axis(class_name: str):
    if "Transpose" in class_name:
        return -2
    if "Depthwise" in class_name:
        return (-2, -1)
    return 0 if "Embed" in class_name else -1


def _set_weight_norm(weight: Weight) -> None:
    w, g = weight.w, weight.get_g()
    del weight.w
    weight.make_v_and_g(tf.convert_to_tensor(w), g, variable=w)
    weight.parameterization = "weight_norm"


def _set_normal(weight: Weight) -> None:
    v = weight.v
    w = weight_norm(masked(v, weight.mask), weight.get_g(), weight.axis)
    del weight.v
    delattr(weight, "s" if weight.exponential_g else "g")
    weight.w = v
    weight.w.assign(w)
    weight.parameterization = "normal"


def _check_module(name, model):
    if not isinstance(model, tf.Module):
        raise ValueError(f"{name} needs a tf.Module or a Keras layer, got {model!r}")


def _only_for_modules(layer) -> ValueError:
    return ValueError(
        f"select and axis are for tf.Modules, but there is the Keras layer {layer.name!r}: first "
        "wrap it with tfwn.keras.WeightNormalization(layer, weight_names=..., axis=...)"
    )


def _wrappers(keras_layers) -> list:
    """Returns the `tfwn.keras.WeightNormalization` among Keras layers and the layers in them."""
    if not keras_layers:
        return []
    from tfwn.keras import WeightNormalization

    return [one for one in submodules(keras_layers) if isinstance(one, WeightNormalization)]


def _with_plain_kernels(keras_layers) -> list:
    """Returns the Keras layers that have a kernel outside of a wrapper."""
    if not keras_layers:
        return []
    from tfwn.keras.normalized import find, is_weight

    wrapped = {id(one) for one in submodules(_wrappers(keras_layers))}
    return [
        layer
        for layer in keras_layers
        if any(id(owner) not in wrapped for owner, _ in find(layer, is_weight))
    ]


def _keras_module():
    from tfwn.keras import reparameterize as keras_reparameterize

    return keras_reparameterize
