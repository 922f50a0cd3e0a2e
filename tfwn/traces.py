"""Finds and drops traces of a module's tf.functions, which would keep using the old weights."""

import types
from collections.abc import Iterator

import tensorflow as tf

from tfwn.modules import attributes

try:  # TensorFlow has no public name for the graphs of loops and branches.
    from tensorflow.python.ops.control_flow_v2_func_graphs import ControlFlowFuncGraph
except ImportError:
    _CONTROL_FLOW: tuple = ()
else:
    _CONTROL_FLOW = (ControlFlowFuncGraph,)

_FUNCTION = tf.types.experimental.PolymorphicFunction
_CONCRETE = tf.types.experimental.ConcreteFunction


def check_traces(module, ignored=()) -> None:
    """Raises ValueError if the module has a traced tf.function that `forget_traces` cannot reach.

    Arguments:
      module: the module.
      ignored: names of attributes that may hold a traced tf.function.
    """
    for name, value in attributes(module):
        if name in ignored:
            continue
        for function in _functions(value):
            if isinstance(function, _CONCRETE) or function.experimental_get_tracing_count():
                raise ValueError(
                    f"the tf.function {name!r} of {type(module).__name__} was traced already "
                    "and would keep the old weights: change the model first, then create the "
                    "function and call it"
                )
    for name, method, function in _methods(module):
        if method is not function and function.experimental_get_tracing_count():
            raise ValueError(
                f"the method {name!r} of {type(module).__name__} wraps a tf.function that was "
                "traced already and would keep the old weights: make tf.function the outermost "
                "decorator"
            )


def forget_traces(module) -> None:
    """Drops the traces of a module's tf.function methods, so that they are traced again."""
    for _, _, function in _methods(module):
        function._descriptor_cache.pop(module, None)


def _functions(value) -> Iterator:
    if isinstance(value, _FUNCTION | _CONCRETE):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _functions(item)
    elif isinstance(value, dict):
        yield from _functions(list(value.values()))


def _methods(module) -> Iterator:
    """Yields (name, method, tf.function) for each method that is or wraps a tf.function."""
    for cls in type(module).__mro__:
        for name, method in vars(cls).items():
            function = method
            while isinstance(function, types.FunctionType) and hasattr(function, "__wrapped__"):
                function = function.__wrapped__
            if isinstance(function, _FUNCTION):
                yield name, method, function


def current_graph() -> tf.Graph | None:
    """Returns the graph to which operations are added, or None in eager mode."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def is_within(graph: tf.Graph | None) -> bool:
    """Returns whether the current graph is `graph` or that of a loop or branch in it.

    The graph of a tf.function that is called there does not count.
    """
    current = current_graph()
    while current is not graph:
        if not isinstance(current, _CONTROL_FLOW):
            return False
        current = current.outer_graph
    return True
