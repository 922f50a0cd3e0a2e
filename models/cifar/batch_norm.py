"""Batch normalization (Ioffe and Szegedy 2015), one of the paper's baselines."""

import functools

import tensorflow as tf


class BatchNormalization(tf.Module):
    """Computes gamma (t - mu[t]) / sqrt(var[t] + epsilon) + beta.

    Outside training, mu and var are running moments. The running variance averages the unbiased
    batch variances, var[t] n / (n - 1) for n values per unit, as in the paper's code.

    Args:
      units: size of the last axis.
      momentum: decay of the running moments, m <- momentum * m + (1 - momentum) * m_batch.
      epsilon: added to the variance.
      synchronized: compute the moments over all replicas, whose batches must have equal sizes.
    """

    def __init__(self, units: int, momentum: float, epsilon: float, synchronized: bool = True):
        super().__init__()
        self.momentum, self.epsilon, self.synchronized = momentum, epsilon, synchronized
        self.gamma = tf.Variable(tf.ones([units]), name="gamma")
        self.beta = tf.Variable(tf.zeros([units]), name="beta")
        running = functools.partial(
            tf.Variable,
            trainable=False,
            # Each replica updates its own copy; a read across replicas (a checkpoint) averages.
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.MEAN,
        )
        self.moving_mean = running(tf.zeros([units]), name="moving_mean")
        self.moving_variance = running(tf.ones([units]), name="moving_variance")

    def __call__(self, t, training: bool) -> tf.Tensor:
        """Returns t normalized, in t's dtype; the moments are float32."""
        if not training:
            return self._scale_and_shift(t, self.moving_mean, self.moving_variance)
        if self.synchronized and tf.distribute.get_replica_context().num_replicas_in_sync > 1:
            mean, variance, unbiased = self._moments_of_all(t)
            normalized = self._scale_and_shift(t, mean, variance)
        else:
            normalized, mean, unbiased = self._fused(t)
        for moving, now in ((self.moving_mean, mean), (self.moving_variance, unbiased)):
            moving.assign_sub((1 - self.momentum) * (moving - now))
        return normalized

    def _moments_of_all(self, t):
        replica = tf.distribute.get_replica_context()
        average = functools.partial(replica.all_reduce, tf.distribute.ReduceOp.MEAN)
        own, variance = tf.nn.moments(tf.cast(t, tf.float32), list(range(t.shape.rank - 1)))
        mean = average(own)
        variance = average(variance + tf.square(own - mean))
        n = tf.cast(replica.num_replicas_in_sync * (tf.size(t) // t.shape[-1]), tf.float32)
        return mean, variance, variance * n / (n - 1)

    def _scale_and_shift(self, t, mean, variance):
        scale = self.gamma * tf.math.rsqrt(variance + self.epsilon)
        return t * tf.cast(scale, t.dtype) + tf.cast(self.beta - mean * scale, t.dtype)

    def _fused(self, t):
        # The raw op, because TensorFlow's wrapper raises a smaller epsilon to 1e-5.
        normalized, mean, unbiased, *_ = tf.raw_ops.FusedBatchNormV3(
            x=t if t.shape.rank == 4 else t[:, None, None, :],
            scale=self.gamma,
            offset=self.beta,
            mean=[],
            variance=[],
            epsilon=self.epsilon,
        )
        return tf.reshape(normalized, tf.shape(t)), mean, unbiased
