"""Adamax as in the paper's code: without Keras' bias correction."""

from typing import Any

import tensorflow as tf


class Adamax(tf.keras.optimizers.Optimizer):
    """m <- beta_1 m + (1 - beta_1) grad;  u <- max(beta_2 u, |grad|);  p <- p - lr m / (u + eps).

    Args:
      learning_rate: lr.
      beta_1: decay of the momentum m.
      beta_2: decay of the infinity norm u.
      epsilon: eps.
      epsilon_in_max: use u <- max(beta_2 u, |grad| + eps) and p <- p - lr m / u instead.
    """

    def __init__(
        self,
        learning_rate: float,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        epsilon_in_max: bool = False,
    ):
        super().__init__(learning_rate, name="adamax")
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.epsilon_in_max = epsilon_in_max

    def build(self, variables: Any) -> None:
        """Creates m and u for each variable, initially zero."""
        super().build(variables)
        self.m = self.add_optimizer_variables(variables, "m")
        self.u = self.add_optimizer_variables(variables, "u")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable."""
        index = self._get_variable_index(variable)
        m, u = self.m[index].value, self.u[index].value
        beta_2, epsilon = self.beta_2, self.epsilon
        if self.epsilon_in_max:
            u.assign(tf.maximum(beta_2 * u, tf.abs(gradient) + epsilon))
            beta_2, epsilon = 1.0, 0.0  # The op below then leaves u unchanged.
        # This op needs one pass over memory; beta1_power=0 turns its bias correction off.
        tf.raw_ops.ResourceApplyAdaMax(
            var=variable.handle, m=m.handle, v=u.handle, beta1_power=0.0, lr=learning_rate,
            beta1=self.beta_1, beta2=beta_2, epsilon=epsilon, grad=gradient,
        )  # fmt: skip
