"""Reading a Keras variable as it is stored, and making a layer read another value in its place."""

from collections.abc import Iterable

import keras
import tensorflow as tf
from keras.src.backend import AutocastScope, get_stateless_scope


def stored(variable) -> tf.Variable:
    """The variable as it is stored, where Keras would cast it for mixed precision."""
    with AutocastScope(None):
        return variable.value


def exact(variable) -> tf.Tensor:
    """The value of `stored`, as a tensor."""
    return tf.convert_to_tensor(stored(variable))


class Substitution(keras.StatelessScope):
    """While active, variables read as the given tensors; writes to all others take effect.

    Keras' own scope keeps every write back, and hides an outer scope.
    """

    def __init__(self, values: Iterable[tuple[keras.Variable, tf.Tensor]]):
        super().__init__(initialize_variables=False)
        self.state_mapping = {id(variable): value for variable, value in values}
        self.own_losses: list[tf.Tensor] = []

    def __enter__(self):
        outer = get_stateless_scope()
        self.collect_losses = outer is None or outer.collect_losses
        self.losses = self.own_losses if outer is None else outer.losses
        return super().__enter__()

    def get_current_value(self, variable):
        """What Keras asks when it reads a variable: None for "as it is"."""
        value = super().get_current_value(variable)
        if value is None and self.original_scope is not None:
            value = self.original_scope.get_current_value(variable)
        return value

    def add_update(self, update):
        """What Keras tells when it writes one: the write goes where it would without this scope."""
        variable, value = update
        self.__exit__()
        try:
            variable.assign(value)
        finally:
            self.__enter__()
