"""Adamax without the correction of bias, as the paper's codes have it; Keras' has one."""

from collections.abc import Sequence

import tensorflow as tf


class Adamax(tf.Module):
    """m <- beta_1 m + (1 - beta_1) grad;  u <- max(beta_2 u, |grad|);  p <- p - lr m / (u + eps).

    Args:
      variables: the parameters p, float32.
      learning_rate: lr.
      beta_1: decay of the momentum m.
      beta_2: decay of the infinity norm u.
      epsilon: eps.
      epsilon_in_max: u <- max(beta_2 u, |grad| + eps) and p <- p - lr m / u instead.
    """

    def __init__(
        self,
        variables: Sequence[tf.Variable],
        learning_rate: float,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        epsilon_in_max: bool = False,
    ):
        super().__init__()
        self._variables, self._learning_rate = variables, learning_rate
        self._beta_1, self._beta_2, self._epsilon = beta_1, beta_2, epsilon
        self._epsilon_in_max = epsilon_in_max
        self.m = [tf.Variable(tf.zeros_like(p), trainable=False) for p in variables]
        self.u = [tf.Variable(tf.zeros_like(p), trainable=False) for p in variables]

    def apply(self, gradients: Sequence[tf.Tensor]) -> None:
        """Makes one step; in a replica, with the sum of all replicas' gradients."""
        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
        beta_2, epsilon = self._beta_2, self._epsilon
        for p, m, u, gradient in zip(self._variables, self.m, self.u, gradients, strict=True):
            if self._epsilon_in_max:
                # With this u the maximum and the epsilon of the operation below change nothing.
                raised = tf.maximum(self._beta_2 * u, tf.abs(gradient) + self._epsilon)
                tf.raw_ops.AssignVariableOp(resource=u.handle, value=raised)
                beta_2, epsilon = 1.0, 0.0
            # beta1_power = 0: no bias correction.
            tf.raw_ops.ResourceApplyAdaMax(
                var=p.handle, m=m.handle, v=u.handle, beta1_power=0.0, lr=self._learning_rate,
                beta1=self._beta_1, beta2=beta_2, epsilon=epsilon, grad=gradient,
            )  # fmt: skip
