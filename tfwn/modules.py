"""Finds a model's submodules (tf.Modules, Keras layers, random generators) and variables."""

import contextlib
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf


def is_keras_layer(value) -> bool:
    """Returns whether `value` is a Keras 3 layer or model, without importing Keras."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(value, keras.layers.Layer)


def refuse_keras_2(model) -> None:
    """Raises TypeError for Keras 2 layers and models, which are tf.Modules but not supported."""
    keras_2 = sys.modules.get("tf_keras")
    layers = [m for m in submodules(model) if keras_2 and isinstance(m, keras_2.layers.Layer)]
    if layers:
        raise TypeError(
            f"{layers[0].name!r} is a {type(layers[0]).__name__} of Keras 2 (tf_keras), which tfwn "
            "cannot normalize: create the model with Keras 3 (import keras, without "
            "TF_USE_LEGACY_KERAS), or use tfwn's own layers, which may be attributes of Keras 2 "
            "layers and models"
        )


def attributes(module) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of the module's attributes, without those that TensorFlow adds."""
    for name, value in list(vars(module).items()):
        if not name.startswith("_self_"):
            yield name, value


def submodules(root) -> list:
    """Returns the tf.Modules, Keras layers and generators in `root`, which may be one itself."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    stack = [root]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, list | tuple):
            stack.extend(reversed(value))
        elif isinstance(value, dict):
            stack.extend(reversed(list(value.values())))
        elif is_keras_layer(value):
            for layer in value._flatten_layers():
                found[id(layer)] = layer
        elif isinstance(value, tf.random.Generator):
            found[id(value)] = value
        elif isinstance(value, tf.Module):
            found[id(value)] = value
            stack.extend(child for _, child in reversed(list(attributes(value))))
    return list(found.values())


def references(model) -> list:
    """Returns what a function refers to: the objects in which it finds its layers, in dicts too.

    These are the global variables that its code names, the variables of its closure, the object of
    a bound method, the arguments of a functools.partial, and the attributes of all these. Functions
    among them are followed, but global ones only within a file. A model is returned in a list.
    """
    found: list = []
    seen: set[int] = set()
    stack = [model]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, functools.partial):
            stack += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, tf.types.experimental.PolymorphicFunction):
            stack.append(value.python_function)
        elif isinstance(value, weakref.ref):  # A method that is a tf.function has its object so.
            stack.append(value())
        elif inspect.ismethod(value):
            stack += [value.__self__, value.__func__]
        elif inspect.isfunction(value):
            stack += _closure(value)
            # Other files' functions would lead through all of their libraries.
            stack += [
                other
                for other in _globals(value)
                if not inspect.isfunction(other) or other.__globals__ is value.__globals__
            ]
        else:
            found.append(value)
            if not isinstance(value, tf.Module | type | types.ModuleType):
                found.append(getattr(value, "__dict__", {}))
    return found


def _closure(function) -> Iterator:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # The variable has no value yet.
            yield cell.cell_contents


def _globals(function) -> Iterator:
    codes = [function.__code__]
    for code in codes:
        yield from (function.__globals__.get(name) for name in code.co_names)
        codes += [value for value in code.co_consts if isinstance(value, types.CodeType)]


def variables(root) -> list[tf.Variable]:
    """Returns all variables in `root`; Keras variables are returned as their tf.Variables."""
    found = {}
    for module in submodules(root):
        generator = isinstance(module, tf.random.Generator)
        for variable in [module.state] if generator else module.variables:
            variable = variable if isinstance(variable, tf.Variable) else variable.value
            found[id(variable)] = variable
    return list(found.values())
