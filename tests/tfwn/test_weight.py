"""Tests Weight: parameterizations, masks, initialization, and an optimizer's step by hand."""

import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tfwn.weight import directed

OPTIONS = {
    "weight_norm": {},
    "exponential_g": {"exponential_g": True},
    "normal": {"parameterization": "normal"},
}
every_parameterization = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
# Shape, axis, and the axes over which the norm is taken.
LAYOUTS = [
    ([5, 3], -1, (0,)),
    ([5, 3], 0, (1,)),
    ([2, 3, 4, 5], (-2, -1), (0, 1)),
    ([2, 3, 4], -2, (0, 2)),
    ([2, 3], None, (0, 1)),
]


def norm(x, axes):
    return np.sqrt(np.sum(np.asarray(x, np.float64) ** 2, axes))


def test_axis_of_numpy():
    assert tfwn.Weight([2, 3], np.int64(-1)).axis == (1,)
    assert tfwn.Weight([2, 3], np.array([0, 1])).axis == (0, 1)


@every_parameterization
@pytest.mark.parametrize(("shape", "axis", "others"), LAYOUTS)
def test_g_and_direction(shape, axis, others, options, rng):
    weight = tfwn.Weight(shape, axis, dtype=tf.float64, **options)
    w = rng.normal(size=shape)
    weight.assign(w)
    np.testing.assert_allclose(weight(), w, rtol=1e-12)
    np.testing.assert_allclose(weight.get_g(), norm(w, others), rtol=1e-12)
    unit = w / norm(w, others).reshape([1 if a in others else n for a, n in enumerate(shape)])
    np.testing.assert_allclose(weight.direction(), unit, rtol=1e-12)

    g = rng.uniform(1, 2, weight.g_shape)
    weight.set_g(g)
    np.testing.assert_allclose(norm(weight(), others), g, rtol=1e-12)
    np.testing.assert_allclose(weight.direction(), unit, rtol=1e-12)


@pytest.mark.parametrize("g_initializer", [None, 2.0])
@every_parameterization
def test_first_weight_has_the_papers_distribution(options, g_initializer):
    weight = tfwn.Weight([400, 50], g_initializer=g_initializer, **options)
    w = weight().numpy()
    if g_initializer is None:
        assert abs(w.std() - 0.05) < 0.001
        assert abs(w.mean()) < 0.001
    else:
        np.testing.assert_allclose(norm(w, 0), 2, rtol=1e-6)


@pytest.mark.parametrize(
    "initializer",
    [
        "ones",
        tf.keras.initializers.Ones(),
        tf.ones_initializer(),
        1.0,
        1,
        lambda s, dtype: tf.ones(s),
    ],
)
def test_initializers(initializer):
    weight = tfwn.Weight([2, 3], initializer=initializer, dtype=tf.float64)
    np.testing.assert_array_equal(weight.v, np.ones([2, 3]))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@every_parameterization
def test_extreme_magnitudes(scale, options):
    weight = tfwn.Weight([7, 3], initializer=scale, **options)
    np.testing.assert_allclose(weight(), np.full([7, 3], scale), rtol=1e-5)
    np.testing.assert_allclose(weight.direction(), np.full([7, 3], 7**-0.5), rtol=1e-6)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
@every_parameterization
def test_variables_in_half_precision(dtype, options):
    weight = tfwn.Weight([64, 3], dtype=dtype, **options)
    assert {v.dtype for v in weight.variables} == {dtype}
    np.testing.assert_allclose(
        tf.cast(weight.get_g(), tf.float32), norm(tf.cast(weight(), tf.float32), 0), rtol=0.02
    )


@every_parameterization
def test_mask_acts_before_the_norm(options, rng):
    mask = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 1]])
    weight = tfwn.Weight([3, 3], mask=mask, dtype=tf.float64, **options)
    v = rng.normal(size=[3, 3])
    weight.assign(v)
    np.testing.assert_allclose(weight(), v * mask, rtol=1e-12)
    weight.set_g([2.0, 2.0, 2.0])
    # The second unit is fully masked, so its norm stays 0.
    np.testing.assert_allclose(norm(weight(), 0), [2, 0, 2], rtol=1e-12)

    # Values that an optimizer might leave in masked elements have no effect.
    variable = weight.w if weight.parameterization == "normal" else weight.v
    w = weight().numpy()
    variable.assign(variable + 10.0 * (1 - mask))
    np.testing.assert_allclose(weight(), w, rtol=1e-12)

    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(weight() * rng.normal(size=[3, 3]))
    gradients = tape.gradient(loss, weight.trainable_variables)
    assert all(np.isfinite(g).all() for g in gradients)
    assert np.all(gradients[-1].numpy()[mask == 0] == 0)


@every_parameterization
def test_mask_broadcasts(options):
    mask = np.array([1, 1, 0])[:, None]
    weight = tfwn.Weight([3, 2], mask=mask, **options)
    assert np.all(weight().numpy()[2] == 0)
    assert np.all(weight().numpy()[:2] != 0)


@every_parameterization
def test_rows_are_rows_of_w(options):
    weight = tfwn.Weight([6, 2, 3], 0, **options)
    ids = tf.constant([[0, 5], [5, 2]])
    np.testing.assert_allclose(weight.rows(ids), tf.gather(weight(), ids), rtol=1e-6)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(weight.rows(ids) ** 3)
    for gradient in tape.gradient(loss, weight.trainable_variables):
        assert isinstance(gradient, tf.IndexedSlices)


def test_exponential_g_is_the_exponential_of_s():
    weight = tfwn.Weight([4, 3], exponential_g=True, g_initializer=2.0)
    np.testing.assert_allclose(weight.s, np.log([2.0] * 3), rtol=1e-6)
    weight.s.assign([0.0, 1.0, -1.0])
    np.testing.assert_allclose(norm(weight(), 0), np.exp([0, 1, -1]), rtol=1e-6)


def test_made_inside_a_function():
    made = []

    @tf.function
    def first():
        if not made:
            made.append(tfwn.Weight([3, 2]))
        return made[0]()

    np.testing.assert_array_equal(first(), made[0]())


ERRORS = {
    "parameterization must be one of .*'weight_norm', 'normal'.*, got 'spectral'": dict(
        shape=[2, 3], parameterization="spectral"
    ),
    "dtype must be float16, bfloat16, float32 or float64, got int32": dict(
        shape=[2], dtype=tf.int32
    ),
    "compute_dtype must be float16, .* got complex64": dict(shape=[2], compute_dtype=tf.complex64),
    r"axis must lie in \[-2, 2\) for a weight of rank 2, got 2": dict(shape=[2, 3], axis=2),
    r"axis must not repeat an axis, got \(1, -1\)": dict(shape=[2, 3], axis=(1, -1)),
    "axis must be an int, a sequence of ints or None, got 1.0": dict(shape=[2, 3], axis=1.0),
    "axis must be an int, a sequence of ints or None, got 'in'": dict(shape=[2, 3], axis="in"),
    r"shape must be fully defined, got \(None, 3\)": dict(shape=[None, 3]),
    r"mask must broadcast to the weight's shape \(2, 3\), got shape \(4,\)": dict(
        shape=[2, 3], mask=np.ones(4)
    ),
}


@pytest.mark.parametrize(("message", "arguments"), ERRORS.items())
def test_errors(message, arguments):
    with pytest.raises(ValueError, match=message):
        tfwn.Weight(**arguments)


def test_errors_of_methods():
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"g must be positive where g = exp\(s\)"
    ):
        tfwn.Weight([2, 3], exponential_g=True, g_initializer=-1.0)
    with pytest.raises(
        ValueError, match=r"rows of a weight need axis=0 and no mask, got axis=\(1,\)"
    ):
        tfwn.Weight([2, 3]).rows([0])
    with pytest.raises(
        ValueError, match=r"axis=0 and no mask, got axis=.* and a mask: gather from"
    ):
        tfwn.Weight([2, 3], 0, mask=np.ones([2, 3])).rows([0])


def step_by_hand(v, g, x, y):
    """Returns grad_v and grad_g (eq. 3) of the loss |x w - y|^2 / 2, in float64."""
    length = np.sqrt(np.sum(v**2, 0))
    residual = x @ (g * v / length) - y
    grad_w = x.T @ residual
    grad_g = np.sum(grad_w * v, 0) / length
    return g / length * (grad_w - grad_g / length * v), grad_g


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_step_of_an_optimizer_is_the_step_by_hand(optimizer, rng):
    layer = tfwn.Dense(3, use_bias=False, dtype=tf.float64)
    x, y = rng.normal(size=[8, 5]), rng.normal(size=[8, 3])
    layer.build(x.shape)
    layer.weight.g.assign(rng.normal(size=3))
    v, g = layer.weight.v.numpy(), layer.weight.g.numpy()
    grad_v, grad_g = step_by_hand(v, g, x, y)

    with tf.GradientTape() as tape:
        loss = tf.reduce_sum((layer(x) - y) ** 2) / 2
    variables = [layer.weight.v, layer.weight.g]
    gradients = tape.gradient(loss, variables)
    if optimizer == "sgd":
        tf.keras.optimizers.SGD(0.125).apply_gradients(zip(gradients, variables, strict=True))
        expected = [v - 0.125 * grad_v, g - 0.125 * grad_g]
        tolerance = 1e-12
    else:
        # In Adam's first step the moments are the gradient and its square.
        adam = tf.keras.optimizers.Adam(0.125, epsilon=1e-3)
        adam.apply_gradients(zip(gradients, variables, strict=True))
        expected = [
            x - 0.125 * grad / (np.abs(grad) + 1e-3 / np.sqrt(1 - 0.999))
            for x, grad in ((v, grad_v), (g, grad_g))
        ]
        tolerance = 1e-5  # Keras keeps the betas in float32.
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable, value, rtol=tolerance, atol=tolerance)


def test_norm_of_v_never_decreases_under_gradient_descent(rng):
    """Paper, section 2.1: the gradient is orthogonal to v, so ||v'||^2 = ||v||^2 + |step|^2."""
    layer = tfwn.Dense(3, "tanh", dtype=tf.float64)
    x, y = rng.normal(size=[16, 5]), rng.normal(size=[16, 3])
    layer.build(x.shape)
    optimizer = tf.keras.optimizers.SGD(0.02)
    before = norm(layer.weight.v, 0)
    first = before
    for _ in range(50):
        v = layer.weight.v.numpy()
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((layer(x) - y) ** 2)
        gradients = tape.gradient(loss, layer.trainable_variables)
        optimizer.apply_gradients(zip(gradients, layer.trainable_variables, strict=True))
        after = norm(layer.weight.v, 0)
        step = norm(layer.weight.v.numpy() - v, 0)
        assert np.all(after >= before * (1 - 1e-15))
        np.testing.assert_allclose(after**2, before**2 + step**2, rtol=1e-12)
        before = after
    assert np.all(before > 1.01 * first)


@pytest.mark.parametrize("axis", [(), (1,), (0,), (0, 1)])
def test_units_of_zeros_get_a_direction_and_g_of_0(axis):
    g = tf.ones([(30, 40)[a] for a in axis])
    zeros, of_g = directed(tf.zeros([30, 40]), g, axis)
    assert np.all(zeros != 0)
    np.testing.assert_allclose(np.std(zeros), 0.05, rtol=0.1)
    np.testing.assert_array_equal(zeros, directed(tf.zeros([30, 40]), g, axis)[0])
    np.testing.assert_array_equal(of_g, tf.zeros_like(g))
    assert directed(tf.zeros([30, 40], tf.float16), g, axis)[0].dtype == tf.float16


def test_only_units_of_zeros_get_a_direction():
    v = np.ones([3, 4], np.float32)
    v[:, 1] = 0
    v[0, 2] = 0
    filled, g = directed(v, tf.ones([4]), (1,))
    np.testing.assert_array_equal(filled.numpy()[:, [0, 2, 3]], v[:, [0, 2, 3]])
    assert np.all(filled[:, 1] != 0)
    np.testing.assert_array_equal(g, [1, 0, 1, 1])
    traced = tf.function(lambda v: directed(v, tf.ones([4]), (1,)))
    np.testing.assert_array_equal(traced(v)[0], filled)
