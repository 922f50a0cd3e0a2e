"""reparameterize: from w to v and g, in a model that exists already; fold: back to w."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfwn.layer import Layer
from tfwn.modules import (
    attributes,
    check_traces,
    forget_traces,
    is_keras_layer,
    refuse_keras_2,
    submodules,
)
from tfwn.ops import weight_norm
from tfwn.weight import Weight, check_axis, norm

# Variables of rank 2 and more that are called so are not weights.
_NOT_WEIGHTS = ("b", "bias", "offset", "scale", "beta", "gamma")


def reparameterize(
    model,
    *,
    select: Callable[[tf.Variable], bool] | None = None,
    axis: int | Sequence[int] | Callable[[tf.Variable], Any] | str | None = "auto",
):
    """Weight-normalizes the weights of a model that exists, in place: g = ||w|| and v = w.

        w = g * v / ||v||                                                   (paper, eq. 2)

    The model computes what it did, to the rounding of one product. Its weight variables become v;
    there is a new g for each. `fold` is the inverse.

    - A tf.Module, of Sonnet or your own: an attribute that held a variable w holds an object that
      converts to the tensor w = g * v / ||v|| wherever TensorFlow wants a tensor, so that the
      module's own code runs unchanged. Lists, tuples and dicts of variables too.
    - A layer of tfwn with parameterization "normal" gets "weight_norm".
    - The layers of a Keras model of any kind are put in `tfwn.keras.WeightNormalization`, in place; a
      built optimizer is made anew. A single Keras layer is returned in its wrapper.

    Arguments:
      model: the model, called once before, so that its variables exist. A tf.function of yours that
        called it earlier goes on with the old w: call this before it is traced. Those that are
        methods of the model are traced anew.
      select: for tf.Modules, whether a variable is a weight. Default: trainable ones of rank 2 and
        more whose units have more than one element, and whose name does not say otherwise ("b",
        "bias", "offset", "scale", "beta", "gamma").
      axis: for tf.Modules, the axis or axes of w that index its units, see `tfwn.weight_norm`, or a
        function of the variable that returns them. Default: by the name of the module's class, the
        last but one for "Transpose", the last two for "Depthwise", 0 for "Embed", else the last.

    Returns:
      `model` itself, or for a single Keras layer its wrapper.

    Raises:
      ValueError: no weight was found; a bad axis; a Keras model that is not built, or `select` or
        `axis` for one; a tf.function in an attribute of the model that was traced before.

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
                "select and axis are for tf.Modules: for a Keras layer give weight_names and axis "
                "to tfwn.keras.WeightNormalization(layer)"
            )
        return _keras_module().reparameterize(model)
    _check_module("reparameterize", model)
    walk = _Walk(lambda owner, value: _normalized(owner, value, select, axis))
    walk.find(model)
    weights = [m for m in walk.modules if isinstance(m, Weight) and m.parameterization == "normal"]
    if not weights and not walk.changes:
        names = [variable.name for variable in model.variables]
        raise ValueError(
            f"reparameterize found no weight in {type(model).__name__}, whose variables are {names}"
            ": call the module once so that it makes them, or say by select which are weights"
        )
    walk.change()
    for weight in weights:
        _set_weight_norm(weight)
    return model


def fold(model):
    """Folds v and g back into w, in place; the inverse of `reparameterize`.

    What is left are plain variables, w = g * v / ||v||, and TensorFlow's own operations: a
    SavedModel of it loads and serves where tfwn is not installed. It computes what the model did.

    Arguments:
      model: a tf.Module (tfwn's own layers get the parameterization "normal"), or a Keras layer or
        model with `tfwn.keras.WeightNormalization` in it.

    Returns:
      `model` itself, or for `tfwn.keras.WeightNormalization` the layer in it.

    Raises:
      ValueError: nothing in the model is weight-normalized; a tf.function in an attribute of the
        model that was traced before.

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
        raise ValueError(f"fold found nothing weight-normalized in {type(model).__name__}")
    walk.change()
    for weight in weights:
        _set_normal(weight)
    return model


class NormalizedVariable(tf.Module):
    """In the place of a variable w: holds v and g, and converts to the tensor w = g * v / ||v||."""

    def __init__(self, v: tf.Variable, axis):
        super().__init__(name="normalized")
        self.v = v
        self.axis = check_axis(axis, v.shape.rank)
        strategy = getattr(v, "distribute_strategy", None)
        with strategy.scope() if strategy else contextlib.nullcontext():
            self.g = tf.Variable(norm(v, self.axis), trainable=v.trainable, name="g")

    def value(self) -> tf.Tensor:
        """Returns w."""
        return weight_norm(self.v, self.g, self.axis)

    read_value = value

    def assign(self, w) -> None:
        """Makes `w` the value: v = w and g = ||w||."""
        self.v.assign(w)
        self.g.assign(norm(self.v, self.axis))

    @property
    def shape(self) -> tf.TensorShape:
        """Of w."""
        return self.v.shape

    @property
    def dtype(self) -> tf.DType:
        """Of w."""
        return self.v.dtype

    def numpy(self):
        """Returns w as an array."""
        return self.value().numpy()

    def __array__(self, dtype=None, copy=None):
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __tf_tensor__(self, dtype=None, name=None):
        return tf.convert_to_tensor(self.value(), dtype=dtype, name=name)


def _operator(name):
    return lambda self, *arguments: getattr(self.value(), name)(*arguments)


for _name in tf.Tensor.OVERLOADABLE_OPERATORS - {"__eq__", "__ne__"}:
    setattr(NormalizedVariable, _name, _operator(_name))


class _Walk:
    """Finds, in all modules of a model, the attributes that `replace` makes others of."""

    def __init__(self, replace: Callable[[Any, Any], Any]):
        self._replace = replace
        self._replaced: dict[int, Any] = {}
        self.modules: list = []
        self.changes: list[tuple[Any, str, Any]] = []

    def find(self, model) -> None:
        """Collects what is to change, and changes nothing."""
        self.modules = [m for m in submodules(model) if isinstance(m, tf.Module)]
        for module in self.modules:
            refuse_keras_2(module)
            # The parameters of tfwn's own layers are in their Weights.
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
            self._replaced[id(value)] = self._replace(owner, value)
        return self._replaced[id(value)]

    def change(self) -> None:
        """Makes the changes, and drops what was traced before."""
        for module in self.modules:
            check_traces(module)
        for module in self.modules:
            forget_traces(module)
        for module, name, new in self.changes:
            setattr(module, name, new)


def _normalized(owner, value, select, axis):
    """What takes the place of an attribute's value."""
    if is_keras_layer(value):
        return _keras_module().reparameterize(value, required=False)
    if not isinstance(value, tf.Variable) or not (select or _is_weight)(value):
        return value
    if callable(axis):
        axis = axis(value)
    elif isinstance(axis, str) and axis == "auto":
        axis = _unit_axis(type(owner).__name__)
    return NormalizedVariable(value, axis)


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
    g = weight.get_g()
    v = weight.w
    del weight.w
    weight.v = v
    strategy = getattr(v, "distribute_strategy", None)
    with strategy.scope() if strategy else contextlib.nullcontext(), weight.name_scope:
        if weight.exponential_g:
            weight.s = tf.Variable(g, name="s")
        else:
            weight.g = tf.Variable(g, name="g")
    weight.parameterization = "weight_norm"
    weight.set_g(g)


def _set_normal(weight: Weight) -> None:
    v = weight.v
    w = weight_norm(v if weight.mask is None else v * weight.mask, weight.get_g(), weight.axis)
    del weight.v
    delattr(weight, "s" if weight.exponential_g else "g")
    weight.w = v
    weight.parameterization = "normal"
    weight.assign(w)


def _check_module(name, model):
    if not isinstance(model, tf.Module):
        raise ValueError(f"{name} needs a tf.Module or a Keras layer, got {model!r}")


def _keras_module():
    from tfwn.keras import reparameterize as keras_reparameterize

    return keras_reparameterize
