"""Splitting a batch over replicas, and noise that does not depend on their number."""

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

# fold_in(seed, number) is a new seed, int64 [2]. The default algorithm depends on the device.
fold_in = functools.partial(tf.random.experimental.stateless_fold_in, alg="philox")


def share(x):
    """Returns this replica's shard of a batch that all n replicas hold: every n-th example."""
    replica = tf.distribute.get_replica_context()
    n = replica.num_replicas_in_sync
    return x if n == 1 else x[replica.replica_id_in_sync_group :: n]


def summed(strategy: tf.distribute.Strategy, step: Callable, jit_compile: bool = False) -> Any:
    """Returns a tf.function that runs a step on all replicas and returns the sum of the results."""

    @functools.partial(tf.function, jit_compile=jit_compile)
    def on_all(*arguments):
        sums = strategy.run(step, arguments)
        return strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

    return on_all


def total(x) -> tf.Tensor:
    """Returns the sum of x over all replicas, differentiable."""
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return x
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, x)


def normal_like(x, seed) -> tf.Tensor:
    """Returns float32 standard normal noise with the shape of x, this replica's shard of a batch.

    It is drawn for the whole batch and then split, so it depends only on `seed` (int64 [2]), not on
    the number of replicas. XLA draws different numbers.
    """
    return _draw(tf.random.stateless_normal, x, seed)


def uniform_like(x, seed) -> tf.Tensor:
    """Returns uniform float32 noise in [0, 1), otherwise like `normal_like`."""
    return _draw(tf.random.stateless_uniform, x, seed)


def _draw(distribution, x, seed):
    n = tf.distribute.get_replica_context().num_replicas_in_sync
    shape = tf.concat([[tf.shape(x)[0] * n], tf.shape(x)[1:]], 0)
    return share(distribution(shape, seed, alg="philox"))
