"""PyTorch's state dicts, of both generations of its weight norm, from and to layers of tfwn."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tfwn.conv import DepthwiseConv2D, _ConvND, _ConvNDTranspose
from tfwn.dense import Dense
from tfwn.embedding import Embedding
from tfwn.recurrent import RNN
from tfwn.recurrent_cells import Cell, GRUCell

GENERATIONS = ("parametrizations", "weight_g", "normal")


def from_torch(state_dict: Mapping[str, Any], layers, *, strict: bool = True) -> None:
    """Loads a PyTorch state dict into layers of tfwn.

    Reads weights of both generations of PyTorch's weight norm, `weight_g` and `weight_v`
    (torch.nn.utils.weight_norm) or `parametrizations.weight.original0` and `original1`
    (torch.nn.utils.parametrizations.weight_norm), and plain ones. v and g arrive as they are where
    PyTorch's `dim` is the axis of the layer's units. Where it is another, as PyTorch's default is
    for transposed convolutions, w arrives: v = w and g = ||w||. A layer with the "normal"
    parameterization gets w.

    PyTorch's modules and the layers for them: Linear, Dense; Conv1d to 3d, Conv1D to 3D, or
    DepthwiseConv2D for one group per channel; ConvTranspose1d to 3d, Conv1DTranspose to 3D;
    Embedding; RNN, LSTM, GRU and their cells, SimpleRNN, LSTM, GRU. Layouts and the order of gates
    are changed. Padding is the layers' own matter: PyTorch's padding=1 of a convolution with stride
    2 is not "same".

    Arguments:
      state_dict: names and tensors (on the CPU) or arrays. PyTorch need not be installed.
      layers: dict from the prefix of a module's names, as "features.0", to its layer; or one layer,
        for a state dict without prefixes. A recurrent layer gets what ends in "_l0"; "lstm@l1"
        names the second one, and "lstm@l0_reverse" the backward one, of the module "lstm". Layers
        without variables yet are built.
      strict: whether names that belong to no layer are an error.

    Raises:
      ValueError: a name that is missing or superfluous, a shape that is not the layer's; a layer
        that PyTorch has no counterpart for. No layer is changed then.

    >>> layer = tfwn.Dense(1)
    >>> state = {"weight_v": [[3.0, 4.0]], "weight_g": [[10.0]], "bias": [0.5]}
    >>> tfwn.convert.from_torch(state, layer)
    >>> layer(tf.ones([1, 2])).numpy()
    array([[14.5]], dtype=float32)
    """
    arrays = {name: as_array(value) for name, value in state_dict.items()}
    used: set[str] = set()
    values: list[tuple[Any, np.ndarray, np.ndarray | None]] = []
    for prefix, layer in _by_prefix(layers):
        values += _read(arrays, prefix, layer, used)
    superfluous = sorted(arrays.keys() - used)
    if strict and superfluous:
        raise ValueError(
            f"the state dict has names that belong to no layer: {superfluous}; name their layers, "
            "or pass strict=False to leave them out"
        )
    for variable, value, g in values:
        variable.assign(value)
        if g is not None:
            variable.set_g(g)


def to_torch(layers, generation: str = "parametrizations") -> dict[str, np.ndarray]:
    """Returns a PyTorch state dict of layers of tfwn, the inverse of `from_torch`.

    Arguments:
      layers: as for `from_torch`, with variables.
      generation: "parametrizations" (torch.nn.utils.parametrizations.weight_norm), "weight_g"
        (torch.nn.utils.weight_norm), or "normal" for plain weights w.

    Returns:
      Arrays by name, to make tensors of by torch.from_numpy. For transposed convolutions apply
      PyTorch's weight norm with dim=1, whose axis the output channels are; for all others dim=0.

    Raises:
      ValueError: another generation; a layer without variables, or that PyTorch has no counterpart
        for.

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
            normal = weight.parameterization == "normal"
            v = np.asarray(weight.w if normal else weight.v)
            v = v if weight.mask is None else v * weight.mask
            kept = [n if a in weight.axis else 1 for a, n in enumerate(v.shape)]
            g = np.asarray(weight.get_g()).reshape(kept)
            if generation == "normal":
                w = v if normal else array_weight_norm(v, g, weight.axis)
                state[matrix.prefix + matrix.name] = matrix.to_torch(w)
                continue
            # One g along each axis that the norm runs over.
            first = [slice(0, 1)] * v.ndim
            first[matrix.torch_axis] = slice(None)
            names = _names(matrix, generation)
            state[names[0]] = matrix.to_torch(np.broadcast_to(g, v.shape))[tuple(first)].copy()
            state[names[1]] = matrix.to_torch(v)
        if getattr(cell, "b", None) is not None:
            state |= {module + name: value for name, value in biases.to_torch(np.asarray(cell.b))}
    return state


class _Matrix(NamedTuple):
    """A weight: its name in PyTorch, the attribute that holds it, and the change of layout."""

    prefix: str
    name: str
    attribute: str
    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]
    torch_axis: int  # that indexes the layer's units
    input_shape: Callable[[np.ndarray], list]  # with which the layer is built, from our layout


class _Biases(NamedTuple):
    names: list[str]
    to_torch: Callable[[np.ndarray], list[tuple[str, np.ndarray]]]
    from_torch: Callable[..., np.ndarray]


def _by_prefix(layers) -> list[tuple[str, Any]]:
    if isinstance(layers, Mapping):
        return [(prefix, layer) for prefix, layer in layers.items()]
    return [("", layers)]


def _describe(prefix: str, layer) -> tuple[str, Any, list[_Matrix], _Biases]:
    """The prefix of the names, the module with the variables, its weights, its biases."""
    module, _, suffix = prefix.partition("@")
    module = f"{module}." if module else ""
    if isinstance(layer, RNN | Cell):
        return _describe_recurrent(module, suffix, layer)

    def matrix(to_torch, from_torch, torch_axis, channels):
        def input_shape(w):
            first = layer.data_format == "channels_first"
            spatial = [None] * (w.ndim - 2 if w.ndim > 2 else 0)
            return [None, channels(w), *spatial] if first else [None, *spatial, channels(w)]

        return [_Matrix(module, "weight", "weight", to_torch, from_torch, torch_axis, input_shape)]

    biases = _Biases(["bias"], lambda b: [("bias", b)], lambda b: b)
    if isinstance(layer, Dense):
        matrices = matrix(np.transpose, np.transpose, 0, lambda w: w.shape[0])
    elif isinstance(layer, DepthwiseConv2D):
        multiplier = layer.depth_multiplier
        matrices = matrix(
            lambda w: np.moveaxis(w, (-2, -1), (0, 1)).reshape(-1, 1, *w.shape[:-2]),
            lambda w: np.moveaxis(w.reshape(-1, multiplier, *w.shape[2:]), (0, 1), (-2, -1)),
            0,
            lambda w: w.shape[-2],
        )
    elif isinstance(layer, _ConvND | _ConvNDTranspose):
        transposed = isinstance(layer, _ConvNDTranspose)
        matrices = matrix(
            lambda w: np.moveaxis(w, (-1, -2), (0, 1)),
            lambda w: np.moveaxis(w, (0, 1), (-1, -2)),
            1 if transposed else 0,
            lambda w: w.shape[-1] if transposed else w.shape[-2] * layer.groups,
        )
    elif isinstance(layer, Embedding):
        layer_matrix = _Matrix(module, "weight", "weight", np.copy, np.copy, 0, lambda w: [None])
        matrices = [layer_matrix]
    else:
        raise ValueError(
            f"PyTorch has no counterpart that is known here for {layer!r}: layers must be tfwn's "
            "Dense, convolutions, Embedding or recurrent layers"
        )
    return module, layer, matrices, biases


def _describe_recurrent(module, suffix, layer):
    cell = layer.cell if isinstance(layer, RNN) else layer
    suffix = f"_{suffix or 'l0'}" if isinstance(layer, RNN) else ""
    gru = isinstance(cell, GRUCell)
    if gru and not cell.reset_after:
        raise ValueError(f"PyTorch has no GRU like {cell.name!r}, with reset_after=False")
    if getattr(cell, "peepholes", False):
        raise ValueError(f"PyTorch has no LSTM like {cell.name!r}, with peepholes")

    def gates(a):
        # PyTorch's r, z, n are z, r, h here; an LSTM's gates have one order.
        if not gru:
            return a
        first, second, third = np.split(a, 3)
        return np.concatenate([second, first, third])

    matrices = [
        _Matrix(
            module,
            name + suffix,
            attribute,
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
    """The names of g and v, or of w."""
    prefix, name = matrix.prefix, matrix.name
    if generation == "parametrizations":
        return [f"{prefix}parametrizations.{name}.original{i}" for i in (0, 1)]
    if generation == "weight_g":
        return [f"{prefix}{name}_g", f"{prefix}{name}_v"]
    return [prefix + name]


def _read(arrays, prefix, layer, used) -> list[tuple[Any, np.ndarray, np.ndarray | None]]:
    """What to assign: a variable or Weight, its value, and where it is a Weight with a g, g."""
    module, cell, matrices, biases = _describe(prefix, layer)
    values = []
    for matrix in matrices:
        v, g = _read_matrix(arrays, matrix, used)
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
    b = getattr(cell, "b", None)  # An Embedding never has one.
    if len(found) != (0 if b is None else len(biases.names)):
        raise ValueError(
            f"{cell.name!r} has {'no' if b is None else 'a'} bias, but the state dict has "
            f"{found or 'none'} for it"
        )
    if b is not None:
        used.update(found)
        value = biases.from_torch(*[arrays[name] for name in found])
        if value.shape != tuple(b.shape):
            raise ValueError(f"{found} make a bias of shape {value.shape}, not {b.shape}")
        values.append((b, value.astype(b.dtype.as_numpy_dtype), None))
    return values


def _read_matrix(arrays, matrix, used):
    for generation in GENERATIONS:
        names = _names(matrix, generation)
        if all(name in arrays for name in names):
            used.update(names)
            *g, v = [arrays[name] for name in names]
            return v, g[0] if g else None
    raise ValueError(
        f"the state dict has no {matrix.prefix}{matrix.name}, and neither of "
        f"{[_names(matrix, generation) for generation in GENERATIONS[:2]]}; it has {sorted(arrays)}"
    )


def _value(weight, matrix, v, g):
    dtype = weight.dtype.as_numpy_dtype
    if g is None:
        return weight, matrix.from_torch(v).astype(dtype), None
    normed = [a for a in range(v.ndim) if g.ndim == 0 or g.shape[a] == 1]
    same_units = all(
        v.shape[a] == 1 or (a in normed) == (a != matrix.torch_axis) for a in range(v.ndim)
    )
    if same_units and weight.parameterization == "weight_norm":
        g = matrix.from_torch(np.broadcast_to(g, v.shape))
        g = g[tuple(slice(None) if a in weight.axis else 0 for a in range(g.ndim))]
        if weight.exponential_g and not np.all(g > 0):
            raise ValueError(
                f"{matrix.prefix}{matrix.name}: g must be positive for a layer with exponential_g, "
                f"got {np.min(g)}: make the layer without it"
            )
        return weight, matrix.from_torch(v).astype(dtype), g.astype(dtype)
    w = array_weight_norm(v, g, [a for a in range(v.ndim) if a not in normed])
    return weight, matrix.from_torch(w).astype(dtype), None


def as_array(value) -> np.ndarray:
    """A NumPy array of an array, a tensor of TensorFlow or one of PyTorch."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which NumPy does not have
            value = value.float()
    return np.asarray(value)


def array_norm(v: np.ndarray, axes) -> np.ndarray:
    """||v|| with the axes it runs over kept, of size 1."""
    others = tuple(a for a in range(v.ndim) if a not in axes)
    # Divided by the largest first, so that no square under- or overflows.
    largest = np.max(np.abs(v), others, keepdims=True, initial=0).astype(np.float64)
    scaled = v / np.where(largest > 0, largest, 1)
    return (largest * np.sqrt(np.sum(scaled**2, others, keepdims=True))).astype(v.dtype)


def array_weight_norm(v: np.ndarray, g: np.ndarray, axes) -> np.ndarray:
    """w = g * v / ||v||, 0 for v = 0; g broadcasts."""
    norm = array_norm(v.astype(np.float64), axes)
    return (g * (v / np.where(norm > 0, norm, 1))).astype(v.dtype)
