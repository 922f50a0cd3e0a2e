"""Mean-only batch normalization (paper, section 4)."""

import tensorflow as tf

from tfwn.layer import Layer, is_initializing
from tfwn.weight import check_axis, initial_value


class MeanOnlyBatchNormalization(Layer):
    """Mean-only batch normalization: t - mu[t] + b (paper, section 4, eq. 7).

    It follows a weight-normalized layer WITHOUT a bias and owns the b. mu[t] is the mean over the
    batch and all axes but `axis`; gradients flow through it and are thereby centered (eq. 8). At
    test time the running mean takes its place. Data-dependent initialization sets the g of the
    layer before and nothing here: b stays as it is, the running mean too.

    Arguments:
      axis: of the features; -1, or 1 for "channels_first".
      momentum: m <- momentum * m + (1 - momentum) * mu[t] at each call in training.
      bias_initializer: of b.
      synchronized: take mu[t] over the batches of all replicas of a tf.distribute strategy.
      dtype: of b and the running mean.
      compute_dtype: of the outputs; default `dtype`. mu[t] is taken in float32 at least.
      name: of the layer.

    Raises:
      ValueError: bad options; an unknown number of features or rank.

    Variables: b [features] and moving_mean [features], which starts at 0.

    >>> layer = tfwn.MeanOnlyBatchNormalization()
    >>> print(layer(tf.constant([[1.0], [3.0]]), training=True).numpy().ravel())
    [-1.  1.]
    >>> print(layer(tf.constant([[1.0], [3.0]])).numpy().ravel())
    [0.8 2.8]
    """

    def __init__(
        self,
        axis=-1,
        momentum=0.9,
        *,
        bias_initializer="zeros",
        synchronized=False,
        dtype=tf.float32,
        compute_dtype=None,
        name=None,
    ):
        super().__init__(name=name)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        self.axis = axis
        self.momentum = momentum
        self.bias_initializer = bias_initializer
        self.synchronized = synchronized
        self.dtype = tf.as_dtype(dtype)
        self.compute_dtype = self.dtype if compute_dtype is None else tf.as_dtype(compute_dtype)

    def __call__(self, inputs, training=False) -> tf.Tensor:
        """Returns t - mu[t] + b in training, t - moving_mean + b otherwise.

        Arguments:
          inputs: t.
          training: whether to take mu[t] from `inputs` and to update the running mean.
        """
        t = tf.cast(inputs, self.compute_dtype)
        self.build(t.shape)
        (axis,) = check_axis(self.axis, t.shape.rank)
        if is_initializing():
            mean = self._mean(t, axis)
        elif training:
            mean = self._mean(t, axis)
            moving = self.moving_mean
            moving.assign_sub((1 - self.momentum) * (moving - tf.cast(mean, self.dtype)))
        else:
            mean = self.moving_mean
        shape = [1] * t.shape.rank
        shape[axis] = -1
        shift = tf.cast(self.b, mean.dtype) - mean
        return t + tf.cast(tf.reshape(shift, shape), t.dtype)

    def _mean(self, t, axis):
        wide = tf.float64 if t.dtype == tf.float64 else tf.float32
        others = [a for a in range(t.shape.rank) if a != axis]
        total = tf.reduce_sum(tf.cast(t, wide), others)
        count = tf.cast(tf.size(t), wide) / tf.cast(tf.shape(t)[axis], wide)
        if self.synchronized:
            replica = tf.distribute.get_replica_context()
            if replica is None and is_initializing():
                return tf.math.divide_no_nan(total, count)  # The batch is whole.
            if replica is None and is_initializing():
                return tf.math.divide_no_nan(total, count)  # The batch is whole.
            if replica is None:
                raise RuntimeError(
                    f"{self.name!r} with synchronized=True must be called in a replica, as in "
                    "strategy.run(step), got a call across replicas"
                )
            total, count = replica.all_reduce(tf.distribute.ReduceOp.SUM, [total, count])
        return tf.math.divide_no_nan(total, count)

    def _initialize(self, input_shape):
        if input_shape.rank is None:
            raise ValueError(f"inputs of {self.name!r} must have a known rank, got {input_shape}")
        (axis,) = check_axis(self.axis, input_shape.rank)
        features = input_shape[axis]
        if features is None:
            raise ValueError(
                f"inputs of {self.name!r} must have a known number of features (axis {axis}), got "
                f"shape {input_shape}: set it with tf.ensure_shape"
            )
        self.b = tf.Variable(initial_value(self.bias_initializer, [features], self.dtype), name="b")
        self.moving_mean = tf.Variable(
            tf.zeros([features], self.dtype),
            trainable=False,
            name="moving_mean",
            # Each replica keeps its own; read across replicas, as by a checkpoint, it averages.
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.MEAN,
        )
