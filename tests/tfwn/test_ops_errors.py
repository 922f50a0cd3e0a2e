"""Tests the arguments that weight_norm rejects, and the errors of a failing `import tfwn`."""

import json
import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tfwn import ops

REFUSED = {
    "g of another size": (
        dict(v=tf.ones([3, 4]), g=tf.ones([5])),
        "g must have shape [4], the sizes of v's axes [-1], but has shape [5]; v has shape [3, 4]",
    ),
    "g broadcastable": (
        dict(v=tf.ones([3, 4]), g=tf.ones([1])),
        "g must have shape [4], the sizes of v's axes [-1], but has shape [1]",
    ),
    "g with v's rank": (
        dict(v=tf.ones([3, 4]), g=tf.ones([1, 4])),
        "but has shape [1, 4]; v has shape [3, 4]; reshape g",
    ),
    "g of two axes": (
        dict(v=tf.ones([3, 4, 5, 6]), g=tf.ones([6, 5]), axis=(2, 3)),
        "g must have shape [5, 6], the sizes of v's axes [2, 3], but has shape [6, 5]",
    ),
    "g not scalar": (
        dict(v=tf.ones([3, 4]), g=tf.ones([4]), axis=None),
        "g must have shape [], for one norm over the whole of v, but has shape [4]",
    ),
    "g of axes that are not adjacent": (
        dict(v=tf.ones([3, 4, 5]), g=tf.ones([5, 3]), axis=(0, 2)),
        "g must have shape [3, 5]",
    ),
    "axis too large": (
        dict(v=tf.ones([3, 4]), g=tf.ones([4]), axis=2),
        "axis must name axes of v, which has rank 2: from -2 to 1, but is [2]",
    ),
    "axis too small": (
        dict(v=tf.ones([3, 4]), g=tf.ones([3, 4]), axis=(-3, 1)),
        "axis must name axes of v, which has rank 2: from -2 to 1, but is [-3, 1]",
    ),
    "axis twice": (
        dict(v=tf.ones([3, 4]), g=tf.ones([4, 4]), axis=(1, -1)),
        "axis must name each axis of v once, but is [1, -1] for v of rank 2",
    ),
    "axis of a scalar": (
        dict(v=tf.ones([]), g=tf.ones([])),
        "axis must be None for a scalar v, but is [-1]",
    ),
    "axis a float": (
        dict(v=tf.ones([3, 4]), g=tf.ones([4]), axis=1.0),
        "axis must be an int, a sequence of ints or None, but is 1.0",
    ),
    "axis a name": (
        dict(v=tf.ones([3, 4]), g=tf.ones([4]), axis="out"),
        "axis must be an int, a sequence of ints or None, but is 'out'",
    ),
    "v an integer": (
        dict(v=tf.ones([3, 4], tf.int32), g=tf.ones([4])),
        "v must be float16, bfloat16, float32 or float64, but is int32",
    ),
    "g complex": (
        dict(v=tf.ones([3, 4]), g=tf.ones([4], tf.complex64)),
        "g must be float16, bfloat16, float32 or float64, but is complex64",
    ),
    "out_dtype an integer": (
        dict(v=tf.ones([3, 4]), g=tf.ones([4]), out_dtype=tf.int8),
        "out_dtype must be float16, bfloat16, float32 or float64, but is int8",
    ),
    "out_dtype no type": (
        dict(v=tf.ones([3, 4]), g=tf.ones([4]), out_dtype="half a float"),
        "out_dtype must be a dtype, but is 'half a float'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, mode):
    arguments, message = REFUSED[case]
    run = mode(lambda: tfwn.weight_norm(**arguments))
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
        run()


def test_refused_while_the_graph_is_built():
    """A partly known shape that cannot be right raises an error while the graph is built."""

    def build(v_shape, g_shape, axis):
        tf.function(lambda v, g: tfwn.weight_norm(v, g, axis)).get_concrete_function(
            tf.TensorSpec(v_shape), tf.TensorSpec(g_shape)
        )

    for v_shape, g_shape, axis, message in [
        ([None, 4], [5], -1, "g must have shape [4]"),
        ([None, None], [None, 5], -1, "but has shape [?, 5]; v has shape [?, ?]"),
        (None, [2, 3], -1, "g must have shape [?]"),
        ([None, None], None, 2, "axis must name axes of v"),
    ]:
        with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
            build(v_shape, g_shape, axis)


@pytest.mark.parametrize("axis", [(0, -1), (2, 0)])
def test_refused_when_the_rank_is_known(axis):
    run = tf.function(lambda v, g: tfwn.weight_norm(v, g, axis))
    run = run.get_concrete_function(tf.TensorSpec(None), tf.TensorSpec(None))
    with pytest.raises(tf.errors.InvalidArgumentError, match="axis must name axes of v, each once"):
        run(tf.ones([3] if axis == (0, -1) else [3, 4]), tf.ones([3]))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_refused_when_the_graph_runs(jit_compile):
    unknown = tf.TensorSpec(None)

    @tf.function(input_signature=[unknown, unknown], jit_compile=jit_compile)
    def run(v, g):
        return tfwn.weight_norm(v, g, 1)

    assert run(tf.ones([2, 3]), tf.ones([3])).shape == (2, 3)
    for v, g, message in [
        (tf.ones([3, 4]), tf.ones([3]), "g must have shape [4]"),
        (tf.ones([3]), tf.ones([3]), "axis must name axes of v, which has rank 1"),
    ]:
        with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
            run(v, g)


def test_the_ops_themselves_refuse(mode):
    """The ops check arguments that `weight_norm` never passes but an edited graph might."""
    v, g = tf.ones([3, 4, 5]), tf.ones([3, 5])
    types = dict(Tw=tf.float32, Tnorm=tf.float32)
    forward, backward = ops._library.tfwn_weight_norm, ops._library.tfwn_weight_norm_grad
    for run, message in [
        (
            lambda: forward(v, g, axis=[0, 2], **types),
            "axis must name consecutive axes in ascending order, but is [0, 2]",
        ),
        (lambda: forward(v, g[0], axis=[2], **types | {"Tnorm": tf.float64}), "norm must be float"),
        (lambda: backward(v[0], v, g[0], g[0], axis=[2]), "grad_w must have v's shape [3, 4, 5]"),
        (lambda: backward(v, v, g[0], g[1, :4], axis=[2]), "norm must have g's shape [5]"),
        (lambda: backward(v, v, g[:, 1], g[:, 1], axis=[2]), "g must have shape [5]"),
        (
            lambda: backward(v, v, g[0], tf.cast(g[0], tf.float64), axis=[2]),
            "norm must be float for v of type float, but is double",
        ),
    ]:
        errors = tf.errors.InvalidArgumentError, ValueError
        with pytest.raises(errors, match=re.escape(message)):
            mode(run)()


def test_axes_of_many_kinds():
    v = tf.ones([2, 3, 4])
    for axis in (2, np.int64(2), [2], (2,), np.array([2]), range(2, 3), tf.constant([2])):
        assert tfwn.weight_norm(v, tf.ones([4]), axis).shape == v.shape
    assert tfwn.weight_norm(v, 1.0, ()).shape == v.shape


def test_python_numbers_take_the_type_of_v():
    w = tfwn.weight_norm(tf.ones([4, 2], tf.float64), [0.1, 2])
    assert w.dtype == tf.float64
    np.testing.assert_allclose(w, [[0.05, 1]] * 4, rtol=1e-15)
    assert tfwn.weight_norm(tf.ones([4, 2]), [1, 2]).dtype == tf.float32


# Loading the library.

FOLDER = pathlib.Path(ops.__file__).parent


def test_built_for_another_tensorflow(tmp_path):
    (tmp_path / "_build_info.json").write_text(json.dumps({"tensorflow": "2.9.1"}))
    with pytest.raises(ImportError) as error:
        ops._load_library(tmp_path)
    for part in ("TensorFlow 2.9.1", f"this is TensorFlow {tf.__version__}", "pip install"):
        assert part in str(error.value)


def test_another_patch_version_will_do(tmp_path):
    minor = ".".join(tf.__version__.split(".")[:2])
    (tmp_path / "_build_info.json").write_text(json.dumps({"tensorflow": f"{minor}.99"}))
    (tmp_path / "_ops.so").symlink_to(FOLDER / "_ops.so")
    ops._load_library(tmp_path)


def test_not_compiled(tmp_path):
    with pytest.raises(ImportError, match=r"not compiled: there is no .*_ops\.so.*pip install"):
        ops._load_library(tmp_path)


def test_cannot_be_loaded(tmp_path):
    (tmp_path / "_ops.so").write_text("no library")
    with pytest.raises(ImportError, match=r"cannot load .*_ops\.so.*pip install"):
        ops._load_library(tmp_path)


def test_works_without_xla(tmp_path):
    (tmp_path / "_ops.so").symlink_to(FOLDER / "_ops.so")
    ops._load_library(tmp_path)
    (tmp_path / "_xla.so").write_text("no library")
    with pytest.warns(RuntimeWarning, match=r"not with jit_compile=True.*cannot load .*_xla\.so"):
        ops._load_library(tmp_path)
