"""Loads weights files of TensorFlow Addons' WeightNormalization into models with tfwn's wrapper."""

import os
from typing import Any

import numpy as np

from tfwn.torch_state_dict import array_norm, array_weight_norm
from tfwn.weight import directed

# With data_init=True, Addons' wrapper also saves an unused copy of the layer under this name.
_COPY = "data_dep_init"


def from_addons(path: str | os.PathLike, model) -> None:
    """Loads a weights file (.h5) of a Keras model with TensorFlow Addons' WeightNormalization.

    `model` must be the same model with `tfwn.keras.WeightNormalization`: its layers with weights
    must be those of the file, in the same order. Addons normalized the kernel, or the recurrent
    kernel of a recurrent layer, over all axes but the last. Where tfwn's wrapper uses another axis,
    as for transposed convolutions, or normalizes more kernels, w is loaded: v = w and g = ||w||.
    With Addons' data_init=True, layers that were initialized when the file was saved are marked as
    initialized.

    Arguments:
      path: the file, from Keras 2's `model.save_weights("weights.h5")` or `model.save("model.h5")`.
      model: the Keras model, built.

    Raises:
      ValueError: if the number of layers differs, a wrapper is not a direct layer of the model, or
        the names or shapes of weights differ. In this case, no layer is changed.

    >>> import keras
    >>> model = keras.Sequential(
    ...     [keras.Input([3]), tfwn.keras.WeightNormalization(keras.layers.Dense(2))]
    ... )
    >>> tfwn.convert.from_addons("weights.h5", model)  # doctest: +SKIP
    """
    import h5py  # Installed with Keras.

    from tfwn.keras import WeightNormalization

    with h5py.File(path) as file:
        group = file.get("model_weights", file)
        names = [_text(name) for name in group.attrs["layer_names"]]
        saved = [(name, _arrays(group[name])) for name in names]
    saved = [(name, arrays) for name, arrays in saved if arrays]
    layers = [layer for layer in model.layers if layer.weights]
    if len(saved) != len(layers):
        raise ValueError(
            f"{path} has {len(saved)} layers with weights, {[name for name, _ in saved]}, but the "
            f"model has {len(layers)}, {[layer.name for layer in layers]}: build the same model"
        )
    values: list[tuple[Any, Any]] = []
    for layer, (name, arrays) in zip(layers, saved, strict=True):
        if isinstance(layer, WeightNormalization):
            values += _of_wrapper(layer, name, arrays)
        elif any(isinstance(one, WeightNormalization) for one in layer._flatten_layers()):
            raise ValueError(
                f"{layer.name!r} contains weight-normalized layers, but only direct layers of the "
                "model can be loaded: load each inner model from a file of its own"
            )
        else:
            variables = layer.trainable_weights + layer.non_trainable_weights
            if len(variables) != len(arrays):
                raise ValueError(
                    f"{layer.name!r} has {len(variables)} weights, but {name!r} in the file has "
                    f"{len(arrays)}"
                )
            values += [(v, array) for v, (_, array) in zip(variables, arrays, strict=True)]
    for variable, array in values:
        if tuple(variable.shape) != array.shape:
            raise ValueError(
                f"{variable.name} has shape {tuple(variable.shape)} in the model but {array.shape} "
                "in the file"
            )
    for variable, array in values:
        variable.assign(array)


def _arrays(group) -> list[tuple[str, np.ndarray]]:
    """Returns the names and values of a layer's weights, in the order Keras 2 saved them."""
    names = [_text(name) for name in group.attrs["weight_names"]]
    return [(name, np.asarray(group[name])) for name in names]


def _text(name) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _of_wrapper(wrapper, name, arrays) -> list[tuple[Any, Any]]:
    own = {
        path.rpartition("/")[2].partition(":")[0]: array
        for path, array in arrays
        if _COPY not in path.split("/")
    }
    if "g" not in own or "initialized" not in own:
        raise ValueError(
            f"{wrapper.name!r} is weight-normalized, but {name!r} in the file is not: it contains "
            f"{sorted(own)}"
        )
    started = bool(own.pop("initialized"))
    g = own.pop("g")
    normalized = "recurrent_kernel" if "recurrent_kernel" in own else "kernel"
    values: list[tuple[Any, Any]] = []
    for variable in wrapper.layer.weights:
        if variable.name not in own:
            raise ValueError(f"{name!r} in the file has no {variable.name}, only {sorted(own)}")
        v = own.pop(variable.name)
        one = next((n for n in wrapper.normalized if n.v is variable), None)
        last = (v.ndim - 1,)
        # Addons' wrapper set g only in its first call.
        own_g = g if started else array_norm(v, last).reshape(-1)
        if variable.name == normalized and (one is None or one.axis != last):
            v = array_weight_norm(v, own_g, last)
        if one is not None:
            plain = variable.name != normalized or one.axis != last
            kept = [v.shape[a] for a in one.axis]
            g_of_v = array_norm(v, one.axis).reshape(kept) if plain else own_g
            v, own_g = map(np.asarray, directed(v, g_of_v, one.axis, one.mask))
            values.append((one.g, own_g))
        values.append((variable, v))
    if own:
        raise ValueError(f"{wrapper.name!r} has no {sorted(own)}, but {name!r} in the file does")
    if wrapper.initialized is not None:
        with_data = any(_COPY in path.split("/") for path, _ in arrays)
        values.append((wrapper.initialized, np.asarray(started and with_data)))
    return values
