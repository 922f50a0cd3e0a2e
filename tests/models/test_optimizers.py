"""Tests Adamax in models/common/optimizers.py against NumPy, on one replica and two."""

import numpy as np
import pytest
import tensorflow as tf

from models.common.optimizers import Adamax


def built(w, *args, **options):
    optimizer = Adamax(*args, **options)
    optimizer.build([w])
    return optimizer


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("epsilon_in_max", [False, True])
def test_adamax_is_its_definition(rng, epsilon_in_max, jit_compile):
    epsilon = 0.05  # Large enough that its place in the formula matters.
    w = tf.Variable(rng.normal(size=50), dtype=tf.float32)
    optimizer = built(w, 0.01, 0.8, 0.9, epsilon, epsilon_in_max)
    step = tf.function(lambda gradient: optimizer.apply([gradient], [w]), jit_compile=jit_compile)
    expected, m, u = w.numpy(), np.zeros(50), np.zeros(50)
    for t in range(6):
        gradient = rng.normal(size=50) * (0.01 if t > 2 else 1)
        step(tf.constant(gradient, tf.float32))
        m = 0.8 * m + 0.2 * gradient
        u = np.maximum(0.9 * u, abs(gradient) + epsilon * epsilon_in_max)
        expected = expected - 0.01 * m / (u + epsilon * (not epsilon_in_max))
    np.testing.assert_allclose(w, expected, rtol=1e-5, atol=1e-6)


def test_a_variable_without_gradient_stays():
    w = tf.Variable([1.0, 2.0])
    built(w, 0.01, epsilon_in_max=True).apply([tf.zeros(2)], [w])
    np.testing.assert_array_equal(w, [1.0, 2.0])


@pytest.mark.parametrize("epsilon_in_max", [False, True])
def test_two_replicas_add_their_gradients(epsilon_in_max):
    strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
    with strategy.scope():
        shared = tf.Variable([1.0, 2.0])
        optimizer = built(shared, 0.1, epsilon_in_max=epsilon_in_max)

    def replica_step():
        index = tf.distribute.get_replica_context().replica_id_in_sync_group
        gradient = tf.constant([1.0, -3.0]) * tf.cast(index + 1, tf.float32)
        optimizer.apply([gradient], [shared])

    alone = tf.Variable([1.0, 2.0])
    single = built(alone, 0.1, epsilon_in_max=epsilon_in_max)
    for _ in range(2):
        tf.function(lambda: strategy.run(replica_step))()
        single.apply([tf.constant([3.0, -9.0])], [alone])
    for copy in strategy.experimental_local_results(shared):
        np.testing.assert_allclose(copy, alone, rtol=1e-6)
    for slots in (optimizer.m, optimizer.u):
        one, other = strategy.experimental_local_results(slots[0].value)
        np.testing.assert_array_equal(one, other)
