"""How a model is saved that is no longer what its own class makes: with what was done to it.

The constructor of a user's class makes its layers anew when a .keras file is loaded: plain ones of
a model that was reparameterized, or wrapped ones of a layer that was folded. Such an object gets a
subclass of its class that differs in one thing: the file names the change, to make it again.
"""

import functools
import importlib
from typing import Any

import keras

from tfwn.keras.internals import makes_its_layers

_NAMES = {"reparameterize": "Reparameterized", "fold": "Folded"}


def remember(layer: keras.layers.Layer, change: str) -> None:
    """Makes files of the layer name the change, unless it undoes the one before."""
    cls: Any = type(layer)
    if issubclass(cls, _Changed):
        if cls.change != change:
            layer.__class__ = cls.original
    elif makes_its_layers(cls):
        layer.__class__ = _changed_class(cls, change)


class _Changed:
    """A layer whose class was another one: `original`, before the `change`."""

    original: type
    change: str

    def get_config(self):
        """What the layer was made from, and is saved as."""
        changed = type(self)
        self.__class__ = changed.original
        try:
            config = keras.saving.serialize_keras_object(self)
        finally:
            self.__class__ = changed
        config.pop("compile_config", None)  # It goes with the changed layer.
        return {"layer": config}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes the layer, and the change."""
        layer = keras.saving.deserialize_keras_object(config["layer"], custom_objects)
        change = getattr(importlib.import_module("tfwn.keras.reparameterize"), cls.change)
        return change(layer, required=False)


@functools.cache
def _changed_class(original, change: str):
    members = {
        "original": original,
        "change": change,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    cls = type(original.__name__, (_Changed, original), members)
    return keras.saving.register_keras_serializable(package="tfwn", name=_NAMES[change])(cls)


for _change in _NAMES:
    _changed_class(keras.Model, _change)  # So that files can be loaded: all have one from_config.
