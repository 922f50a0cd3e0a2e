"""Saves a model that was changed after its construction, together with the change.

When a .keras file is loaded, the constructor of a user's class creates its original layers: plain
layers for a model that was reparameterized, or wrapped layers for one that was folded. Such an
object therefore gets a subclass of its class that records the change in the file, and makes it
again when the file is loaded.
"""

import functools
import importlib
from typing import Any

import keras

from tfwn.keras.internals import makes_its_layers, unpickle

_KEY = "tfwn.original"  # No config of a user's class has this key.
_NAMES = {"reparameterize": "Reparameterized", "fold": "Folded"}


def remember(layer: keras.layers.Layer, change: str) -> None:
    """Makes files of the layer record the change, or forget the previous one if this undoes it."""
    cls: Any = type(layer)
    if issubclass(cls, _Changed):
        if cls.change != change:
            layer.__class__ = cls.original
    elif makes_its_layers(cls):
        layer.__class__ = _changed_class(cls, change)


class _Changed:
    """A layer whose class was `original` before the `change`."""

    original: Any
    change: str

    def get_config(self):
        """Returns the config of the original layer."""
        changed = type(self)
        self.__class__ = changed.original
        try:
            config = keras.saving.serialize_keras_object(self)
        finally:
            self.__class__ = changed
        config.pop("compile_config", None)  # It belongs to the changed layer.
        return {_KEY: config}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Creates the original layer and makes the change."""
        if _KEY not in config:  # Keras took this class, which has the same name, for the original.
            return cls.original.from_config(config)
        # For clone_model, which needs no registered class and calls this class itself.
        objects = {cls.original.__name__: cls.original} | (custom_objects or {})
        layer = keras.saving.deserialize_keras_object(config[_KEY], objects)
        change = getattr(importlib.import_module("tfwn.keras.reparameterize"), cls.change)
        return change(layer, required=False)

    def __reduce__(self):
        """Pickles like Keras, but names no class: pickle finds only the original one."""
        return unpickle, super().__reduce__()[1]


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
    cls = keras.saving.register_keras_serializable(package="tfwn", name=_NAMES[change])(cls)
    # Files name all changed classes alike, and are loaded with the one of keras.Model.
    name = keras.saving.get_registered_name(cls)
    loader = cls if original is keras.Model else _changed_class(keras.Model, change)
    keras.saving.get_custom_objects()[name] = loader
    return cls


for _change in _NAMES:
    _changed_class(keras.Model, _change)
