"""Reference implementation of eqs. 2 and 3, kept simple on purpose: NumPy in float64."""

import numpy as np


def units_of(v, axis) -> np.ndarray:
    """Returns v in float64 as [*units, rest]: the axes in `axis`, then the others flattened."""
    axes = [] if axis is None else [axis] if isinstance(axis, int) else list(axis)
    v = np.moveaxis(np.asarray(v, np.float64), axes, range(len(axes)))
    return v.reshape(*v.shape[: len(axes)], -1) if v.size else v.reshape(*v.shape[: len(axes)], 0)


def from_units(x, shape, axis) -> np.ndarray:
    """Inverts `units_of` for an array of the given shape."""
    axes = [] if axis is None else [axis] if isinstance(axis, int) else list(axis)
    axes = [a % len(shape) for a in axes]
    rest = [size for a, size in enumerate(shape) if a not in axes]
    return np.moveaxis(x.reshape([shape[a] for a in axes] + rest), range(len(axes)), axes)


def norm(v, axis=-1) -> np.ndarray:
    """Returns ||v|| with g's shape."""
    v = units_of(v, axis)
    return np.sqrt(np.sum(v * v, axis=-1))


def inverse_norm(v, axis=-1) -> np.ndarray:
    """Returns 1 / ||v||, or 0 for a unit whose elements are all zero."""
    length = norm(v, axis)
    return np.divide(1.0, length, out=np.zeros_like(length), where=length != 0)


def weight_norm(v, g, axis=-1) -> np.ndarray:
    """Returns w (eq. 2)."""
    scale = np.asarray(g, np.float64) * inverse_norm(v, axis)
    return from_units(units_of(v, axis) * scale[..., np.newaxis], np.shape(v), axis)


def weight_norm_gradient(grad_w, v, g, axis=-1) -> tuple[np.ndarray, np.ndarray]:
    """Returns grad_v and grad_g (eq. 3)."""
    shape = np.shape(v)
    inverse = inverse_norm(v, axis)
    grad_w, v = units_of(grad_w, axis), units_of(v, axis)
    grad_g = np.sum(grad_w * v, axis=-1) * inverse
    scale, projection = np.asarray(g, np.float64) * inverse, grad_g * inverse
    grad_v = scale[..., np.newaxis] * (grad_w - projection[..., np.newaxis] * v)
    return from_units(grad_v, shape, axis), grad_g
