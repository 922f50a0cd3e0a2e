"""All private interfaces of Keras that tfwn.keras uses: the file to check when Keras changes.

Only `hidden_from_gradients` uses TensorFlow's, too.
"""

import contextlib
import inspect
import sys

import keras
import tensorflow as tf
from keras.src import backend
from keras.src.layers.layer import might_have_unbuilt_state
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell
from keras.src.models import Functional
from keras.src.models.functional import functional_like_constructor
from keras.src.ops.function import map_graph
from keras.src.ops.node import KerasHistory
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.utils.python_utils import is_default
from keras.src.utils.tracking import DotNotTrackScope

from tfwn.traces import check_traces, forget_traces

__all__ = ["DropoutRNNCell", "Functional"]

# Attributes in which models keep traced functions; Keras recreates them if they are None.
TRACED_BY_KERAS = ("train_function", "test_function", "predict_function")

current_scope = backend.get_stateless_scope
unpickle = keras.Model._unpickle_model
in_stateless_scope = backend.in_stateless_scope


def layers_in(
    layer: keras.layers.Layer, include_self: bool = True, recursive: bool = True
) -> list[keras.layers.Layer]:
    """Returns the layer and all layers in it."""
    return layer._flatten_layers(include_self=include_self, recursive=recursive)


def check_layer_traces(layer: keras.layers.Layer) -> None:
    """Raises ValueError if `forget_layer_traces` cannot drop all traces."""
    for one in layers_in(layer):
        check_traces(one, ignored=TRACED_BY_KERAS)


def forget_layer_traces(layer: keras.layers.Layer) -> None:
    """Drops the traces of tf.functions in the layer, which read its kernels as they were then."""
    for one in layers_in(layer):
        forget_traces(one)


def is_functional(model) -> bool:
    """Returns whether the model is a graph of layers."""
    return isinstance(model, keras.Sequential | Functional)


def makes_its_layers(cls: type[keras.layers.Layer]) -> bool:
    """Returns whether the constructor creates the layers, so that they are not in the config."""
    if issubclass(cls, Functional):
        return not functional_like_constructor(cls)
    return not issubclass(cls, keras.Sequential) and not cls.__module__.startswith("keras.")


def stored(variable: keras.Variable) -> tf.Variable:
    """Returns the variable as stored, without Keras' cast for mixed precision."""
    with autocast_off():
        return variable.value


def stored_dtype(variable: keras.Variable) -> str:
    """Returns the dtype in which the variable is stored; its `dtype` is the one it is read in."""
    return variable._dtype


def read_dtype(owner: keras.layers.Layer, variable: keras.Variable) -> str:
    """Returns the dtype in which the layer reads its variable during a call."""
    if variable._autocast and owner.autocast and tf.as_dtype(owner.compute_dtype).is_floating:
        return owner.compute_dtype
    return variable._dtype


def autocast_off():
    """Returns a context in which variables read as stored, without Keras' cast."""
    return backend.AutocastScope(None)


def hidden_from_gradients(variable: keras.Variable) -> int:
    """Returns how many functions are being called whose custom gradient ignores the variable.

    These are functions with a tf.custom_gradient that do not have the variable as an argument, and
    that of tf.recompute_grad, which keras.remat calls.
    """
    frame, count = sys._getframe(), 0
    while frame:
        if frame.f_code.co_name in ("_eager_mode_decorator", "_graph_mode_decorator"):
            local = frame.f_locals
            # In a graph, arguments are converted to tensors before the function is called.
            eager = frame.f_code.co_name == "_eager_mode_decorator"
            again = eager and getattr(local["f"], "__qualname__", "").startswith("recompute_grad.")
            arguments = tf.nest.flatten((local["args"], local["kwargs"]))
            given = any(value is variable for value in arguments)
            count += again or not given
        frame = frame.f_back  # type: ignore[assignment]
    return count


def strategy_scope(variable: keras.Variable):
    """Returns the scope of the variable's strategy, or a null context if it has none."""
    strategy = getattr(variable._value, "distribute_strategy", None)
    return strategy.scope() if strategy else contextlib.nullcontext()


def add_variable(layer: keras.layers.Layer, cls: type[keras.Variable], **options):
    """Like `layer.add_weight`, but with a given subclass of keras.Variable."""
    with backend.name_scope(layer.name, caller=layer):
        variable = cls(**options)
    layer._track_variable(variable)
    return variable


def take_path(wrapper: keras.layers.Layer, layer: keras.layers.Layer) -> None:
    """Gives paths of the wrapper's variables the same prefix as the layer's."""
    wrapper._parent_path = layer._parent_path


def pass_arguments_on(wrapper: keras.layers.Layer, layer: keras.layers.Layer) -> None:
    """Makes the wrapper accept inputs as the layer does, and leaves remat to the layer."""
    wrapper._convert_input_args = layer._convert_input_args
    wrapper._allow_non_tensor_positional_args = layer._allow_non_tensor_positional_args
    wrapper._remat_mode = None


def rematerialized(layer: keras.layers.Layer, function, args, kwargs):
    """Returns function(*args, **kwargs), rematerialized if Keras would do so for the layer."""
    if not layer._remat_mode:
        return function(*args, **kwargs)
    flat = keras.tree.flatten((args, kwargs))
    tensors = [x for x in flat if tf.is_tensor(x)]

    def call(*tensors):  # In a graph, tf.custom_gradient accepts no keyword arguments.
        rest = iter(tensors)
        filled = [next(rest) if tf.is_tensor(x) else x for x in flat]
        new_args, new_kwargs = keras.tree.pack_sequence_as((args, kwargs), filled)
        return function(*new_args, **new_kwargs)

    with without_remat(layer, include_self=False):
        call = layer.rematerialized_call(call, *args, **kwargs)
    return call(*tensors)


@contextlib.contextmanager
def without_remat(layer: keras.layers.Layer, include_self: bool = True):
    """While active, neither the layer nor the layers in it rematerialize."""
    modes = [(one, one._remat_mode) for one in layers_in(layer, include_self) if one._remat_mode]
    for one, _ in modes:
        one._remat_mode = None
    try:
        yield
    finally:
        for one, mode in modes:
            one._remat_mode = mode


def has_own_build(layer: keras.layers.Layer) -> bool:
    """Returns whether the layer creates its variables in `build` rather than when it is called."""
    return not is_default(layer.build)


def has_variables(layer: keras.layers.Layer) -> bool:
    """Returns whether the layer has created all its variables."""
    return layer.built or not (has_own_build(layer) or might_have_unbuilt_state(layer))


def waits_for_call(layer: keras.layers.Layer) -> bool:
    """Returns whether the layer may lack variables that only a call creates."""
    return might_have_unbuilt_state(layer)


def build_by_call(layer: keras.layers.Layer, call_spec) -> None:
    """Creates the variables of a layer from the arguments of its first call, as Keras does.

    Keras calls `build`. Without a `build`, it traces `call`, and if this fails, it calls the layer.
    """
    with layer._open_name_scope():
        layer._maybe_build(call_spec)
        if not might_have_unbuilt_state(layer):
            return
        with contextlib.suppress(Exception):  # If it matters, the next call raises it.
            backend.compute_output_spec(layer.call, **call_spec.arguments_dict)
        if might_have_unbuilt_state(layer) and not has_own_build(layer) and call_spec.eager:
            layer.call(**call_spec.arguments_dict)


def build_from_shape(layer: keras.layers.Layer, *shapes, **named_shapes) -> None:
    """Creates the variables of a layer from the arguments of `build`; may leave it unbuilt."""
    if has_own_build(layer):
        if not layer.built:
            layer.build(*shapes, **named_shapes)
            layer.built = True
    elif might_have_unbuilt_state(layer) and shapes:
        with layer._open_name_scope():
            layer._build_by_run_for_single_pos_arg(shapes[0])


def replace_layer(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Replaces `old` with `new` wherever a graph calls it; call `refresh_graph` afterwards."""
    first = len(new._inbound_nodes)
    for node in old._inbound_nodes:
        node.operation = new
        for t in node.outputs:
            history = getattr(t, "_keras_history", None)
            if history is not None and history.operation is old:
                index = first + history.node_index
                t._keras_history = KerasHistory(new, index, history.tensor_index)
    new._inbound_nodes.extend(old._inbound_nodes)
    new._outbound_nodes.extend(old._outbound_nodes)
    old._inbound_nodes, old._outbound_nodes = [], []


def refresh_graph(model: keras.Model, replaced: dict[int, keras.layers.Layer]) -> None:
    """Updates a graph's records of its layers; `replaced` maps ids of old layers to new layers."""
    replaced = dict(replaced)
    graph = model._functional if isinstance(model, keras.Sequential) else model
    if graph is not None:
        before = graph._operations
        nodes, nodes_by_depth, operations, operations_by_depth = map_graph(
            graph._inputs, graph._outputs
        )
        # Set as in Keras itself: tf.train.Checkpoint finds the layers in a list that Keras has not
        # wrapped.
        with DotNotTrackScope():
            graph._nodes, graph._nodes_by_depth = nodes, nodes_by_depth
            graph._operations, graph._operations_by_depth = operations, operations_by_depth
        # The operations are in the same order as before.
        replaced.update((id(a), b) for a, b in zip(before, operations, strict=True))
    for holder in {id(one): one for one in (graph, model) if one is not None}.values():
        for layer in holder._layers:
            new = replaced.get(id(layer), layer)
            if new is not layer:
                replace_tracked(holder, layer, new)
        if any(replaced.get(id(layer), layer) is not layer for layer in holder._layers):
            holder._layers = [replaced.get(id(layer), layer) for layer in holder._layers]


def replace_tracked(owner: keras.layers.Layer, old, new) -> None:
    """Makes the owner and its checkpoints track `new` as one of its layers instead of `old`."""
    if owner._tracker.is_in_store("layers", old):
        owner._tracker.replace_tracked_value("layers", old, new)
    for name, child in owner._trackable_children().items():
        if child is old:
            owner._track_trackable(new, name, overwrite=True)


def tracked_lists(layer: keras.layers.Layer) -> list:
    """Returns the lists in which Keras itself tracks a layer's variables and layers."""
    return [store for _, store in layer._tracker.config.values()]


def optimizers_in(values: list) -> list[keras.Optimizer]:
    """Returns the optimizers among the values, in lists there, and in other optimizers."""
    found: dict[int, keras.Optimizer] = {}
    stack = [*values]
    while stack:
        value = stack.pop()
        if isinstance(value, list | tuple):
            stack.extend(value)
        elif isinstance(value, keras.Optimizer) and id(value) not in found:
            found[id(value)] = value
            stack.extend(vars(value).values())
    return list(found.values())


def restart_optimizer(optimizer: keras.Optimizer) -> None:
    """Makes a built optimizer unbuilt in place; keeps its options, but not its state."""
    rate = optimizer._learning_rate
    if isinstance(rate, keras.Variable):
        rate = float(rate.numpy())
    names = set(inspect.signature(BaseOptimizer.__init__).parameters)
    names -= {"self", "learning_rate", "kwargs"}
    options = {name: getattr(optimizer, name) for name in names}
    del optimizer._tracker  # It would wrap the new lists in its own type.
    with strategy_scope(optimizer._iterations):
        keras.Optimizer.__init__(optimizer, rate, **options)
    for name, value in list(vars(optimizer).items()):
        if (
            isinstance(value, list)
            and value is not optimizer._variables
            and any(isinstance(item, keras.Variable) for item in value)
        ):
            setattr(optimizer, name, [])


def exclude_from_weight_decay(optimizer: keras.Optimizer, v, g) -> None:
    """Excludes g from the optimizer's weight decay if v is excluded."""
    if not optimizer._use_weight_decay(stored(v)):
        excluded: set = getattr(optimizer, "_exclude_from_weight_decay", set())
        optimizer._exclude_from_weight_decay = {*excluded, optimizer._var_key(g)}
