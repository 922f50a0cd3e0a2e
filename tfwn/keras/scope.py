"""Substitution: makes Keras layers read other values in place of their variables."""

from collections.abc import Callable, Iterable

import keras
import tensorflow as tf

from tfwn.keras.internals import current_scope, stored


def exact(variable) -> tf.Tensor:
    """Returns the stored value of a Keras variable as a tensor, without autocasting."""
    return tf.convert_to_tensor(stored(variable))


class Substitution(keras.StatelessScope):
    """While active, the given variables read as the given values, and writes take effect.

    A value is a tensor or a function of the dtype in which the variable is read. If it has a method
    `assign`, this receives writes to the variable. Keras' own StatelessScope, in contrast, holds
    back all writes and hides an outer scope.
    """

    def __init__(
        self,
        values: Iterable[tuple[keras.Variable, tf.Tensor | Callable[[str], tf.Tensor]]],
        initialize_variables: bool = False,
    ):
        super().__init__()
        self.initialize_variables = initialize_variables
        self.state_mapping = {id(variable): value for variable, value in values}
        self.own_losses: list[tf.Tensor] = []

    def __enter__(self):
        outer = current_scope()
        self.collect_losses = outer is None or outer.collect_losses
        self.losses = self.own_losses if outer is None else outer.losses
        return super().__enter__()

    def get_current_value(self, variable):
        """Returns the value that Keras reads for a variable, or None for the variable's own."""
        value = self.state_mapping.get(id(variable))
        if callable(value):
            return self._outside(lambda: value(variable.dtype))
        if value is None and self.original_scope is not None:
            value = self.original_scope.get_current_value(variable)
        return value

    def add_update(self, update):
        """Makes a write that Keras adds to this scope, as if the scope were not active."""
        variable, value = update
        assign = getattr(self.state_mapping.get(id(variable)), "assign", variable.assign)
        self._outside(lambda: assign(value))

    def _outside(self, function):
        initialize_variables = self.initialize_variables
        self.initialize_variables = False
        self.__exit__()
        try:
            return function()
        finally:
            self.__enter__()
            self.initialize_variables = initialize_variables
