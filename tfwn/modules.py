"""What a model is made of: tf.Modules, Keras layers, random generators, and their variables."""

import sys
from collections.abc import Iterator
from typing import Any

import tensorflow as tf


def is_keras_layer(value) -> bool:
    """Whether it is a Keras layer or model; Keras is not imported to find out."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(value, keras.layers.Layer)


def refuse_keras_2(value) -> None:
    """Raises for a layer or model of Keras 2, which is a tf.Module of another kind."""
    for cls in type(value).__mro__:
        if cls.__module__.split(".")[0] in ("tf_keras", "tf_keras_internal") or (
            cls.__module__.startswith("keras.src.engine.")
        ):
            raise TypeError(
                f"{type(value).__name__} is of Keras 2 (tf_keras), which tfwn does not support: "
                "make the model with Keras 3 (`import keras`, and no TF_USE_LEGACY_KERAS)"
            )


def attributes(module) -> Iterator[tuple[str, Any]]:
    """The attributes that `module` itself set, without those that TensorFlow keeps in it."""
    for name, value in list(vars(module).items()):
        if not name.startswith("_self_"):
            yield name, value


def check_traces(module, ignored=()) -> None:
    """Refuses a traced tf.function in an attribute: it would go on with what it was traced with."""
    for name, value in attributes(module):
        if (
            name not in ignored
            and isinstance(value, tf.types.experimental.PolymorphicFunction)
            and value.experimental_get_tracing_count()
        ):
            raise ValueError(
                f"the tf.function {name!r} of {type(module).__name__} was traced already and would "
                "go on with the old weights: change the model first, then make and call it"
            )


def forget_traces(module) -> None:
    """Makes the tf.functions among a module's methods trace anew."""
    for cls in type(module).__mro__:
        for value in vars(cls).values():
            if isinstance(value, tf.types.experimental.PolymorphicFunction):
                value._descriptor_cache.pop(module, None)


def submodules(root) -> list:
    """`root` and all tf.Modules, Keras layers and generators in it; lists and dicts too."""
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
    """All variables in `root`, Keras' as the tf.Variables that they hold."""
    found = {}
    for module in submodules(root):
        generator = isinstance(module, tf.random.Generator)
        for variable in [module.state] if generator else module.variables:
            variable = variable if isinstance(variable, tf.Variable) else variable.value
            found[id(variable)] = variable
    return list(found.values())
