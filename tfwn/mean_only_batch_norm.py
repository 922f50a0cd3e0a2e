"""Mean-only batch normalization (paper, section 4)."""

import tensorflow as tf

from tfwn.initializers import initial_value
from tfwn.layer import Layer, is_initializing
from tfwn.weight import check_axis, check_float


class MeanOnlyBatchNormalization(Layer):
    """Mean-only batch normalization: t - mu[t] + b (paper, section 4, eq. 7).

    Use it after a weight-normalized layer WITHOUT a bias, because it adds the bias b itself. mu[t]
    is the mean over the batch and all axes except `axis`. Gradients flow through mu[t], which
    centers them (eq. 8). At test time, a running mean replaces mu[t]. Data-dependent initialization
    sets g of the preceding layer and changes neither b nor the running mean.

    Arguments:
      axis: axis of the features: -1, or 1 for "channels_first".
      momentum: momentum of the running mean m. Each training call sets m to
        momentum * m + (1 - momentum) * mu[t].
      bias_initializer: initializer of b.
      synchronized: whether mu[t] is the mean over all replicas of a tf.distribute strategy.
      dtype: dtype of b and the running mean.
      compute_dtype: dtype of the outputs. Default: `dtype`. mu[t] is computed in at least float32.
      name: name of the layer.

    Raises:
      ValueError: if an option is invalid, or the rank or number of features is unknown.
      RuntimeError: if `synchronized` is set and a training call is not made in a replica.

    Outputs have the shape of the inputs, in compute_dtype. The variables are b [features] and
    moving_mean [features], which is initialized to 0.

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
        self.dtype = check_float("dtype", dtype)
        self.compute_dtype = check_float("compute_dtype", compute_dtype or dtype)

    def __call__(self, inputs, training=False) -> tf.Tensor:
        """Returns t - mu[t] + b in training, t - moving_mean + b otherwise.

        Arguments:
          inputs: t.
          training: whether to compute mu[t] from `inputs` and to update the running mean.
        """
        t = tf.cast(inputs, self.compute_dtype)
        self.build(t.shape)
        (axis,) = check_axis(self.axis, t.shape.rank)
        if not (training or is_initializing()):
            return t + _along(axis, self.b - self.moving_mean, t)
        mean = self._mean(_sum(t, axis), t)
        if not is_initializing():
            moving = self.moving_mean
            moving.assign_sub((1 - self.momentum) * (moving - tf.cast(mean, self.dtype)))
        return self._center(t, tf.convert_to_tensor(self.b), mean, axis)

    def _center(self, t, b, mean, axis):
        """Returns t - mean + b. The gradient for t is eq. 8, which includes the path through mean.

        Automatic differentiation would first broadcast this path's gradient to the size of t.
        """

        @tf.custom_gradient
        def center(t, b, mean):
            def gradient(grad):
                grad_b = _sum(grad, axis)
                grad_t = grad - _along(axis, self._mean(grad_b, grad), grad)
                return grad_t, tf.cast(grad_b, b.dtype), None

            return t + _along(axis, tf.cast(b, mean.dtype) - mean, t), gradient

        return center(t, b, mean)

    def _mean(self, total, t):
        """Returns the mean of t from its sum `total`, over all replicas if `synchronized`."""
        count = tf.cast(tf.size(t) / tf.size(total), total.dtype)
        if self.synchronized:
            replica = tf.distribute.get_replica_context()
            # Outside of replicas, data-dependent initialization receives the whole batch.
            if replica is None and not is_initializing():
                raise RuntimeError(
                    f"{self.name!r} with synchronized=True must be called in a replica, as in "
                    "strategy.run(step), but was called in a cross-replica context"
                )
            if replica is not None:
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
            # Each replica has its own; reading across replicas, as for a checkpoint, averages them.
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.MEAN,
        )


def _sum(t, axis):
    """Returns the sum over all axes except `axis`, in at least float32."""
    t = tf.cast(t, tf.float64 if t.dtype == tf.float64 else tf.float32)
    others = [a for a in range(t.shape.rank) if a != axis]
    # On a CPU, two steps are twice as fast as one and have a tenth of the error.
    return tf.reduce_sum(tf.reduce_sum(t, others[1:], keepdims=True), others)


def _along(axis, x, t):
    """Returns x [features] in t's dtype and in a shape that broadcasts to t."""
    shape = [1] * t.shape.rank
    shape[axis] = -1
    return tf.cast(tf.reshape(x, shape), t.dtype)
