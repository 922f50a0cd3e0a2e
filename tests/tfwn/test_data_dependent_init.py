"""Tests tfwn.data_dependent_init: section 3 of the paper, and the documented behavior."""

import concurrent.futures
import contextlib
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests.standard import check_standard, images
from tfwn.keras import WeightNormalization


def values(module):
    return [np.array(variable) for variable in module.variables]


class DeepConvNet(tf.Module):
    """Ten layers of several kinds, with a branch."""

    def __init__(self, **options):
        super().__init__()
        same = {"padding": "same", **options}
        self.stem = [tfwn.Conv2D(8, 3, activation="relu", **same) for _ in range(4)]
        self.depthwise = tfwn.DepthwiseConv2D(3, depth_multiplier=2, activation="elu", **same)
        self.left = tfwn.Conv2D(8, 3, groups=2, **same)
        self.right = tfwn.Conv2D(8, 1, activation="tanh", use_bias=False, **options)
        self.down = tfwn.Conv2D(8, 3, strides=2, activation="relu", **options)
        self.up = tfwn.Conv2DTranspose(6, 3, strides=2, activation="relu", **same)
        self.top = tfwn.Dense(10, **options)

    @tf.function
    def __call__(self, x):
        for layer in self.stem:
            x = layer(x)
        x = self.depthwise(x)
        x = self.left(x) + self.right(x)
        x = self.up(self.down(x))
        return self.top(tf.reduce_mean(x, [1, 2]))

    def pre_activations(self, x):
        for layer in self.stem:
            yield layer, layer.pre_activation(x)
            x = layer(x)
        yield self.depthwise, self.depthwise.pre_activation(x)
        x = self.depthwise(x)
        yield self.left, self.left.pre_activation(x)
        yield self.right, self.right.pre_activation(x)
        x = self.left(x) + self.right(x)
        for layer in (self.down, self.up):
            yield layer, layer.pre_activation(x)
            x = layer(x)
        x = tf.reduce_mean(x, [1, 2])
        yield self.top, self.top.pre_activation(x)


@pytest.mark.parametrize(
    "options",
    [{}, {"exponential_g": True}, {"parameterization": "normal"}],
    ids=["weight_norm", "exponential_g", "normal"],
)
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_all_pre_activations_of_a_deep_net_are_standard(options, scale):
    model, x = DeepConvNet(**options), images()
    before = model(x)  # An earlier trace must not interfere.
    y = tfwn.data_dependent_init(model, x, init_scale=scale)
    for layer, t in model.pre_activations(x):
        if layer.b is None:
            assert np.max(np.abs(np.var(t, (0, 1, 2)) / scale**2 - 1)) < 1e-4
        else:
            check_standard(t, scale=scale)
    np.testing.assert_allclose(y, model(x), atol=1e-5)
    assert not np.allclose(y, before)
    assert not tf.config.functions_run_eagerly()


def test_each_layer_may_have_its_own_scale():
    model, x = DeepConvNet(), images()
    model(x)
    y = tfwn.data_dependent_init(model, x, init_scale=lambda layer: 3 if layer is model.top else 1)
    for layer, t in model.pre_activations(x):
        if layer.b is not None:
            check_standard(t, scale=3 if layer is model.top else 1)
    np.testing.assert_allclose(np.std(y, 0), 3, rtol=1e-4)


def test_both_parameterizations_begin_as_the_same_function():
    x = images()
    keras.utils.set_random_seed(1)
    y = tfwn.data_dependent_init(DeepConvNet(), x)
    keras.utils.set_random_seed(1)
    y_normal = tfwn.data_dependent_init(DeepConvNet(parameterization="normal"), x)
    np.testing.assert_allclose(y_normal, y, atol=1e-4)


def test_equation_5_and_6():
    layer = tfwn.Dense(4)
    x = np.random.default_rng(0).normal(2.0, 3.0, [200, 6])
    layer.build(x.shape)
    v = np.asarray(layer.weight.v, np.float64)
    tfwn.data_dependent_init(layer, tf.constant(x, tf.float32))
    t = x @ (v / np.sqrt(np.sum(v * v, 0)))
    np.testing.assert_allclose(layer.weight.g, 1 / t.std(0), rtol=1e-5)
    np.testing.assert_allclose(layer.b, -t.mean(0) / t.std(0), rtol=1e-5)
    np.testing.assert_array_equal(layer.weight.v, v.astype(np.float32))


def test_a_mean_far_above_the_standard_deviation():
    layer = tfwn.Dense(4, dtype=tf.float64)
    x = 1e3 + tf.random.stateless_normal([100, 6], [1, 2], dtype=tf.float64)
    check_standard(tfwn.data_dependent_init(layer, x))


def test_bfloat16_computation():
    layer = tfwn.Conv2D(8, 3, compute_dtype=tf.bfloat16)
    y = np.asarray(tf.cast(tfwn.data_dependent_init(layer, images(channels=8)), tf.float32))
    assert layer.weight.g.dtype == tf.float32
    assert np.max(np.abs(y.mean((0, 1, 2)))) < 0.05
    assert np.max(np.abs(y.std((0, 1, 2)) - 1)) < 0.02


def test_channels_first():
    layer = tfwn.Conv2D(5, 3, data_format="channels_first")
    y = tfwn.data_dependent_init(layer, tf.transpose(images(), [0, 3, 1, 2]))
    check_standard(y, axis=1)


@pytest.mark.parametrize("parameterization", ["weight_norm", "normal"])
def test_a_unit_without_variance_keeps_g(parameterization):
    mask = np.ones([4, 3])
    mask[1:, 0] = 0  # Unit 0 sees only the first input, a constant. Unit 2 sees nothing.
    mask[:, 2] = 0
    layer = tfwn.Dense(3, kernel_mask=mask, g_initializer=2.0, parameterization=parameterization)
    x = tf.concat([tf.fill([50, 1], 0.7), tf.random.stateless_normal([50, 3], [1, 2])], 1)
    layer.build(x.shape)
    w = np.asarray(layer.weight())
    y = tfwn.data_dependent_init(layer, x)
    np.testing.assert_allclose(layer.weight.get_g()[0], 2.0, rtol=1e-6)
    np.testing.assert_allclose(layer.b[0], -0.7 * w[0, 0], rtol=1e-5)
    check_standard(y[:, 1:2])
    np.testing.assert_allclose(np.asarray(y)[:, [0, 2]], 0, atol=1e-6)
    assert np.all(np.isfinite(np.asarray(layer.b)))


def test_a_batch_of_one_example_is_a_batch_without_variance():
    layer = tfwn.Dense(3)
    layer.build([1, 4])
    before = np.asarray(layer.weight.g)
    y = tfwn.data_dependent_init(layer, tf.random.stateless_normal([1, 4], [1, 2]))
    np.testing.assert_array_equal(layer.weight.g, before)
    np.testing.assert_allclose(y, np.zeros([1, 3]), atol=1e-6)


def test_a_layer_used_twice_is_set_at_its_first_use():
    layer, x = tfwn.Dense(6, activation="relu"), images()[:, 0, 0, :]
    x = tf.concat([x, x**2], 1)
    tfwn.data_dependent_init(lambda x: layer(layer(x)), x)
    check_standard(layer.pre_activation(x))
    assert abs(np.mean(layer.pre_activation(layer(x)))) > 0.1


def test_effective_weights_that_the_caller_made_before_do_not_pass_by():
    layer, x = tfwn.Dense(6), images()[:, 0, 0, :]
    layer.build(x.shape)
    check_standard(tfwn.data_dependent_init(lambda x: layer(x, w=layer.weight()), x))


def test_mean_only_batch_normalization_gets_g_alone():
    class Model(tf.Module):
        def __init__(self):
            self.first = tfwn.Conv2D(8, 3, use_bias=False)
            self.first_mean = tfwn.MeanOnlyBatchNormalization()
            self.second = tfwn.Conv2D(8, 3, use_bias=False)
            self.second_mean = tfwn.MeanOnlyBatchNormalization()

        def __call__(self, x, training=False):
            x = tf.nn.relu(self.first_mean(self.first(x), training=training))
            return self.second_mean(self.second(x), training=training)

    model = Model()
    check_standard(tfwn.data_dependent_init(model, images()))
    check_standard(model.first_mean(model.first(images()), training=True))
    for layer in (model.first_mean, model.second_mean):
        np.testing.assert_array_equal(layer.b, np.zeros(8))
    fresh = Model()
    tfwn.data_dependent_init(fresh, images())
    np.testing.assert_array_equal(fresh.second_mean.moving_mean, np.zeros(8))


class Noisy(tf.Module):
    """Has state that a forward pass changes: a generator, a counter, dropout and statistics."""

    def __init__(self):
        self.generator = tf.random.Generator.from_seed(1)
        self.calls = tf.Variable(0, trainable=False)
        self.dense = tfwn.Dense(4)
        self.inner = keras.Sequential(
            [keras.layers.Dropout(0.5), keras.layers.BatchNormalization()]
        )
        self.training = None

    def __call__(self, x, training=False):
        self.training = training
        self.calls.assign_add(1)
        if training:
            x += self.generator.normal(tf.shape(x))
        return self.dense(self.inner(x, training=training))


@pytest.mark.parametrize("training", [True, False])
def test_training_is_the_callers_and_state_is_put_back(training):
    model, x = Noisy(), tf.ones([100, 5])
    model.inner.build([None, 5])
    state = [model.calls, model.generator.state, *model.inner.variables]
    before = [np.array(variable) for variable in state]
    if training:
        check_standard(tfwn.data_dependent_init(model, x))
    else:
        np.testing.assert_allclose(tfwn.data_dependent_init(model, x, training=False), 0, atol=1e-6)
    assert model.training is training
    for old, variable in zip(before, state, strict=True):
        np.testing.assert_array_equal(variable, old)


def test_training_false_needs_a_model_that_knows_it():
    with pytest.raises(ValueError, match="no argument `training`"):
        tfwn.data_dependent_init(tfwn.Dense(3), tf.ones([8, 2]), training=False)


class Failing(tf.Module):
    def __init__(self, last):
        self.dense = tfwn.Dense(4)
        self.normal = tfwn.Dense(4, parameterization="normal")
        self.last = last
        self.calls = tf.Variable(0, trainable=False)

    def __call__(self, x):
        self.calls.assign_add(1)
        return self.last(self.normal(self.dense(x)))


def divide(_):
    raise ZeroDivisionError("the model's own error")


@pytest.mark.parametrize(
    ("last", "error", "message"),
    [
        (divide, ZeroDivisionError, "the model's own error"),
        (lambda x: tfwn.Dense(2)(x / 0.0), ValueError, "no finite moments"),
        (lambda x: tfwn.Dense(2)(x[:0]), ValueError, "no finite moments"),
        (lambda x: tfwn.LSTM(2)(x[:, None]), RuntimeError, r"layer 'lstm' \(LSTM\)"),
        (lambda x: tfwn.Embedding(2, 2)(x), RuntimeError, r"layer 'embedding' \(Embedding\)"),
    ],
    ids=["model", "infinite", "empty", "recurrent", "embedding"],
)
def test_nothing_is_set_when_something_fails(last, error, message):
    model, x = Failing(last), tf.random.stateless_normal([20, 3], [1, 2])
    model.normal(model.dense(x))
    before = values(model)
    with pytest.raises(error, match=message):
        tfwn.data_dependent_init(model, x)
    for old, new in zip(before, values(model), strict=True):
        np.testing.assert_array_equal(new, old)
    assert not tfwn.is_initialized(model)
    assert not tf.config.functions_run_eagerly()
    model.last = tf.identity
    check_standard(tfwn.data_dependent_init(model, x))


def test_a_second_initialization_is_refused_unless_the_mark_is_removed():
    layer, x = tfwn.Dense(3), images()[:, 0, 0, :]
    tfwn.data_dependent_init(layer, x)
    before = values(layer)
    with pytest.raises(RuntimeError, match=r"'dense' is initialized already.*assign\(False\)"):
        tfwn.data_dependent_init(layer, 2 * x)
    for old, new in zip(before, values(layer), strict=True):
        np.testing.assert_array_equal(new, old)
    layer.initialized.assign(False)
    check_standard(tfwn.data_dependent_init(layer, 2 * x))


def test_the_mark_is_in_the_checkpoint(tmp_path):
    x = images()
    model, restored = DeepConvNet(), DeepConvNet()
    assert not tfwn.is_initialized(model)
    model(x)
    assert not tfwn.is_initialized(model)
    tfwn.data_dependent_init(model, x)
    assert tfwn.is_initialized(model)
    path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    status = tf.train.Checkpoint(model=restored).restore(path)
    restored(x)
    status.assert_consumed()
    assert tfwn.is_initialized(restored)
    with pytest.raises(RuntimeError, match="initialized already"):
        tfwn.data_dependent_init(restored, x)


def test_threads_take_turns():
    """Initializations must not overlap, because the switch to eager functions is global."""
    layers = [tfwn.Dense(3) for _ in range(8)]
    barrier = threading.Barrier(2)

    def slow(layer):
        def model(x):
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(0.05)  # Opens only if two initializations overlap.
            return layer(x)

        return model

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        x = tf.random.normal([20, 5])
        list(pool.map(lambda layer: tfwn.data_dependent_init(slow(layer), x), layers))
    assert barrier.broken
    assert not tf.config.functions_run_eagerly()
    assert all(map(tfwn.is_initialized, layers))


def test_other_errors():
    layer, x = tfwn.Dense(3), tf.ones([8, 2])
    with pytest.raises(ValueError, match="init_scale must be positive, got 0"):
        tfwn.data_dependent_init(layer, x, init_scale=0.0)
    with pytest.raises(ValueError, match="must be positive, got -1 for 'dense'"):
        tfwn.data_dependent_init(layer, x, init_scale=lambda layer: -1)
    with pytest.raises(ValueError, match="reached no layer"):
        tfwn.data_dependent_init(lambda x: x, x)
    with pytest.raises(RuntimeError, match="must be called eagerly"):
        tf.function(lambda: tfwn.data_dependent_init(layer, x))()
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with pytest.raises(RuntimeError, match=r"was called in strategy\.run"):
        strategy.run(lambda: tfwn.data_dependent_init(layer, x))
    dataset = tf.data.Dataset.from_tensors(x)
    for whole in (dataset, strategy.experimental_distribute_dataset(dataset)):
        with pytest.raises(ValueError, match=r"^batch must .*: pass next\(iter\(dataset\)\)"):
            tfwn.data_dependent_init(layer, whole)
    assert not tfwn.is_initialized(layer)


def test_layers_alone_do_not_initialize_themselves():
    layer, x = tfwn.Dense(3), images()[:, 0, 0, :]
    layer(x)
    layer(x)
    assert not tfwn.is_initialized(layer)
    np.testing.assert_array_equal(layer.b, np.zeros(3))


@pytest.mark.parametrize("kind", ["weight_norm", "normal", "keras"])
def test_replicas_get_what_one_device_gets_from_the_whole_batch(kind):
    def model():
        keras.utils.set_random_seed(1)
        if kind != "keras":
            model = DeepConvNet(parameterization=kind)
            model(images())
            return model
        return keras.Sequential(
            [
                keras.Input((10, 10, 3)),
                WeightNormalization(keras.layers.Conv2D(8, 3, activation="relu")),
                WeightNormalization(keras.layers.Conv2D(8, 3)),
            ]
        )

    x = images(24)
    alone = model()
    tfwn.data_dependent_init(alone, x)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        replicated = model()
    # Shards of different sizes.
    shares = strategy.experimental_distribute_values_from_function(
        lambda context: x[:16] if context.replica_id_in_sync_group == 0 else x[16:]
    )
    tfwn.data_dependent_init(replicated, shares)
    assert tfwn.is_initialized(replicated)
    for expected, variable in zip(alone.variables, replicated.variables, strict=True):
        variable = variable if isinstance(variable, tf.Variable) else variable.value
        for part in strategy.experimental_local_results(variable):
            np.testing.assert_allclose(
                np.asarray(part, np.float32), np.asarray(expected, np.float32), atol=2e-5
            )


def test_layers_that_make_their_variables_in_the_replicas():
    layer, x = tfwn.Dense(3), images()[:, 0, 0, :]
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    shares = strategy.experimental_distribute_values_from_function(
        lambda context: x[:5] if context.replica_id_in_sync_group == 0 else x[5:]
    )
    with pytest.raises(ValueError, match="batch is distributed, but the model has no variables"):
        tfwn.data_dependent_init(layer, shares)
    with strategy.scope():
        outputs = tfwn.data_dependent_init(layer, shares)
    check_standard(tf.concat(strategy.experimental_local_results(outputs), 0))


def test_a_whole_batch_in_the_scope_of_a_strategy():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer = tfwn.Dense(3, use_bias=False)
        mean_only = tfwn.MeanOnlyBatchNormalization(synchronized=True)
        outputs = tfwn.data_dependent_init(
            lambda x, training: mean_only(layer(x), training), images()[:, 0, 0, :]
        )
    check_standard(outputs)


def test_a_whole_batch_for_replicated_variables():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer = tfwn.Dense(3)
        layer.build([None, 3])
    check_standard(tfwn.data_dependent_init(layer, images()[:, 0, 0, :]))
    for variable in layer.trainable_variables:
        first, second = strategy.experimental_local_results(variable)
        np.testing.assert_array_equal(first, second)
