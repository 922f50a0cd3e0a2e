"""Data-dependent initialization (paper, section 3): g and b from the statistics of one batch."""

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfwn.layer import FeedForward, initializing
from tfwn.modules import references, refuse_keras_2, submodules, variables

InitScale = float | Callable[[Any], float]

# Relative to the mean, a standard deviation this small is float32 rounding, not variation.
_ZERO_STDDEV = 8 * 2.0**-23


def data_dependent_init(model, batch, *, init_scale: InitScale = 1.0, training: bool = True):
    """Sets g and b so that every pre-activation has mean 0 and variance 1 on this batch.

        t = v . x / ||v||,  g = 1 / sigma[t],  b = -mu[t] / sigma[t]       (paper, eq. 5 and 6)

    Runs the model once, eagerly. While it does, all tf.functions in the process run eagerly too, in
    any thread. tfwn's Dense and convolution layers, in both parameterizations, and
    `tfwn.keras.WeightNormalization` are set in the order of their calls, so each receives the
    outputs of layers that are already set. A layer that is called several times is set in its first
    call, but a layer in `keras.layers.TimeDistributed` is set from all time steps, unless that also
    contains batch normalization, whose statistics are those of one step.

    Only g (with the normal parameterization, w is scaled instead), b and the layer's flag
    `initialized` change. All other variables of the model, such as running means and random seeds,
    are restored, except for those that this call creates. If the model is a function, its variables
    are those of the modules and layers that it refers to, or a function of the same file that it
    calls: in local and global variables and attributes of these, as the object of a bound method,
    or as arguments of a functools.partial.

    In a layer without b, only g is set. This is what mean-only batch normalization needs; its own b
    is not changed. A unit whose t does not vary keeps its g and gets b = -mu[t] * g. A unit with
    w = 0 keeps w = 0, and if v = 0, it gets a random direction so that it can learn.

    If the variables belong to a tf.distribute.MirroredStrategy, `batch` may be an element of its
    distributed dataset. The moments are then those of the global batch, over all replicas.

    Arguments:
      model: a tf.Module, Keras model or layer, or any function that calls them, like
        `lambda x: decoder(encoder(x))` or `model.encode`. It may be a tf.function.
      batch: the model's only input: a tensor, or a list or dict of tensors for a Keras model
        with several inputs. Use at least 100 examples, preprocessed as for training.
      init_scale: standard deviation of the pre-activations, or a callable(layer) that returns it.
        The layer is tfwn's Dense or convolution, or the `tfwn.keras.WeightNormalization`. If this
        wraps a layer with inner layers, such as MultiHeadAttention, it is the inner Keras layer.
      training: passed on to the model if it has this argument: whether noise and dropout are active
        and batch normalization uses batch statistics, as in the paper's experiments. tfwn's
        mean-only batch normalization always uses the mean of `batch` here.

    Returns:
      The model's output for `batch`, after the initialization.

    Raises:
      RuntimeError: if a layer is already initialized, by this function or a restored checkpoint;
        the model calls a recurrent layer, an embedding or another layer that cannot be set; or this
        function is called in a tf.function or in strategy.run.
      ValueError: if batch is a dataset; batch is distributed but the model's variables are not; the
        model calls no layer that can be set; the moments are not finite; batch is empty; init_scale
        is not positive; or `training=False` and the model does not have this argument.
      After any error, including one from the model, all variables of the model, as defined above,
      have their previous values.

    >>> layer = tfwn.Dense(3)
    >>> x = tf.random.normal([100, 5], mean=2.0)
    >>> y = tfwn.data_dependent_init(layer, x)
    >>> mean, variance = tf.nn.moments(y, [0])
    >>> bool(tf.reduce_all(abs(mean) < 1e-5)), bool(tf.reduce_all(abs(variance - 1) < 1e-4))
    (True, True)
    >>> tfwn.is_initialized(layer)
    True
    """
    if not tf.executing_eagerly():
        raise RuntimeError(
            "data_dependent_init must be called eagerly, once, before training; it was called "
            "while a tf.function is traced: call it outside (the model itself may be one)"
        )
    if tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context():
        raise RuntimeError(
            "data_dependent_init was called in strategy.run: call it outside, with the distributed "
            "batch"
        )
    if isinstance(batch, tf.data.Dataset | tf.distribute.DistributedDataset):
        raise ValueError(
            "batch must be one batch of inputs, got a whole dataset "
            f"({type(batch).__name__}): pass next(iter(dataset)), without the labels"
        )
    if not callable(init_scale):
        _check_scale(init_scale)
    arguments = _training_argument(model, training)
    used = references(model)
    strategy = _strategy_of(batch, variables(used))
    before = _Snapshot()
    before.take(variables(used))
    first_pass = _FirstPass(before, init_scale)

    def forward(batch):
        seen: set[int] = set()  # One per replica, because all replicas contribute to the moments.
        with initializing(lambda layer, t: first_pass.initialize(layer, t, seen)):
            return model(batch, **arguments)

    try:
        with _eager_functions(), _all_time_steps():
            outputs = strategy.run(forward, (batch,)) if strategy else forward(batch)
        if not (first_pass.changed or first_pass.reached):
            refuse_keras_2(used)
            raise ValueError(
                "data_dependent_init reached no layer that it can set: the model must call tfwn's "
                "Dense or convolutions, or Keras layers in tfwn.keras.WeightNormalization"
            )
    except BaseException:
        before.restore()
        raise
    before.restore(except_for=first_pass.changed)
    return outputs


def _check_scale(init_scale: float, layer: str = "") -> None:
    if not init_scale > 0:
        raise ValueError(f"init_scale must be positive, got {init_scale}{layer}")


def is_initialized(model) -> bool:
    """Returns whether `data_dependent_init` has set all layers of the model that it can set.

    Each layer's flag is saved with the model, in checkpoints, SavedModels and .keras files.
    Restoring a checkpoint sets it even in layers whose other variables do not exist yet. Returns
    False for a model without layers that can be set, which includes a model that creates its layers
    in its first call and has not been called.

    >>> layer = tfwn.Dense(3)
    >>> tfwn.is_initialized(layer)
    False
    """
    marks = [module.initialized for module in submodules(model) if _has_mark(module)]
    return bool(marks) and all(bool(mark.numpy()) for mark in marks)


def _has_mark(module) -> bool:
    if isinstance(module, FeedForward):
        return True
    # No need to import Keras: if the module is a wrapper, tfwn.keras is already loaded.
    keras_module = sys.modules.get("tfwn.keras")
    return (
        keras_module is not None
        and isinstance(module, keras_module.WeightNormalization)
        and module.can_initialize()
    )


class _FirstPass:
    """Sets each layer in its first call and collects the variables that it changed."""

    def __init__(self, before: "_Snapshot", init_scale: InitScale):
        self._before = before
        self._init_scale = init_scale
        self.changed: set[int] = set()
        self.reached = False  # Whether a checkpoint restored a layer while this call built it.

    @tf.autograph.experimental.do_not_convert  # A model that is a tf.function calls this eagerly.
    def initialize(self, layer, t, seen):
        if id(layer.weight) in seen:
            return
        seen.add(id(layer.weight))
        self._before.take([*layer.variables, layer.initialized])
        if self._before.value(layer.initialized):
            if getattr(layer, "restored", False):
                self.reached = True
                return
            raise RuntimeError(
                f"{layer.name!r} is initialized already, and another initialization would undo "
                "what it has learned since: skip data_dependent_init if tfwn.is_initialized(model) "
                "(if the model creates its layers in its first call, check after this call), or "
                "call layer.initialized.assign(False) for each layer to set again"
            )
        mean, stddev = _moments(t, layer.name)
        old_g = tf.reshape(tf.cast(layer.weight.get_g(), mean.dtype), [-1])
        # A unit with g = 0 is meant to start with w = 0, as in the last layer of a residual branch.
        zero = (stddev <= _ZERO_STDDEV * tf.abs(mean)) | (old_g == 0)
        scale = self._init_scale
        if callable(scale):
            scale = scale(getattr(layer, "keras_layer", layer))
            _check_scale(scale, f" for {layer.name!r}")
        g = tf.where(zero, old_g, scale / tf.where(zero, tf.ones_like(stddev), stddev))
        _in_all_replicas(lambda g, b: self._set(layer, g, b), g, -mean * g)

    def _set(self, layer, g, b):
        layer.weight.set_g(g)
        if layer.b is not None:
            layer.b.assign(tf.cast(b, layer.b.dtype))
        layer.initialized.assign(True)
        self.changed.update(id(variable) for variable in [*layer.variables, layer.initialized])


def _moments(t, name):
    """Returns each unit's mean and standard deviation over the batch, space and all replicas."""
    t = tf.cast(t, tf.float64 if t.dtype == tf.float64 else tf.float32)
    count = _sum_over_replicas(tf.cast(tf.size(t) / tf.shape(t)[-1], t.dtype))
    mean = _sum(t) / count
    # Corrects the rounding error of the first sum. The correction's own error is negligible.
    rest = _sum(t - mean) / count
    mean += rest
    stddev = tf.sqrt(_sum(tf.square(t - mean)) / count)
    if not bool(tf.reduce_all(tf.math.is_finite(mean) & tf.math.is_finite(stddev))):
        raise ValueError(
            f"the pre-activations of {name!r} have no finite moments on this batch (shape "
            f"{t.shape}): the batch is empty, or it or v contains infinities or NaN"
        )
    return mean, stddev


def _sum(t):
    """Returns the sum over all axes but the last, one at a time to keep rounding errors small."""
    for _ in range(t.shape.rank - 1):
        t = tf.reduce_sum(t, -2)
    return _sum_over_replicas(t)


def _sum_over_replicas(x):
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return x
    return context.all_reduce(tf.distribute.ReduceOp.SUM, x)


def _in_all_replicas(function, *values):
    """Calls function(*values), which assigns variables; the values are equal in all replicas."""
    context = tf.distribute.get_replica_context()
    if context is None or not tf.distribute.has_strategy():
        function(*values)
    else:
        context.merge_call(
            lambda strategy, *values: function(
                *[strategy.experimental_local_results(value)[0] for value in values]
            ),
            args=values,
        )


class _Snapshot:
    """Saved values of variables, one per replica where each replica has its own."""

    def __init__(self):
        self._values = {}

    def take(self, variables):
        for variable in variables:
            if id(variable) not in self._values:
                # Cheap, because TensorFlow copies a buffer only when it is written to.
                values = [(part, tf.identity(part)) for part in _components(variable)]
                self._values[id(variable)] = (variable, values)

    def value(self, variable):
        return self._values[id(variable)][1][0][1]

    def restore(self, except_for=()):
        for key, (_, values) in self._values.items():
            if key not in except_for:
                for part, value in values:
                    part.assign(value)


def _components(variable) -> tuple:
    strategy = getattr(variable, "distribute_strategy", None)
    return strategy.experimental_local_results(variable) if strategy else (variable,)


def _strategy_of(batch, variables) -> tf.distribute.Strategy | None:
    """Returns the strategy whose replicas run the model, None if the batch is not distributed."""
    if not any(isinstance(x, tf.distribute.DistributedValues) for x in tf.nest.flatten(batch)):
        return None
    found = [getattr(variable, "distribute_strategy", None) for variable in variables]
    strategy = next((s for s in found if s is not None), tf.distribute.get_strategy())
    if strategy.num_replicas_in_sync == 1 and not tf.distribute.has_strategy() and not any(found):
        raise ValueError(
            "batch is distributed, but the model has no variables of a strategy: create the model "
            "and call data_dependent_init in strategy.scope()"
        )
    return strategy


def _training_argument(model, training) -> dict:
    parameters = inspect.signature(model).parameters.values()
    if any(p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters):
        return {"training": training}
    if not training:
        raise ValueError(
            "training=False was given, but the model has no argument `training` to pass it to"
        )
    return {}


_eager_lock = threading.RLock()


@contextlib.contextmanager
def _eager_functions():
    """Runs tf.functions eagerly, because those already traced would skip the initialization."""
    # The switch is global, so initializations in several threads take turns.
    with _eager_lock:
        eager = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(True)
        try:
            yield
        finally:
            tf.config.run_functions_eagerly(eager)


def _all_time_steps():
    # A layer in TimeDistributed can be set only if tfwn.keras is loaded.
    keras_init = sys.modules.get("tfwn.keras.data_dependent_init")
    return keras_init.all_time_steps() if keras_init else contextlib.nullcontext()
