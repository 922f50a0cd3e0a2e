"""The parts of a model: tf.Modules, Keras layers, random generators, and their variables."""

import sys
from collections.abc import Iterator
from typing import Any

import tensorflow as tf


def is_keras_layer(value) -> bool:
    """Whether `value` is a layer or model of Keras 3, which is not imported for this."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(value, keras.layers.Layer)


def refuse_keras_2(model) -> None:
    """Raises an error for layers and models of Keras 2, which are tf.Modules of their own kind."""
    keras_2 = sys.modules.get("tf_keras")
    layers = [m for m in submodules(model) if keras_2 and isinstance(m, keras_2.layers.Layer)]
    if layers:
        raise TypeError(
            f"{layers[0].name!r} is a {type(layers[0]).__name__} of Keras 2 (tf_keras), which tfwn "
            "cannot normalize: make the model with Keras 3 (import keras, without "
            "TF_USE_LEGACY_KERAS), or with tfwn's own layers, which layers and models of Keras 2 "
            "can have as attributes"
        )


def attributes(module) -> Iterator[tuple[str, Any]]:
    """Yields the attributes that `module` itself set, without those that TensorFlow added."""
    for name, value in list(vars(module).items()):
        if not name.startswith("_self_"):
            yield name, value


def submodules(root) -> list:
    """Returns `root` and the tf.Modules, Keras layers and generators in it; lists and dicts too."""
    found: dict[int, Any] = {}
    stack = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, list | tuple):
            stack.extend(reversed(value))
        elif isinstance(value, dict):
            stack.extend(reversed(list(value.values())))
        elif id(value) in found:
            continue
        elif is_keras_layer(value):
            for layer in value._flatten_layers():
                found.setdefault(id(layer), layer)
        elif isinstance(value, tf.random.Generator):
            found[id(value)] = value
        elif isinstance(value, tf.Module):
            found[id(value)] = value
            stack.extend(child for _, child in reversed(list(attributes(value))))
    return list(found.values())


def variables(root) -> list[tf.Variable]:
    """Returns all variables in `root`; those of Keras as the tf.Variables that they hold."""
    found = {}
    for module in submodules(root):
        generator = isinstance(module, tf.random.Generator)
        for variable in [module.state] if generator else module.variables:
            variable = variable if isinstance(variable, tf.Variable) else variable.value
            found[id(variable)] = variable
    return list(found.values())
