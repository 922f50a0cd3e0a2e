"""The op w = g * v / ||v|| (paper, eq. 2), its gradient (eq. 3) and the gradient of eq. 3."""

from __future__ import annotations

import contextlib
import itertools
import json
import operator
import pathlib
import sys
import types
import warnings
from collections.abc import Iterable, Sequence

import tensorflow as tf

FLOATS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


def _load_library(folder: pathlib.Path) -> types.ModuleType:
    """Loads the compiled op, and the XLA kernels if this TensorFlow can load them."""
    minor = ".".join(tf.__version__.split(".")[:2])
    rebuild = (
        f"Install the wheel with +tf{minor} in its name, or build for your TensorFlow in a source "
        "checkout: pip install --force-reinstall --no-deps ."
    )
    build_info = folder / "_build_info.json"
    if build_info.exists():
        built = json.loads(build_info.read_text())["tensorflow"]
        if built and built.split(".")[:2] != tf.__version__.split(".")[:2]:
            raise ImportError(
                f"tfwn was built for TensorFlow {built}, but this is TensorFlow "
                f"{tf.__version__}. {rebuild}"
            )
    path = folder / "_ops.so"
    if not path.exists():
        raise ImportError(
            f"tfwn's op is not compiled: there is no {path}. If tfwn is installed, start Python "
            f"outside the checkout, because inside it imports the sources. Otherwise: {rebuild}"
        )
    try:
        library = tf.load_op_library(str(path))
    except tf.errors.NotFoundError as error:
        raise ImportError(
            f"TensorFlow {tf.__version__} cannot load {path}: {error.message}. {rebuild}"
        ) from None

    path = folder / "_xla.so"
    if path.exists():
        try:
            tf.load_library(str(path))
        except tf.errors.NotFoundError as error:
            warnings.warn(
                f"tfwn works, but not with jit_compile=True: TensorFlow {tf.__version__} cannot "
                f"load {path}: {error.message}. {rebuild}",
                RuntimeWarning,
                stacklevel=2,
            )
    return library


_library = _load_library(pathlib.Path(__file__).parent)


@tf.autograph.experimental.do_not_convert
def weight_norm(
    v: tf.types.experimental.TensorLike,
    g: tf.types.experimental.TensorLike,
    axis: int | Sequence[int] | None = -1,
    *,
    out_dtype: tf.types.experimental.DTypeLike | None = None,
    name: str | None = None,
) -> tf.Tensor:
    """Returns weights w with direction v and length g.

        w = g * v / ||v||                                       (Salimans & Kingma 2016, eq. 2)

    `axis` names the axes of v that index the output units. The norm is over all other axes, and g
    has one element per unit. The gradient (eq. 3) is also a fused kernel and can itself be
    differentiated any number of times. Neither adds an epsilon, so the result follows the formula,
    except that a unit with v = 0 gets w = 0 and zero gradients. Norms may range from 1e-30 to
    1e+30, or from 1e-150 to 1e+150 if v is float64; beyond that they may become 0 or infinite.

    | weights                          | v               | `axis`   | g        |
    |----------------------------------|-----------------|----------|----------|
    | Dense, LSTM                      | [in, out]       | -1       | [out]    |
    | convolution                      | [h, w, in, out] | -1       | [out]    |
    | transposed convolution           | [h, w, out, in] | -2       | [out]    |
    | depthwise convolution            | [h, w, in, m]   | (-2, -1) | [in, m]  |
    | one output unit per row          | [out, in]       | 0        | [out]    |
    | one norm for the whole tensor    | any             | None     | []       |

    >>> v = tf.constant([[3.0, 0.0], [4.0, 2.0]])
    >>> g = tf.constant([1.0, 10.0])
    >>> tfwn.weight_norm(v, g).numpy()
    array([[ 0.6,  0. ],
           [ 0.8, 10. ]], dtype=float32)

    Arguments:
      v: the direction, a float16, bfloat16, float32 or float64 tensor of any shape.
      g: the length, of shape [v.shape[a] for a in axis]. Any of these dtypes, not necessarily that
        of v. Its gradient has the dtype of g.
      axis: an int, a sequence of ints, or None for one norm over the whole tensor. Negative axes
        count from the end. Axes that are not consecutive and ascending need a transpose.
      out_dtype: the dtype of w. Default: that of v. Use it to compute half-precision weights from
        float32 parameters without a cast. Sums are always accumulated in at least float32.
      name: a name for the operation.

    Returns:
      w, a tensor of v's shape in `out_dtype`.

    Raises:
      tf.errors.InvalidArgumentError: if `axis` does not name distinct axes of v, g does not have
        the shape above, or a dtype is not supported. In a tf.function, shapes that are known are
        checked during tracing, all others when the graph runs.
    """
    with tf.name_scope(name or "weight_norm"):
        v = tf.convert_to_tensor(v, name="v")
        g = tf.convert_to_tensor(g, dtype_hint=v.dtype, name="g")
        out_dtype = v.dtype if out_dtype is None else _as_dtype(out_dtype)
        for argument, dtype in (("v", v.dtype), ("g", g.dtype), ("out_dtype", out_dtype)):
            if dtype not in FLOATS:
                raise _invalid(
                    f"{argument} must be float16, bfloat16, float32 or float64, but is {dtype.name}"
                )
        w, _ = _forward(v, g, _as_list(axis), out_dtype)
        return w


def _invalid(message: str) -> tf.errors.InvalidArgumentError:
    return tf.errors.InvalidArgumentError(None, None, f"weight_norm: {message}")


def _as_dtype(dtype: tf.types.experimental.DTypeLike) -> tf.DType:
    try:
        return tf.as_dtype(dtype)
    except TypeError:
        raise _invalid(f"out_dtype must be a dtype, but is {dtype!r}") from None


def _as_list(axis: int | Sequence[int] | None) -> list[int]:
    if axis is None:
        return []
    axes = axis if isinstance(axis, Iterable) else [axis]
    try:
        return [operator.index(a) for a in axes]
    except TypeError:
        raise _invalid(
            f"axis must be an int, a sequence of ints or None, but is {axis!r}"
        ) from None


def _call(op, *inputs, **attributes):
    """Calls an op of the library; errors of its shape function raise InvalidArgumentError too."""
    try:
        return op(*inputs, **attributes)
    except ValueError as error:
        raise tf.errors.InvalidArgumentError(None, None, str(error)) from None


def _units_last(v: tf.Tensor, axis: list[int]) -> list[int] | tf.Tensor | None:
    """Returns the permutation that moves `axis` of v last, or None if the op does not need it."""
    rank = v.shape.rank
    if rank is None:
        if all(b == a + 1 for a, b in itertools.pairwise(axis)) and 0 not in axis[1:]:
            return None
        units = tf.stack([a if a >= 0 else a + tf.rank(v) for a in axis])
        others = tf.raw_ops.ListDiff(x=tf.range(tf.rank(v)), y=units).out
        valid = tf.debugging.assert_equal(
            tf.size(others) + len(axis),
            tf.rank(v),
            f"weight_norm: axis must name axes of v, each once, but is {axis}",
        )
        with tf.control_dependencies([valid]):
            return tf.concat([others, units], 0)
    kept = [a + rank if a < 0 else a for a in axis]
    consecutive = kept == list(range(kept[0], kept[0] + len(kept))) if kept else True
    valid = len(set(kept)) == len(kept) and set(kept) <= set(range(rank))
    if consecutive or not valid:  # The op reports an invalid axis.
        return None
    return [a for a in range(rank) if a not in kept] + kept


def _inverse(permutation: list[int] | tf.Tensor) -> list[int] | tf.Tensor:
    if isinstance(permutation, tf.Tensor):
        return tf.math.invert_permutation(permutation)
    return sorted(range(len(permutation)), key=permutation.__getitem__)


def _forward(v, g, axis, w_type):
    """Returns w and the norm, for any axes."""
    norm_type = tf.float64 if v.dtype == tf.float64 else tf.float32
    permutation = _units_last(v, axis)
    if permutation is not None:
        v = tf.transpose(v, permutation)
        axis = list(range(-len(axis), 0))
    w, norm = _call(_library.tfwn_weight_norm, v, g, Tw=w_type, Tnorm=norm_type, axis=axis)
    if permutation is not None:
        w = tf.transpose(w, _inverse(permutation))
    return w, norm


def _backward(grad_w, v, g, norm, axis):
    """Returns grad_v and grad_g, for any axes."""
    permutation = _units_last(v, axis)
    if permutation is not None:
        grad_w = tf.transpose(grad_w, permutation)
        v = tf.transpose(v, permutation)
        axis = list(range(-len(axis), 0))
    grad_v, grad_g = _call(_library.tfwn_weight_norm_grad, grad_w, v, g, norm, axis=axis)
    if permutation is not None:
        grad_v = tf.transpose(grad_v, _inverse(permutation))
    return grad_v, grad_g


# The op outputs the norm only so that its gradient need not recompute it. As in TensorFlow's own
# fused normalizations, no gradient flows through this output. The gradient of eq. 3 therefore
# treats it as a function of grad_w, v and g alone, in which the norm depends on v.


def _register(decorator):
    """Applies a decorator that registers a function, even if this module is imported again.

    TensorFlow keeps the first function and rejects later ones, so the first one calls the function
    that currently has its name in this module.
    """

    def register(function):
        name = function.__name__
        with contextlib.suppress(KeyError, AssertionError):  # Registered by an earlier import.
            decorator(lambda *arguments: getattr(sys.modules[__name__], name)(*arguments))
        return function

    return register


@_register(tf.RegisterGradient("Tfwn>WeightNorm"))
def _weight_norm_gradient(op, grad_w, _):
    v, g = op.inputs
    norm = op.outputs[1]
    return _backward(tf.convert_to_tensor(grad_w), v, g, norm, list(op.get_attr("axis")))


@_register(tf.RegisterGradient("Tfwn>WeightNormGrad"))
def _weight_norm_gradient_gradient(op, a, b):
    """Computes the gradient of sum(a * grad_v) + sum(b * grad_g), in plain TensorFlow.

    With the unit vector u = v / ||v|| and p(x) = x - (u.x) u, eq. 3 reads grad_g = u.grad_w and
    grad_v = (g / ||v||) p(grad_w).
    """
    grad_w, v, g, _ = op.inputs
    axis = list(op.get_attr("axis"))
    wide = tf.float64 if tf.float64 in (v.dtype, g.dtype, grad_w.dtype) else tf.float32
    layout = _layout(v, axis)
    a_, grad_w_, v_ = (tf.reshape(tf.cast(x, wide), layout) for x in (a, grad_w, v))
    b_, g_ = (tf.reshape(tf.cast(x, wide), [1, -1, 1]) for x in (b, g))

    def dot(x, y):
        return tf.reduce_sum(x * y, [0, 2], keepdims=True)

    # Dividing by the largest element keeps the squares from underflowing or overflowing.
    largest = tf.stop_gradient(tf.reduce_max(tf.abs(v_), [0, 2], keepdims=True))
    zero, one = tf.zeros([], wide), tf.ones([], wide)
    largest = tf.where(largest > 0, largest, one)
    u = v_ / largest
    square = dot(u, u)
    # In a unit with a single element, the terms must cancel exactly. They would not if u were
    # multiplied by 1 / length, because the reciprocal is approximate. So is rsqrt, which graph
    # optimizers substitute for a division by a plain sqrt.
    length = tf.where(square == 0, one, tf.sqrt(tf.where(square == 0, one, square)))
    u /= length
    inverse = tf.where(square == 0, zero, 1 / length) / largest

    a_u, grad_g = dot(a_, u), dot(grad_w_, u)
    p_a, p_grad_w = a_ - a_u * u, grad_w_ - grad_g * u
    a_p_grad_w = dot(a_, p_grad_w)
    scale = g_ * inverse
    to_grad_w = scale * p_a + b_ * u
    to_v = inverse * (b_ * p_grad_w - scale * (a_p_grad_w * u + a_u * p_grad_w + grad_g * p_a))
    to_g = inverse * a_p_grad_w
    return [
        tf.reshape(tf.cast(to_grad_w, grad_w.dtype), tf.shape(grad_w)),
        tf.reshape(tf.cast(to_v, v.dtype), tf.shape(v)),
        tf.reshape(tf.cast(to_g, g.dtype), tf.shape(g)),
        None,
    ]


def _layout(v: tf.Tensor, axis: list[int]) -> tf.Tensor:
    """Returns [outer, units, inner], the collapsed shape of v; `axis` must be consecutive."""
    shape = tf.shape(v, out_type=tf.int64)
    first = axis[0] if axis else 0
    parts = shape[:first], shape[first:][: len(axis)], shape[first:][len(axis) :]
    return tf.stack([tf.reduce_prod(part) for part in parts])


def _vectorization(op_type: str):
    """Returns a decorator that defines how tf.vectorized_map and GradientTape.jacobian batch an op.

    They would loop over it otherwise. TensorFlow has no public interface for this.
    """
    try:
        from tensorflow.python.ops.parallel_for import pfor

        return pfor.RegisterPFor(op_type)
    except (ImportError, AttributeError):
        return lambda function: function


def _batched(converter, function, *options):
    """Calls function(*inputs, axis, *options) on the stacked inputs and wraps its results."""
    from tensorflow.python.ops.parallel_for.pfor import wrap

    converter.stack_inputs()
    inputs = [converter.stacked_input(i) for i in range(converter.num_inputs)]
    axis = [0, *(a + 1 if a >= 0 else a for a in converter.get_attr("axis"))]
    return [wrap(x, True) for x in function(*inputs, axis, *options)]


@_register(_vectorization("Tfwn>WeightNorm"))
def _vectorized(converter):
    return _batched(converter, _forward, converter.output(0).dtype)


@_register(_vectorization("Tfwn>WeightNormGrad"))
def _vectorized_gradient(converter):
    return _batched(converter, _backward)
