"""reparameterize: replaces w with v and g in an existing model. fold: changes them back to w."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfwn.layer import Layer
from tfwn.modules import (
    attributes,
    is_keras_layer,
    refuse_keras_2,
    submodules,
)
from tfwn.normalized_variable import NormalizedVariable
from tfwn.ops import weight_norm
from tfwn.traces import check_traces, forget_traces
from tfwn.weight import Weight, masked

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
      code runs unchanged. This includes variables in lists, tuples and dicts.
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
        a Keras model is not built, `select` or `axis` is passed for one, or an attribute of the
        model holds a tf.function that is already traced.
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
    if is_keras_layer(model):
        if select is not None or not (isinstance(axis, str) and axis == "auto"):
            raise ValueError(
                "select and axis are for tf.Modules: for a Keras layer, pass weight_names and axis "
                "to tfwn.keras.WeightNormalization(layer)"
            )
        return _keras_module().reparameterize(model, kernel_mask)
    _check_module("reparameterize", model)
    refuse_keras_2(model)
    masks: list = []

    def mask_of(variable):
        masks.append(kernel_mask(variable) if kernel_mask else None)
        return masks[-1]

    walk = _Walk(lambda owner, value: _normalized(owner, value, select, axis, mask_of))
    walk.find(model)
    weights = [m for m in walk.modules if isinstance(m, Weight) and m.parameterization == "normal"]
    if not weights and not walk.changes:
        names = [variable.name for variable in model.variables]
        raise ValueError(
            f"reparameterize found no weight in {type(model).__name__}, whose variables are {names}"
            ": call the module once to create its variables, or choose its weights with `select`"
        )
    if kernel_mask and all(mask is None for mask in masks):
        raise ValueError("kernel_mask returned no mask for any weight")
    for weight in weights:
        weight.check_g(weight.get_g())
    walk.change()
    for variable in walk.new:
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
      ValueError: if nothing in the model is weight-normalized, or an attribute of the model holds a
        tf.function that is already traced.

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
    walk = _Walk(_folded)
    walk.find(model)
    weights = [
        m for m in walk.modules if isinstance(m, Weight) and m.parameterization == "weight_norm"
    ]
    if not weights and not walk.changes:
        refuse_keras_2(model)
        raise ValueError(f"fold found nothing weight-normalized in {type(model).__name__}")
    walk.change()
    for weight in weights:
        _set_normal(weight)
    return model


class _Walk:
    """Finds the attributes of a model's modules for which `replace` returns another value."""

    def __init__(self, replace: Callable[[Any, Any], Any]):
        self._replace = replace
        # Includes the old value, because its id could be reused if it were garbage collected.
        self._replaced: dict[int, tuple[Any, Any]] = {}
        self.modules: list = []
        self.changes: list[tuple[Any, str, Any]] = []

    @property
    def new(self) -> list[NormalizedVariable]:
        """The normalized variables that `replace` created."""
        made = [new for old, new in self._replaced.values() if new is not old]
        return [new for new in made if isinstance(new, NormalizedVariable)]

    def find(self, model) -> None:
        """Collects the changes without making them."""
        self.modules = [m for m in submodules(model) if isinstance(m, tf.Module)]
        for module in self.modules:
            # tfwn's own layers keep their parameters in Weights, which are changed separately.
            if isinstance(module, Layer | Weight | NormalizedVariable):
                continue
            for name, value in attributes(module):
                new = self._new(module, value)
                if new is not value:
                    self.changes.append((module, name, new))

    def _new(self, owner, value):
        if isinstance(value, list | tuple):
            items = [self._new(owner, item) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            if hasattr(value, "_fields"):
                return type(value)(*items)
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, dict):
            table = {key: self._new(owner, item) for key, item in value.items()}
            return value if all(table[key] is value[key] for key in table) else table
        if id(value) not in self._replaced:
            self._replaced[id(value)] = value, self._replace(owner, value)
        return self._replaced[id(value)][1]

    def change(self) -> None:
        """Makes the changes and drops earlier traces."""
        for module in self.modules:
            check_traces(module)
        for module in self.modules:
            forget_traces(module)
        for module, name, new in self.changes:
            setattr(module, name, new)


def _normalized(owner, value, select, axis, mask_of):
    """Returns the replacement of an attribute's value, or the value if it is not a weight."""
    if is_keras_layer(value):
        return _keras_module().reparameterize(value, mask_of, required=False)
    if not isinstance(value, tf.Variable) or not (select or _is_weight)(value):
        return value
    if callable(axis):
        axis = axis(value)
    elif isinstance(axis, str) and axis == "auto":
        axis = _unit_axis(type(owner).__name__)
    return NormalizedVariable(value, axis, mask_of(value))


def _folded(owner, value):
    if is_keras_layer(value):
        return _keras_module().fold(value, required=False)
    if not isinstance(value, NormalizedVariable):
        return value
    value.v.assign(value.value())
    return value.v


def _is_weight(variable: tf.Variable) -> bool:
    name = variable.name.rpartition("/")[2].partition(":")[0]
    return (
        variable.trainable
        and variable.dtype.is_floating
        and variable.shape.rank >= 2
        and variable.shape.num_elements() > variable.shape[-1]
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


def _keras_module():
    from tfwn.keras import reparameterize as keras_reparameterize

    return keras_reparameterize
