"""Helpers for testing tfwn.native: guarded arrays, layouts and a float64 reference."""

import ml_dtypes
import numpy as np

HALF, BFLOAT, FLOAT, DOUBLE = np.float16, ml_dtypes.bfloat16, np.float32, np.float64


class CudaArray:
    """A NumPy array that poses as a device array."""

    def __init__(self, array):
        self.array = array

    @property
    def __cuda_array_interface__(self):
        interface = self.array.__array_interface__
        return {key: interface[key] for key in ("shape", "typestr", "data", "strides")} | {
            "version": 3,
            "stream": 7,
        }


class Kernels:
    """Gives both modules the same interface and puts guard bytes around every result."""

    def __init__(self, module, wrap=None):
        self.module, self.wrap = module, wrap or (lambda array: array)

    def weight_norm(self, v, g, axis=-1, out_dtype=None, **options):
        norm_type = DOUBLE if v.dtype == DOUBLE else FLOAT
        w, norm = Guarded(v.shape, out_dtype or v.dtype), Guarded(g.shape, norm_type)
        out = (self.wrap(w.array), self.wrap(norm.array))
        inputs = map(self.wrap, (v, g))
        assert self.module.weight_norm(*inputs, axis, out=out, **options) == out
        return w.checked(), norm.checked()

    def weight_norm_grad(self, grad_w, v, g, norm, axis=-1, **options):
        grad_v, grad_g = Guarded(v.shape, v.dtype), Guarded(g.shape, g.dtype)
        out = (self.wrap(grad_v.array), self.wrap(grad_g.array))
        inputs = map(self.wrap, (grad_w, v, g, norm))
        assert self.module.weight_norm_grad(*inputs, axis, out=out, **options) == out
        return grad_v.checked(), grad_g.checked()


class Guarded:
    """An array between guard bytes, which must not change."""

    def __init__(self, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.bytes = np.full(size + 128, 0xA5, np.uint8)
        self.array = self.bytes[64 : 64 + size].view(dtype).reshape(shape)

    def checked(self):
        assert (self.bytes[:64] == 0xA5).all(), "wrote before the array"
        assert (self.bytes[-64:] == 0xA5).all(), "wrote past the array"
        return self.array


def reference(v, g, grad_w, axis):
    """Eq. 2 and 3 in float64: w, norm, grad_v, grad_g, and the first term of grad_v."""
    v, g, grad_w = (x.astype(np.float64) for x in (v, g, grad_w))
    kept = [] if axis is None else [a % v.ndim for a in np.atleast_1d(axis)]
    reduced = tuple(a for a in range(v.ndim) if a not in kept)

    def spread(unit):  # broadcastable to v, with axes in v's order
        unit = unit.transpose(np.argsort(kept)) if kept else unit
        return np.expand_dims(unit, reduced)

    def gather(total):  # from v's order of axes to that of `axis`
        return total.transpose(np.argsort(np.argsort(kept))) if kept else total

    norm = np.sqrt((v * v).sum(reduced))
    inverse = np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0)
    grad_g = (grad_w * v).sum(reduced) * inverse
    projection = np.expand_dims(grad_g * inverse, reduced)
    inverse = np.expand_dims(inverse, reduced)
    w = spread(g) * (v * inverse)
    first = spread(g) * (inverse * grad_w)
    grad_v = first - spread(g) * (inverse * (projection * v))
    return w, gather(norm), grad_v, gather(grad_g), first


def error(actual, expected, relative_to=None):
    actual = actual.astype(np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    size = np.linalg.norm(expected if relative_to is None else relative_to)
    return np.linalg.norm(actual - expected) / size


TOLERANCE = {HALF: 5e-4, BFLOAT: 4e-3, FLOAT: 5e-7, DOUBLE: 1e-14}


def check(kernels, shape, axis, types=(FLOAT, FLOAT, FLOAT), scale=1.0, grad_w_scale=1.0):
    """Compares both passes with the reference on fresh random input."""
    v_type, g_type, w_type = types
    seed = np.random.SeedSequence().entropy
    rng = np.random.default_rng(seed)
    kept = [] if axis is None else [a % len(shape) for a in np.atleast_1d(axis)]
    v = np.asarray(rng.normal(size=shape) * scale, v_type)
    g = np.asarray(rng.normal(size=[shape[a] for a in kept]), g_type)
    grad_w = np.asarray(rng.normal(size=shape) * grad_w_scale, w_type)
    w, norm = kernels.weight_norm(v, g, axis, w_type)
    grad_v, grad_g = kernels.weight_norm_grad(grad_w, v, g, norm, axis)
    expected = reference(v, g, grad_w, axis)
    widest = TOLERANCE[DOUBLE if v_type == DOUBLE else FLOAT]
    assert error(w, expected[0]) <= max(TOLERANCE[w_type], widest), f"w, seed {seed}"
    assert error(norm, expected[1]) <= widest, f"norm, seed {seed}"
    # In a unit with few elements, grad_v is a small difference of two large terms, so its error is
    # relative to the first of them.
    found = error(grad_v, expected[2], expected[4])
    assert found <= max(TOLERANCE[v_type], widest), f"grad_v, seed {seed}"
    # A sum of terms of both signs can be near 0 by chance, so its error is relative to their size.
    sums = np.maximum(np.abs(expected[3]), np.sqrt(np.mean(grad_w.astype(np.float64) ** 2)))
    found = error(grad_g, expected[3], sums)
    assert found <= max(TOLERANCE[g_type], widest), f"grad_g, seed {seed}"


LAYOUTS = [
    ((300, 64), -1),
    ((2000, 6), -1),
    ((3, 5, 7, 33), -1),
    ((1, 1000), -1),
    ((37, 9, 20), -2),
    ((3, 3, 40, 96), -2),
    ((3, 3, 12, 5), (-2, -1)),
    ((33, 300), 0),
    ((3, 70_001), 0),
    ((17, 31, 3), None),
    ((100_003,), None),
    ((50,), 0),
    ((), None),
]


def bits(arrays):
    return [array.tobytes() for array in arrays]
