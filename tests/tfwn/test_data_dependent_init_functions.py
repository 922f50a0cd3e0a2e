"""Tests tfwn.data_dependent_init on functions: what they accept, and what is restored."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests.standard import check_standard, images
from tfwn.keras import WeightNormalization

X = images()[:, 0, 0, :]


class Parts(tf.Module):
    """Layers of which one has state, and the methods that call them."""

    def __init__(self):
        super().__init__()
        self.dense = tfwn.Dense(4)
        self.norm = keras.layers.BatchNormalization()
        self.norm.build([None, 3])

    def encode(self, x, training=False):
        return self.dense(self.norm(x, training=training))

    @tf.function
    def traced(self, x, training=False):
        return self.encode(x, training=training)

    def failing(self, x, training=False):
        self.encode(x, training=training)
        raise ZeroDivisionError


class Trainer:
    """An object of a class that TensorFlow does not know."""

    def __init__(self, parts):
        self.networks = {"first": [parts]}

    def forward(self, x, training=False):
        return self.networks["first"][0].encode(x, training)


PARTS = Parts()  # A global variable; the same object in each test.


def through_another(x, training):
    return tf.map_fn(lambda one: PARTS.encode(one, training), x[None])[0]


FUNCTIONS = {
    "method": lambda parts: parts.encode,
    "traced method": lambda parts: parts.traced,
    "traced lambda": lambda parts: tf.function(lambda x, training: parts.encode(x, training)),
    "closure": lambda parts: lambda x, training: parts.dense(parts.norm(x, training=training)),
    "global": lambda parts: lambda x, training: through_another(x, training=training),
    "partial": lambda parts: functools.partial(
        lambda of, x, training: of.encode(x, training), parts
    ),
    "partial keyword": lambda parts: functools.partial(
        lambda x, of, training: of.encode(x, training), of=parts
    ),
    "plain object": lambda parts: Trainer(parts).forward,
    "attribute": lambda parts: (lambda trainer: lambda x, **kw: trainer.forward(x, **kw))(
        Trainer(parts)
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_state_is_restored(name):
    PARTS.__init__()
    model = FUNCTIONS[name](PARTS)
    check_standard(tfwn.data_dependent_init(model, X))
    for variable, initial in ((PARTS.norm.moving_mean, 0), (PARTS.norm.moving_variance, 1)):
        np.testing.assert_array_equal(variable, np.full(3, initial, np.float32))
    assert tfwn.is_initialized(PARTS)


def test_state_is_restored_after_an_error():
    parts = Parts()
    parts.dense.build(X.shape)
    before = [np.array(variable) for variable in (*parts.variables, *parts.norm.variables)]
    with pytest.raises(ZeroDivisionError):
        tfwn.data_dependent_init(parts.failing, X)
    after = (*parts.variables, *parts.norm.variables)
    for old, variable in zip(before, after, strict=True):
        np.testing.assert_array_equal(variable, old)
    assert not tfwn.is_initialized(parts)


def test_a_partial_function_need_not_have_the_argument_training():
    layer = WeightNormalization(keras.layers.Dense(4))
    model = functools.partial(lambda scale, x: layer(x) * scale, 1.0)
    check_standard(tfwn.data_dependent_init(model, X))
    with pytest.raises(ValueError, match="no argument `training`"):
        tfwn.data_dependent_init(model, X, training=False)
