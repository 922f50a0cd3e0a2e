"""Converts weights between tfwn's layers and PyTorch, for both generations of its weight norm."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfwn.conv import DepthwiseConv2D, _ConvND, _ConvNDTranspose
from tfwn.dense import Dense
from tfwn.embedding import Embedding
from tfwn.modules import is_keras_layer
from tfwn.recurrent import RNN
from tfwn.recurrent_cells import Cell, GRUCell
from tfwn.weight import masked

GENERATIONS = ("parametrizations", "weight_g", "normal")


def from_torch(source, layers, *, strict: bool = True) -> None:
    """Loads a PyTorch module or state dict into layers of tfwn or Keras layers in tfwn's wrapper.

    Accepts plain weights and both generations of PyTorch's weight norm: `weight_g` and `weight_v`
    (torch.nn.utils.weight_norm), or `parametrizations.weight.original0` and `original1`
    (torch.nn.utils.parametrizations.weight_norm). v and g are loaded unchanged if PyTorch's `dim`
    is the axis of the layer's units. Otherwise, for example with PyTorch's default for transposed
    convolutions, w is loaded: v = w and g = ||w||. A layer with the "normal" parameterization
    always gets w.

    | PyTorch                          | tfwn                                                      |
    |----------------------------------|-----------------------------------------------------------|
    | Linear                           | Dense                                                     |
    | Conv1d, Conv2d, Conv3d           | Conv1D, Conv2D, Conv3D                                    |
    | Conv2d, one group per channel    | DepthwiseConv2D                                           |
    | ConvTranspose1d, 2d, 3d          | Conv1DTranspose, Conv2DTranspose, Conv3DTranspose         |
    | Embedding                        | Embedding                                                 |
    | RNN, LSTM, GRU and their cells   | SimpleRNN, LSTM, GRU and their cells                      |

    `tfwn.keras.WeightNormalization` of the Keras layer with the same name works, too. Layouts and
    the order of gates are converted. Padding is not: with stride 2, PyTorch's padding=1 differs
    from "same".

    Arguments:
      source: the module, or its state dict: tensors or arrays by name. Loading a state dict does
        not require PyTorch.
      layers: dict from a module's name prefix, like "features.0", to its layer; or a single layer,
        for names without a prefix. A recurrent layer loads the names that end in "_l0". "lstm@l1"
        is the second layer of the module "lstm", and "lstm@l0_reverse" the backward direction of
        its first. Layers without variables are built.
      strict: whether names that belong to no layer are an error.

    Raises:
      ValueError: if a name is missing or superfluous, a shape does not match, or a module or layer
        has no counterpart, for example a transposed convolution with groups. In this case, no
        weights are loaded.

    >>> layer = tfwn.Dense(1)
    >>> state = {"weight_v": [[3.0, 4.0]], "weight_g": [[10.0]], "bias": [0.5]}
    >>> tfwn.convert.from_torch(state, layer)
    >>> layer(tf.ones([1, 2])).numpy()
    array([[14.5]], dtype=float32)
    """
    state_dict = source if isinstance(source, Mapping) else source.state_dict()
    arrays = {name: as_array(value) for name, value in state_dict.items()}
    used: set[str] = set()
    values: list[tuple[Any, np.ndarray, np.ndarray | None]] = []
    for prefix, layer in _by_prefix(layers):
        values += _read(arrays, prefix, layer, used)
    superfluous = sorted(arrays.keys() - used)
    if strict and superfluous:
        raise ValueError(
            f"the state dict has names that belong to no layer: {superfluous}; pass their layers, "
            "too, or strict=False to ignore them"
        )
    for variable, value, g in values:
        if g is None:
            variable.assign(value)
        else:
            variable.assign_v_and_g(value, g)


def to_torch(layers, generation: str = "parametrizations") -> dict[str, np.ndarray]:
    """Returns a PyTorch state dict of tfwn's layers; the inverse of `from_torch`.

    Arguments:
      layers: see `from_torch`; their variables must exist.
      generation: "parametrizations" (torch.nn.utils.parametrizations.weight_norm), "weight_g"
        (torch.nn.utils.weight_norm), or "normal" for plain weights w.

    Returns:
      Arrays by name, for torch.from_numpy, in the dtype of the variables, or float32 for bfloat16.
      Apply PyTorch's weight norm to transposed convolutions with dim=1, the axis of their output
      channels, and to all other modules with dim=0.

    Raises:
      ValueError: if `generation` is invalid, or a layer has no variables or no counterpart in
        PyTorch.

    >>> layer = tfwn.Dense(2)
    >>> y = layer(tf.ones([1, 3]))
    >>> {name: a.shape for name, a in tfwn.convert.to_torch({"fc": layer}, "weight_g").items()}
    {'fc.weight_g': (2, 1), 'fc.weight_v': (2, 3), 'fc.bias': (2,)}
    """
    if generation not in GENERATIONS:
        raise ValueError(f"generation must be one of {GENERATIONS}, got {generation!r}")
    state = {}
    for prefix, layer in _by_prefix(layers):
        module, cell, matrices, biases = _describe(prefix, layer)
        for matrix in matrices:
            weight = getattr(cell, matrix.attribute, None)
            if weight is None:
                raise ValueError(f"{cell.name!r} has no variables yet: call it once")
            normal = weight.parameterization == "normal" or weight.axis != matrix.axis
            if normal or generation == "normal":
                # Exact, though a call of the layer may compute w in half precision.
                v = _numpy(weight(weight.dtype))
                g = array_norm(v, matrix.axis)
            else:
                v = _numpy(masked(tf.convert_to_tensor(weight.v), weight.mask))
                kept = [n if a in weight.axis else 1 for a, n in enumerate(v.shape)]
                g = _numpy(weight.get_g()).reshape(kept)
            if generation == "normal":
                state[matrix.prefix + matrix.name] = matrix.to_torch(v)
                continue
            # Keep one g along each axis that the norm is over.
            first = [slice(0, 1)] * v.ndim
            first[matrix.torch_axis] = slice(None)
            names = _names(matrix, generation)
            state[names[0]] = matrix.to_torch(np.broadcast_to(g, v.shape))[tuple(first)].copy()
            state[names[1]] = matrix.to_torch(v)
        if getattr(cell, "b", None) is not None:
            state |= {module + name: value for name, value in biases.to_torch(_numpy(cell.b))}
    return state


class _Matrix(NamedTuple):
    """A weight: its name in PyTorch, the attribute that holds it, and its layout conversion."""

    prefix: str
    name: str
    attribute: str
    axis: tuple[int, ...]  # of the units in our layout
    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]
    torch_axis: int  # of the units in PyTorch's
    input_shape: Callable[[np.ndarray], list]  # of the layer to build, from a weight in our layout


class _Biases(NamedTuple):
    names: list[str]
    to_torch: Callable[[np.ndarray], list[tuple[str, np.ndarray]]]
    from_torch: Callable[..., np.ndarray]


def _by_prefix(layers) -> list[tuple[str, Any]]:
    if isinstance(layers, Mapping):
        return [(prefix, layer) for prefix, layer in layers.items()]
    return [("", layers)]


def _kind(layer) -> str:
    """Returns the kind of a layer, or "" if PyTorch has no counterpart."""
    kinds = (
        (RNN | Cell, "recurrent"),
        (Dense, "dense"),
        (DepthwiseConv2D, "depthwise"),
        (_ConvND, "convolution"),
        (_ConvNDTranspose, "transposed"),
        (Embedding, "embedding"),
    )
    return next((kind for cls, kind in kinds if isinstance(layer, cls)), "")


def _describe(prefix: str, layer) -> tuple[str, Any, list[_Matrix], _Biases]:
    """Returns the name prefix, the layer that holds the variables, its weights and its biases."""
    module, _, suffix = prefix.partition("@")
    module = f"{module}." if module else ""
    if is_keras_layer(layer):
        from tfwn.keras.as_module import AsModule

        layer = AsModule(layer)
        kind = layer.kind
    else:
        kind = _kind(layer)
    if not kind:
        raise ValueError(
            f"{layer!r} has no counterpart in PyTorch that tfwn supports: layers must be tfwn's "
            "Dense, convolutions, Embedding or recurrent layers, or their Keras equivalents in "
            "tfwn.keras.WeightNormalization"
        )
    if kind == "recurrent":
        return _describe_recurrent(module, suffix, layer)

    to_torch, from_torch, units, torch_axis, channels_of = _feed_forward(kind, layer)

    def input_shape(w):
        if kind == "embedding":
            return [None]
        first = getattr(layer, "data_format", "") == "channels_first"
        spatial = [None] * (w.ndim - 2)
        channels = channels_of(w)
        return [None, channels, *spatial] if first else [None, *spatial, channels]

    rank = len(layer.kernel_size) + 2 if hasattr(layer, "kernel_size") else 2
    matrix = _Matrix(
        module,
        "weight",
        "weight",
        tuple(a % rank for a in units),
        to_torch,
        from_torch,
        torch_axis,
        input_shape,
    )
    return module, layer, [matrix], _Biases(["bias"], lambda b: [("bias", b)], lambda b: b)


def _feed_forward(kind: str, layer) -> tuple[Callable, Callable, tuple[int, ...], int, Callable]:
    """Returns to_torch, from_torch, the axes of the units, torch_axis, and the channels of a w."""
    if kind == "dense":
        return np.transpose, np.transpose, (-1,), 0, lambda w: w.shape[0]
    if kind == "embedding":
        return np.copy, np.copy, (0,), 0, lambda w: w.shape[0]
    if kind == "depthwise":
        return (
            lambda w: np.moveaxis(w, (-2, -1), (0, 1)).reshape(-1, 1, *w.shape[:-2]),
            lambda w: np.moveaxis(
                w.reshape(-1, layer.depth_multiplier, *w.shape[2:]), (0, 1), (-2, -1)
            ),
            (-2, -1),
            0,
            lambda w: w.shape[-2],
        )

    def to_torch(w):
        return np.moveaxis(w, (-1, -2), (0, 1))

    def from_torch(w):
        return np.moveaxis(w, (0, 1), (-1, -2))

    if kind == "transposed":
        return to_torch, from_torch, (-2,), 1, lambda w: w.shape[-1]
    return to_torch, from_torch, (-1,), 0, lambda w: w.shape[-2] * layer.groups


def _describe_recurrent(module, suffix, layer):
    one_step = isinstance(layer, Cell) or getattr(layer, "one_step", False)
    cell = layer.cell if isinstance(layer, RNN) else layer
    suffix = "" if one_step else f"_{suffix or 'l0'}"
    gru = cell.gru if hasattr(cell, "gru") else isinstance(cell, GRUCell)
    if gru and not cell.reset_after:
        raise ValueError(f"PyTorch has no GRU with reset_after=False, as in {cell.name!r}")
    if getattr(cell, "peepholes", False):
        raise ValueError(f"PyTorch has no LSTM with peepholes, as in {cell.name!r}")

    def gates(a):
        # PyTorch orders a GRU's gates as r, z, n, tfwn and Keras as z, r, n. An LSTM's agree.
        if not gru:
            return a
        first, second, third = np.split(a, 3)
        return np.concatenate([second, first, third])

    matrices = [
        _Matrix(
            module,
            name + suffix,
            attribute,
            (1,),
            lambda w: gates(w.T),
            lambda w: gates(w).T,
            0,
            lambda w: [None, w.shape[0]],
        )
        for name, attribute in (("weight_ih", "weight"), ("weight_hh", "recurrent_weight"))
    ]
    names = [f"bias_ih{suffix}", f"bias_hh{suffix}"]
    if gru:
        biases = _Biases(
            names,
            lambda b: [(name, gates(row)) for name, row in zip(names, b, strict=True)],
            lambda b, d: np.stack([gates(b), gates(d)]),
        )
    else:
        biases = _Biases(
            names, lambda b: [(names[0], b), (names[1], np.zeros_like(b))], lambda b, d: b + d
        )
    return module, cell, matrices, biases


def _names(matrix: _Matrix, generation: str) -> list[str]:
    """Returns the names of g and v, or the name of w."""
    prefix, name = matrix.prefix, matrix.name
    if generation == "parametrizations":
        return [f"{prefix}parametrizations.{name}.original{i}" for i in (0, 1)]
    if generation == "weight_g":
        return [f"{prefix}{name}_g", f"{prefix}{name}_v"]
    return [prefix + name]


def _read(arrays, prefix, layer, used) -> list[tuple[Any, np.ndarray, np.ndarray | None]]:
    """Returns (variable or Weight, value, g or None) for each assignment to make."""
    module, cell, matrices, biases = _describe(prefix, layer)
    values = []
    for matrix in matrices:
        v, g = _read_matrix(arrays, matrix, used)
        _refuse_groups(matrix, cell, v)
        w = matrix.from_torch(v)
        if not hasattr(cell, matrix.attribute):
            cell.build(matrix.input_shape(w))
        weight = getattr(cell, matrix.attribute)
        if w.shape != tuple(weight.shape):
            raise ValueError(
                f"{matrix.prefix}{matrix.name} must have the shape of {cell.name!r} in PyTorch's "
                f"layout, {matrix.to_torch(np.zeros(weight.shape)).shape}, got {v.shape}"
            )
        values.append(_value(weight, matrix, v, g))
    found = [module + name for name in biases.names if module + name in arrays]
    b = getattr(cell, "b", None)  # An Embedding has none.
    if len(found) != (0 if b is None else len(biases.names)):
        raise ValueError(
            f"{cell.name!r} has {'no' if b is None else 'a'} bias, but the state dict has "
            f"{found or 'none'} for it"
        )
    if b is not None:
        used.update(found)
        value = biases.from_torch(*[arrays[name] for name in found])
        if value.shape != tuple(b.shape):
            raise ValueError(f"{found} yield a bias of shape {value.shape}, expected {b.shape}")
        values.append((b, value.astype(tf.as_dtype(b.dtype).as_numpy_dtype), None))
    return values


def _refuse_groups(matrix, layer, v):
    """Raises ValueError for a transposed convolution's weight of shape [in, out / groups, ...]."""
    filters = layer.filters if matrix.torch_axis == 1 else 0
    if matrix.torch_axis == 1 and v.shape[1] < filters and filters % v.shape[1] == 0:
        raise ValueError(
            f"{matrix.prefix}{matrix.name} belongs to a transposed convolution with "
            f"groups={filters // v.shape[1]}, got shape {v.shape} for {filters} filters: "
            "TensorFlow does not support groups here; use one Conv1DTranspose (2D, 3D) per group"
        )


def _read_matrix(arrays, matrix, used):
    for generation in GENERATIONS:
        names = _names(matrix, generation)
        if all(name in arrays for name in names):
            used.update(names)
            *g, v = [arrays[name] for name in names]
            return v, g[0] if g else None
    raise ValueError(
        f"the state dict has neither {matrix.prefix}{matrix.name} nor any of "
        f"{[_names(matrix, generation) for generation in GENERATIONS[:2]]}; it has {sorted(arrays)}"
    )


def _value(weight, matrix, v, g):
    dtype = weight.dtype.as_numpy_dtype
    name = f"{matrix.prefix}{matrix.name}"
    if g is None:
        return _from_w(weight, name, matrix.from_torch(v).astype(dtype))
    fits = g.ndim == v.ndim and all(n in (1, m) for n, m in zip(g.shape, v.shape, strict=True))
    if g.ndim and not fits:
        raise ValueError(
            f"{name}: the shape of g must be [] or that of v, {list(v.shape)}, with 1 for the axes "
            f"of the norm, got {list(g.shape)}"
        )
    normed = [a for a in range(v.ndim) if g.ndim == 0 or g.shape[a] == 1]
    same_units = all(
        v.shape[a] == 1 or (a in normed) == (a != matrix.torch_axis) for a in range(v.ndim)
    )
    if same_units and weight.axis == matrix.axis and weight.parameterization == "weight_norm":
        g = matrix.from_torch(np.broadcast_to(g, v.shape))
        g = g[tuple(slice(None) if a in weight.axis else 0 for a in range(g.ndim))]
        if weight.exponential_g and not np.all(g > 0):
            raise ValueError(
                f"{name}: g must be positive for a layer with exponential_g, "
                f"got {np.min(g)}: create the layer with exponential_g=False"
            )
        return weight, matrix.from_torch(v).astype(dtype), g.astype(dtype)
    w = array_weight_norm(v, g, [a for a in range(v.ndim) if a not in normed])
    return _from_w(weight, name, matrix.from_torch(w).astype(dtype))


def _from_w(weight, name, w):
    if weight.exponential_g and not np.all(array_norm(w, weight.axis) > 0):
        raise ValueError(
            f"{name}: a unit is zero, which a layer with exponential_g cannot represent: create "
            "the layer with exponential_g=False"
        )
    return weight, w, None


def as_array(value) -> np.ndarray:
    """Converts an array, a TensorFlow tensor or a PyTorch tensor to a NumPy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has no bfloat16.
            value = value.float()
    return np.asarray(value)


def _numpy(value) -> np.ndarray:
    """Returns a variable or tensor as a writable array that torch.from_numpy accepts."""
    array = np.array(tf.convert_to_tensor(value))
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def array_norm(v: np.ndarray, axes) -> np.ndarray:
    """Returns ||v||; the axes that the norm is over are kept with size 1."""
    others = tuple(a for a in range(v.ndim) if a not in axes)
    # Dividing by the largest element keeps the squares from underflowing or overflowing.
    largest = np.max(np.abs(v), others, keepdims=True, initial=0).astype(np.float64)
    scaled = v / np.where(largest > 0, largest, 1)
    return (largest * np.sqrt(np.sum(scaled**2, others, keepdims=True))).astype(v.dtype)


def array_weight_norm(v: np.ndarray, g: np.ndarray, axes) -> np.ndarray:
    """Returns w = g * v / ||v||, or 0 where v = 0; g broadcasts to v."""
    norm = array_norm(v.astype(np.float64), axes)
    return (g * (v / np.where(norm > 0, norm, 1))).astype(v.dtype)
