"""Tests layers that are restored before their first call, and the mark `initialized`."""

import copy

import numpy as np
import pytest
import tensorflow as tf

import tfwn

LAYERS = {
    "dense": (lambda: tfwn.Dense(3), [50, 6]),
    "normal": (lambda: tfwn.Dense(3, parameterization="normal"), [50, 6]),
    "conv": (lambda: tfwn.Conv2D(4, 2, groups=2), [20, 5, 5, 4]),
    "transposed": (lambda: tfwn.Conv1DTranspose(3, 2, strides=2), [20, 5, 4]),
    "depthwise": (lambda: tfwn.DepthwiseConv2D(2, exponential_g=True), [20, 5, 5, 4]),
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())


def batch(shape):
    return tf.random.stateless_normal(shape, [1, 2], mean=1.0)


@every_layer
def test_a_checkpoint_restored_before_the_first_call(make, shape, tmp_path):
    x = batch(shape)
    layer = make()
    tfwn.data_dependent_init(layer, x)
    path = tf.train.Checkpoint(model=layer).save(tmp_path / "checkpoint")
    restored = make()
    status = tf.train.Checkpoint(model=restored).restore(path)
    assert tfwn.is_initialized(restored)
    np.testing.assert_array_equal(restored(x), layer(x))
    status.assert_consumed()


@every_layer
def test_restore_or_initialize(make, shape, tmp_path):
    x = batch(shape)

    def run():
        layer = make()
        manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(model=layer),
            tmp_path,
            max_to_keep=1,
            init_fn=lambda: tfwn.data_dependent_init(layer, x),
        )
        return layer, manager, manager.restore_or_initialize()

    first, manager, path = run()
    assert path is None
    first.b.assign_add([1.0] * first.b.shape[0])
    manager.save()
    second, _, path = run()
    assert path is not None
    np.testing.assert_array_equal(second(x), first(x))


def test_a_model_that_makes_its_layers_in_its_first_call(tmp_path):
    class Lazy(tf.Module):
        layer = None

        def __call__(self, x):
            if self.layer is None:
                self.layer = tfwn.Dense(3)
            return self.layer(x)

    x = batch([50, 6])
    model, restored = Lazy(), Lazy()
    tfwn.data_dependent_init(model, x)
    path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    tf.train.Checkpoint(model=restored).restore(path)
    with pytest.raises(RuntimeError, match=r"initialized already.* after this call"):
        tfwn.data_dependent_init(restored, x)
    np.testing.assert_array_equal(restored(x), model(x))
    assert tfwn.is_initialized(restored)


@every_layer
def test_the_mark_is_no_number_of_the_model(make, shape, tmp_path):
    """Code that treats all variables as floats must not meet the mark."""

    class Model(tf.Module):
        def __init__(self):
            self.layers = [make()]

    model, x = Model(), batch(shape)
    tfwn.data_dependent_init(model.layers[0], x)
    assert all(variable.dtype == tf.float32 for variable in model.variables)
    for variable in model.variables:
        variable.assign(0.5 * variable)
    assert tfwn.is_initialized(model)
    assert tfwn.is_initialized(copy.deepcopy(model))
    tf.saved_model.save(model, str(tmp_path))
    assert bool(tf.saved_model.load(str(tmp_path)).layers[0].initialized)


@every_layer
def test_a_checkpoint_has_the_mark_where_version_0_1_0_had_it(make, shape, tmp_path):
    """The mark keeps its key, so that old and new versions read each other's checkpoints."""
    layer = make()
    layer(batch(shape))
    path = tf.train.Checkpoint(model=layer).save(tmp_path / "checkpoint")
    keys = tf.train.load_checkpoint(path).get_variable_to_shape_map()
    assert "model/initialized/.ATTRIBUTES/VARIABLE_VALUE" in keys
