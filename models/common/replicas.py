"""One batch on several replicas: parts of it, and noise that is the same however many there are."""

import functools

import tensorflow as tf

# A seed, int64 [2], of (seed, number). Named, because the default algorithm depends on the device.
fold_in = functools.partial(tf.random.experimental.stateless_fold_in, alg="philox")


def share(x):
    """Returns this replica's part of a batch that every replica has: every n-th example."""
    replica = tf.distribute.get_replica_context()
    n = replica.num_replicas_in_sync
    return x if n == 1 else x[replica.replica_id_in_sync_group :: n]


def total(x) -> tf.Tensor:
    """Returns the sum of x over all replicas, differentiable."""
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return x
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, x)


def normal_like(x, seed) -> tf.Tensor:
    """Returns float32 standard normal numbers of x's shape, x being this replica's share.

    Drawn for the whole batch, so that the numbers are the same for any number of replicas, and
    a function of `seed` (int64 [2]) alone (under XLA another function than without).
    """
    return _draw(tf.random.stateless_normal, x, seed)


def uniform_like(x, seed) -> tf.Tensor:
    """Returns float32 numbers in [0, 1), as `normal_like`."""
    return _draw(tf.random.stateless_uniform, x, seed)


def _draw(distribution, x, seed):
    n = tf.distribute.get_replica_context().num_replicas_in_sync
    shape = tf.concat([[tf.shape(x)[0] * n], tf.shape(x)[1:]], 0)
    # Named, because the default algorithm depends on the device.
    return share(distribution(shape, seed, alg="philox"))
