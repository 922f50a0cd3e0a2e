"""Tests that tfwn.reparameterize and tfwn.fold change any kind of Keras model in place."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests.keras_layers import LAYERS, normal
from tfwn.keras import WeightNormalization


def net(kind):
    inputs = keras.Input((8,))
    hidden, last = keras.layers.Dense(6, "relu", name="hidden"), keras.layers.Dense(1)

    class Own(keras.Model):
        @tf.function
        def infer(self, x):
            return self(x)

        def train_step(self, data):
            self.steps = getattr(self, "steps", 0) + 1
            return super().train_step(data)

    class Subclassed(Own):
        def __init__(self):
            super().__init__()
            self.parts = [hidden, last]

        def call(self, x):
            return self.parts[1](self.parts[0](x))

    if kind == "sequential":
        return keras.Sequential([inputs, hidden, last])
    if kind == "functional":
        return keras.Model(inputs, last(hidden(inputs)))
    if kind == "own functional":
        return Own(inputs, last(hidden(inputs)))
    return Subclassed()


@pytest.mark.parametrize("kind", ["sequential", "functional", "own functional", "subclassed"])
def test_a_model_is_changed_in_place(kind):
    model, x = net(kind), normal(16, 8)
    expected = model(x)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, x[:, :1], verbose=0)
    expected = model(x)
    own = "infer" in dir(model)
    if own:
        model.infer(x)
    cls = type(model)
    tfwn.reparameterize(model)  # The result need not be used.
    assert isinstance(model, cls)
    wrappers = [layer for layer in model.layers if isinstance(layer, WeightNormalization)]
    assert len(wrappers) == 2
    assert len(model.trainable_variables) == 6
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    gains = [wrapper.g.numpy() for wrapper in wrappers]
    model.fit(x, x[:, :1], epochs=2, verbose=0)
    assert all(np.any(w.g.numpy() != g) for w, g in zip(wrappers, gains, strict=True))
    if kind != "subclassed":
        assert isinstance(model.get_layer("hidden"), WeightNormalization)
        inner = keras.Model(model.inputs, model.get_layer("hidden").output)
        np.testing.assert_allclose(inner(x), wrappers[0](x), rtol=1e-6)
    wrappers[0].g.assign(wrappers[0].g * 3)
    expected = model(x)
    if own:
        np.testing.assert_allclose(model.infer(x), expected, rtol=1e-5, atol=1e-6)
        assert model.steps > 1
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-6)
    tfwn.fold(model)
    assert type(model) is cls
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    hidden = model.parts[0] if kind == "subclassed" else model.get_layer("hidden")
    hidden.kernel.assign(hidden.kernel * 2)
    if own:
        np.testing.assert_allclose(model.infer(x), model(x), rtol=1e-5, atol=1e-6)
    model.fit(x, x[:, :1], verbose=0)
    assert len(model.trainable_variables) == 4


def test_a_model_without_call_whose_parts_are_built():
    """Like keras.io's VAE and GAN, whose parts are models that train_step calls."""

    class Gan(keras.Model):
        def __init__(self, generator, discriminator):
            super().__init__()
            self.generator, self.discriminator = generator, discriminator

    generator = keras.Sequential([keras.Input((3,)), keras.layers.Dense(8)])
    discriminator = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    gan = Gan(generator, discriminator)
    expected = discriminator(generator(normal(4, 3)))
    assert tfwn.reparameterize(gan) is gan
    assert gan.generator is generator
    assert isinstance(generator.layers[0], WeightNormalization)
    assert len(gan.trainable_variables) == 6
    np.testing.assert_allclose(discriminator(generator(normal(4, 3))), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="is not built"):
        tfwn.reparameterize(Gan(keras.Sequential([keras.layers.Dense(8)]), discriminator))


def test_two_models_of_one_graph():
    """Converting one of two models with a shared layer converts that layer for both."""
    inputs = keras.Input((8,))
    code = keras.layers.Dense(3)(inputs)
    encoder, whole = keras.Model(inputs, code), keras.Model(inputs, keras.layers.Dense(8)(code))
    tfwn.reparameterize(whole)
    whole.layers[1].g.assign(whole.layers[1].g * 2)
    np.testing.assert_allclose(encoder(normal(4, 8)), whole.layers[1](normal(4, 8)), rtol=1e-6)
    tfwn.reparameterize(encoder)
    assert encoder.layers[1] is whole.layers[1]
    assert len(encoder.trainable_variables) == 3


def test_a_refused_model_stays_as_it_was():
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(3, kernel_regularizer="l2"),
            keras.layers.Dense(3, kernel_constraint="max_norm"),
        ]
    )
    with pytest.raises(ValueError, match="constraint"):
        tfwn.reparameterize(model)
    assert all(isinstance(layer, keras.layers.Dense) for layer in model.layers)
    assert isinstance(model.layers[0].kernel.regularizer, keras.regularizers.L2)
    with pytest.raises(ValueError, match="found no weight"):
        tfwn.reparameterize(keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.5)]))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_a_strategy_wrapped_outside_of_its_scope(name):
    make, x, _ = LAYERS[name]
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer = make()
        layer(x)
    wrapper = tfwn.reparameterize(layer)
    for one in wrapper.normalized:
        assert one.g.value.distribute_strategy is strategy
    outputs = strategy.experimental_local_results(strategy.run(wrapper, (x,)))
    np.testing.assert_allclose(outputs[0], outputs[1])


@keras.saving.register_keras_serializable("tests")
class Transposed(keras.layers.Layer):
    """Multiplies x by the transposed kernel of another layer."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer

    def call(self, x):
        kernel = getattr(self.layer, "embeddings", None)
        return keras.ops.matmul(
            x, keras.ops.transpose(self.layer.kernel if kernel is None else kernel)
        )


class Tied(keras.Model):
    def __init__(self, make):
        super().__init__()
        self.layer = make()
        self.head = Transposed(self.layer)

    def call(self, x):
        return self.head(self.layer(x))


TIED = {
    "dense": (lambda: keras.layers.Dense(5, use_bias=False), normal(4, 8)),
    "embedding": (lambda: keras.layers.Embedding(9, 3), tf.constant([[1, 2, 1]])),
}


@pytest.mark.parametrize("kind", ["functional", "subclass"])
@pytest.mark.parametrize("name", TIED)
def test_tied_kernels_have_one_g(name, kind):
    make, x = TIED[name]
    if kind == "subclass":
        model = Tied(make)
    else:
        layer = make()
        inputs = keras.Input(x.shape[1:], dtype=x.dtype)
        model = keras.Model(inputs, Transposed(layer)(layer(inputs)))
    expected = model(x)
    assert tfwn.reparameterize(model) is model
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    v, g = sorted(model.trainable_variables, key=lambda v: -len(v.shape))
    g.assign(g * 2)
    np.testing.assert_allclose(model(x), 4 * expected, rtol=1e-4, atol=1e-5)
    model.compile("sgd", "mse")
    model.fit(x, expected, verbose=0)
    expected = model(x)
    tfwn.fold(model)
    assert [one.path for one in model.trainable_variables] == [v.path]
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)


class Borrowed(keras.layers.Layer):
    """Uses the kernel of another layer as its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def build(self, shape):
        self.kernel = self.layer.kernel

    def call(self, x):
        return x @ self.kernel


def test_a_kernel_that_two_layers_have_as_their_own_is_refused():
    layer, x = keras.layers.Dense(5), normal(2, 5)
    model = keras.Sequential([keras.Input([5]), layer, Borrowed(layer)])
    expected = model(x)
    with pytest.raises(ValueError, match=r"is a kernel of .*: let one layer have the kernel"):
        tfwn.reparameterize(model)
    np.testing.assert_array_equal(model(x), expected)


class Constant(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.01


class Slotted(keras.optimizers.Optimizer):
    """An optimizer without a config, whose build() appends to a list."""

    def __init__(self, factor):
        super().__init__(0.01)
        self.factor, self.sums = factor, []

    def build(self, variables):
        super().build(variables)
        for v in variables:
            self.sums.append(self.add_variable_from_reference(v, "sum"))

    def update_step(self, gradient, variable, learning_rate):
        total = self.sums[self._get_variable_index(variable)]
        self.assign_add(total, gradient)
        self.assign_sub(variable, self.factor * learning_rate * total)


OPTIMIZERS = {
    "schedule": lambda: keras.optimizers.Adam(Constant()),
    "lambda": lambda: keras.optimizers.Adam(lambda: 0.01),
    "no config": lambda: Slotted(3),
    "average": lambda: keras.optimizers.SGD(0.01, momentum=0.9, use_ema=True),
    "accumulation": lambda: keras.optimizers.Adam(gradient_accumulation_steps=2),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW()),
}
if hasattr(keras.optimizers, "MultiOptimizer"):
    OPTIMIZERS["several"] = lambda: keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(keras.optimizers.SGD(), {".*kernel": Slotted(3)})
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_restarts(name):
    """It continues as a new optimizer of the same kind would."""
    models = [net("sequential") for _ in range(2)]
    models[1].set_weights(models[0].get_weights())
    x, optimizer = normal(16, 8), OPTIMIZERS[name]()
    models[0].compile(optimizer, "mse")
    models[0].fit(x, x[:, :1], verbose=0)
    for change in (tfwn.reparameterize, tfwn.fold):
        for model in models:
            change(model)
        models[1].set_weights(models[0].get_weights())
        models[1].compile(OPTIMIZERS[name](), "mse")
        for model in models:
            model.fit(x, x[:, :1], epochs=2, batch_size=4, shuffle=False, verbose=0)
        for one, other in zip(models[0].weights, models[1].weights, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
        assert models[0].optimizer is optimizer
        assert [v.shape for v in optimizer.variables] == [
            v.shape for v in models[1].optimizer.variables
        ]


class TwoOptimizers(keras.Model):
    """Names its optimizers itself, as models of adversarial networks do."""

    def __init__(self):
        super().__init__()
        self.one, self.two = keras.layers.Dense(8), keras.layers.Dense(1)

    def compile(self):
        super().compile()
        self.first, self.others = keras.optimizers.SGD(), [keras.optimizers.Adam()]

    def call(self, x):
        return self.two(self.one(x))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x) - y) ** 2)
        parts = [self.one.trainable_variables, self.two.trainable_variables]
        for optimizer, variables, gradients in zip(
            (self.first, *self.others), parts, tape.gradient(loss, parts), strict=True
        ):
            optimizer.apply(gradients, variables)
        return {"loss": loss}


def test_optimizers_under_other_names_restart():
    x, model = normal(16, 8), TwoOptimizers()
    model.compile()
    for change in (lambda model: None, tfwn.reparameterize, tfwn.fold):
        change(model)
        model.fit(x, x[:, :1], verbose=0)


@pytest.mark.parametrize("change", [tfwn.reparameterize, tfwn.fold])
def test_the_optimizer_stays_in_its_strategy(change):
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = net("sequential")
        if change is tfwn.fold:
            tfwn.reparameterize(model)
        model.compile("adam", "mse")
    x = normal(16, 8)
    model.fit(x, x[:, :1], verbose=0)
    change(model).fit(x, x[:, :1], verbose=0)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("how", ["names", "variables"])
def test_g_decays_only_if_its_v_does(how, built):
    model, x = net("sequential"), normal(16, 8)
    optimizer = keras.optimizers.AdamW(weight_decay=0.1)
    if how == "names":
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    else:
        optimizer.exclude_from_weight_decay(var_list=[model.layers[0].kernel])
    model.compile(optimizer, "mse")
    if built:
        model.fit(x, x[:, :1], verbose=0)

    def decaying():
        variables = {v.path.split("/", 1)[1]: v for v in model.trainable_variables}
        return {path for path, v in variables.items() if optimizer._use_weight_decay(v.value)}

    before, last = decaying(), model.layers[1].name
    tfwn.reparameterize(model)
    kernels = {"hidden/kernel_g", f"{last}/kernel_g"} if how == "names" else {f"{last}/kernel_g"}
    assert decaying() == before | kernels
    tfwn.fold(model)
    assert decaying() == before


def test_paths_are_those_of_the_layers():
    def part(name):
        return keras.Sequential([keras.Input([4]), keras.layers.Dense(4, name="dense")], name=name)

    model = tfwn.reparameterize(keras.Sequential([keras.Input([4]), part("a"), part("b")]))
    assert [v.path for v in model.trainable_variables if v.name == "kernel_g"] == [
        "a/dense/kernel_g",
        "b/dense/kernel_g",
    ]
    model.compile("sgd", "mse")
    model.set_state_tree(model.get_state_tree())


@pytest.mark.parametrize("how", ["reparameterize", "wrapper", "named wrapper"])
def test_layers_keep_their_names(how, tmp_path):
    inputs, x = keras.Input([4]), normal(8, 4)
    outputs = []
    for name in ("a", "b"):
        layer = keras.layers.Dense(3, name=None if how == "named wrapper" else name)
        if how != "reparameterize":
            layer = WeightNormalization(layer, name=name if how == "named wrapper" else None)
        outputs.append(layer(inputs))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"a": "mse", "b": "mae"})
    if how == "reparameterize":
        tfwn.reparameterize(model)
    for change in (lambda model: model, tfwn.fold):
        change(model).save(tmp_path / "model.keras")
        for one in (model, keras.models.load_model(tmp_path / "model.keras")):
            assert one.output_names == ["a", "b"]
            np.testing.assert_array_equal(one.get_layer("b")(x), one(x)[1])
            one.fit(x, {"a": x[:, :3], "b": x[:, 1:]}, verbose=0)
