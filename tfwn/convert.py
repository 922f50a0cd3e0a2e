"""Converts weights: named arrays, PyTorch state dicts, files of TensorFlow Addons."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tfwn.addons_weights import from_addons
from tfwn.torch_state_dict import array_norm, array_weight_norm, as_array, from_torch, to_torch
from tfwn.weight import check_axis

__all__ = ["from_addons", "from_torch", "to_normal", "to_torch", "to_weight_norm"]


def to_weight_norm(
    weights: Mapping[str, Any],
    axis: int | Sequence[int] | Callable[[str], Any] | None = -1,
    *,
    select: Callable[[str], bool] | None = None,
) -> dict[str, np.ndarray]:
    """Splits each named weight w into v = w, under name + "/v", and g = ||w||, under name + "/g".

    Arguments:
      weights: arrays by name.
      axis: the axis or axes that index units, as for `tfwn.weight_norm`, or a function of the name
        that returns them.
      select: a function of the name that returns whether the array is a weight. Default:
        floating-point arrays of rank 2 or more are weights.

    Returns:
      A new dict. It contains all other arrays unchanged. `to_normal` is the inverse.

    Raises:
      ValueError: if an axis is invalid or a weight is not a floating-point array.

    >>> parts = tfwn.convert.to_weight_norm({"w": [[3.0, 0.0], [4.0, 1.0]], "b": [0.0, 0.0]})
    >>> sorted(parts), parts["w/g"]
    (['b', 'w/g', 'w/v'], array([5., 1.]))
    """
    converted = {}
    for name, value in weights.items():
        array = as_array(value)
        if select(name) if select else array.ndim >= 2 and _is_floating(array):
            _check_floating(name, array)
            axes = check_axis(axis(name) if callable(axis) else axis, array.ndim)
            converted[f"{name}/v"] = array
            converted[f"{name}/g"] = array_norm(array, axes).reshape([array.shape[a] for a in axes])
        else:
            converted[name] = array
    return converted


def to_normal(
    weights: Mapping[str, Any],
    axis: int | Sequence[int] | Callable[[str], Any] | None = -1,
) -> dict[str, np.ndarray]:
    """Folds each pair of v, under name + "/v", and g, under name + "/g", into w = g * v / ||v||.

    Arguments:
      weights: arrays by name, as from `to_weight_norm`.
      axis: as for `to_weight_norm`.

    Returns:
      A new dict. It contains all arrays that belong to no pair unchanged.

    Raises:
      ValueError: if an axis is invalid, the shape of a g is not that of its v along `axis`, or a v
        is not a floating-point array.

    >>> tfwn.convert.to_normal({"w/v": [[3.0], [4.0]], "w/g": [10.0]})
    {'w': array([[6.],
           [8.]])}
    """
    converted = {}
    for name, value in weights.items():
        base, _, letter = name.rpartition("/")
        if letter == "v" and f"{base}/g" in weights:
            v, g = as_array(value), as_array(weights[f"{base}/g"])
            _check_floating(name, v)
            axes = check_axis(axis(base) if callable(axis) else axis, v.ndim)
            expected = tuple(v.shape[a] for a in axes)
            if g.shape != expected:
                raise ValueError(f"{base}/g must have shape {expected}, got {g.shape}")
            kept = [v.shape[a] if a in axes else 1 for a in range(v.ndim)]
            converted[base] = array_weight_norm(v, g.reshape(kept), axes)
        elif not (letter == "g" and f"{base}/v" in weights):
            converted[name] = as_array(value)
    return converted


def _is_floating(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"  # Its kind is "V".


def _check_floating(name: str, array: np.ndarray) -> None:
    if not _is_floating(array):
        raise ValueError(f"{name} must have a float dtype, got {array.dtype}: convert it first")
