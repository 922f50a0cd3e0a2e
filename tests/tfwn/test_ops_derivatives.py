"""Tests higher-order derivatives of weight_norm against those of plain TensorFlow."""

import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests.tfwn.op_cases import LAYOUTS, arguments, assert_close, plain, second_derivatives


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_second_derivatives(shape, axis, mode, rng):
    v, g, c = arguments(rng, shape, axis)
    outputs = mode(second_derivatives)(tfwn.weight_norm, v, g, c, axis)
    assert_close(outputs, second_derivatives(plain, v, g, c, axis), atol=1e-11)


@pytest.mark.parametrize("output", ["grad_v", "grad_g"])
def test_second_derivative_of_either_gradient_alone(output, mode, rng):
    v, g, c = arguments(rng, (7, 5), -1)

    def run(f):
        with tf.GradientTape() as outer:
            outer.watch([v, g])
            with tf.GradientTape() as inner:
                inner.watch([v, g])
                y = tf.reduce_sum(c * f(v, g))
            grad = inner.gradient(y, v if output == "grad_v" else g)
        return outer.gradient(grad, [v, g], unconnected_gradients="zero")

    assert_close(mode(run)(tfwn.weight_norm), run(plain))


def test_third_derivatives(mode, rng):
    v, g, c = arguments(rng, (4, 3), -1)

    @mode
    def run(f, v):
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            second = second_derivatives(f, v, g, c, -1)
            y = tf.add_n([tf.reduce_sum(tf.sin(x)) for x in second])
        return tape.gradient(y, [v, g])

    expected = run(plain, v)
    assert_close(run(tfwn.weight_norm, v), expected, rtol=1e-9, atol=1e-9)

    zero = tf.constant([1, 0, 1], tf.float64)
    outputs = run(tfwn.weight_norm, v * zero)
    assert_close(outputs, [x * zero for x in expected], rtol=1e-9, atol=1e-9)


def test_hessian(mode, rng):
    v, g, c = arguments(rng, (4, 3), -1)

    @mode
    def run(f):
        with tf.GradientTape() as outer:
            outer.watch(v)
            with tf.GradientTape() as inner:
                inner.watch(v)
                y = tf.reduce_sum(tf.sin(c * f(v, g)))
            grad_v = inner.gradient(y, v)
        return outer.jacobian(grad_v, v)

    hessian = tf.reshape(run(tfwn.weight_norm), [12, 12])
    assert_close(hessian, tf.reshape(run(plain), [12, 12]))
    assert_close(hessian, tf.transpose(hessian))


def test_second_derivatives_of_a_zero_unit_are_zero(mode, rng):
    v, g, c = arguments(rng, (6, 4), -1, tf.float32)
    v = v * [1.0, 0.0, 1.0, 1.0]
    to_v, to_g, to_c = mode(second_derivatives)(tfwn.weight_norm, v, g, c, -1)
    for out in to_v[:, 1], to_g[1], to_c[:, 1]:
        np.testing.assert_array_equal(out, tf.zeros_like(out))
    others = [0, 2, 3]
    expected = second_derivatives(
        plain, *(tf.gather(tf.cast(x, tf.float64), others, axis=-1) for x in (v, g, c)), -1
    )
    outputs = [tf.gather(x, others, axis=-1) for x in (to_v, to_g, to_c)]
    assert_close(outputs, expected, rtol=1e-3, atol=1e-4)


def test_second_derivatives_of_a_unit_of_one_element_are_zero(mode, rng):
    """They are zero like the gradient, because w = g sign(v) depends only on the sign of v."""
    v, g, c = arguments(rng, (1, 300), -1, tf.float32)

    def run(v, g, c):
        with tf.GradientTape() as outer:
            outer.watch(v)
            with tf.GradientTape() as inner:
                inner.watch([v, g])
                y = tf.reduce_sum(tf.sin(c * tfwn.weight_norm(v, g)))
            gradients = inner.gradient(y, [v, g])
        return gradients[0], outer.gradient(gradients, v)

    for out in mode(run)(v, g, c):
        np.testing.assert_array_equal(out, tf.zeros_like(v))


@pytest.mark.parametrize("scale", [1e-15, 1e15, 1e30])
def test_second_derivatives_of_extreme_norms(scale, mode, rng):
    v, g, c = arguments(rng, (6, 4), -1)

    def run(f, dtype):
        v_ = tf.cast(v * scale, dtype)
        with tf.GradientTape() as outer:
            outer.watch(v_)
            with tf.GradientTape() as inner:
                inner.watch(v_)
                y = tf.reduce_sum(tf.cast(c, dtype) * f(v_, tf.cast(g, dtype)))
            grad_v = inner.gradient(y, v_) * scale
        return outer.gradient(grad_v, v_) * scale

    outputs = mode(run)(tfwn.weight_norm, tf.float32)
    assert_close(outputs, run(plain, tf.float64), rtol=1e-4, atol=1e-5)


def test_second_derivatives_of_mixed_types(mode, rng):
    v, g, c = arguments(rng, (6, 4), -1)
    mixed = tf.cast(v, tf.float32), tf.cast(g, tf.bfloat16), tf.cast(c, tf.float16)
    exact = [tf.cast(x, tf.float64) for x in mixed]

    def f(v, g, axis):
        return tfwn.weight_norm(v, g, axis, out_dtype=tf.float16)

    outputs = mode(second_derivatives)(f, *mixed, -1)
    assert [x.dtype for x in outputs] == [tf.float32, tf.bfloat16, tf.float16]
    for out, truly in zip(outputs, second_derivatives(plain, *exact, -1), strict=True):
        error = np.linalg.norm(np.asarray(out, np.float64) - truly)
        assert error <= 0.02 * np.linalg.norm(truly)


def test_forward_accumulator(mode, rng):
    v, g, c = arguments(rng, (7, 5), -1)
    v_tangent, g_tangent, _ = arguments(rng, (7, 5), -1)

    def run(f):
        with tf.autodiff.ForwardAccumulator([v, g], [v_tangent, g_tangent]) as accumulator:
            w = f(v, g)
        return accumulator.jvp(w)

    assert_close(mode(run)(tfwn.weight_norm), run(plain))

    def hessian_vector_product(f):
        with (
            tf.autodiff.ForwardAccumulator([v, g], [v_tangent, g_tangent]) as accumulator,
            tf.GradientTape() as tape,
        ):
            tape.watch([v, g])
            y = tf.reduce_sum(tf.sin(c * f(v, g)))
            grads = tape.gradient(y, [v, g])
        return [accumulator.jvp(grad) for grad in grads]

    outputs = mode(hessian_vector_product)(tfwn.weight_norm)
    assert_close(outputs, hessian_vector_product(plain))
