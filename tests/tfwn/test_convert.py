"""Tests tfwn.convert against PyTorch: both of its weight norms, in both directions."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
import tfwn.keras

# PyTorch's first weight norm is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*weight_norm.*")


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return torch


def state_of(module):
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def normalize(torch, module, generation, names=("weight",), dim=0):
    """Applies PyTorch's weight norm and changes g and v, so that w differs from v."""
    if generation == "normal":
        return module
    apply = {
        "weight_g": torch.nn.utils.weight_norm,
        "parametrizations": torch.nn.utils.parametrizations.weight_norm,
    }[generation]
    for name in names:
        apply(module, name, dim=dim)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5).add_(0.1 * torch.rand_like(parameter))
    return module


def run_torch(torch, module, x):
    """Returns a module's outputs. Inputs and outputs have the channels last."""
    to_first = (0, x.ndim - 1, *range(1, x.ndim - 1))
    with torch.no_grad():
        y = module(torch.from_numpy(np.transpose(x, to_first) if x.ndim > 2 else x)).numpy()
    return np.moveaxis(y, 1, -1) if x.ndim > 2 else y


def modules(torch):
    nn = torch.nn
    return {
        "linear": (nn.Linear(4, 3), lambda **o: tfwn.Dense(3, **o), (5, 4), 0),
        "no_bias": (
            nn.Linear(4, 3, bias=False),
            lambda **o: tfwn.Dense(3, use_bias=False, **o),
            (5, 4),
            0,
        ),
        "conv1d": (
            nn.Conv1d(4, 6, 3, groups=2),
            lambda **o: tfwn.Conv1D(6, 3, groups=2, **o),
            (2, 7, 4),
            0,
        ),
        "conv2d": (
            nn.Conv2d(3, 5, (2, 3)),
            lambda **o: tfwn.Conv2D(5, (2, 3), **o),
            (2, 6, 7, 3),
            0,
        ),
        "conv3d": (nn.Conv3d(2, 3, 2), lambda **o: tfwn.Conv3D(3, 2, **o), (1, 3, 4, 5, 2), 0),
        "depthwise": (
            nn.Conv2d(3, 6, 3, groups=3),
            lambda **o: tfwn.DepthwiseConv2D(3, depth_multiplier=2, **o),
            (2, 6, 6, 3),
            0,
        ),
        "transpose1d": (
            nn.ConvTranspose1d(4, 3, 3, stride=2),
            lambda **o: tfwn.Conv1DTranspose(3, 3, strides=2, **o),
            (2, 5, 4),
            1,
        ),
        "transpose2d": (
            nn.ConvTranspose2d(3, 5, 3),
            lambda **o: tfwn.Conv2DTranspose(5, 3, **o),
            (2, 5, 5, 3),
            1,
        ),
        "transpose3d": (
            nn.ConvTranspose3d(2, 3, 2),
            lambda **o: tfwn.Conv3DTranspose(3, 2, **o),
            (1, 3, 3, 4, 2),
            1,
        ),
    }


NAMES = [
    *("linear", "no_bias", "conv1d", "conv2d", "conv3d", "depthwise"),
    *("transpose1d", "transpose2d", "transpose3d"),
]
generations = pytest.mark.parametrize("generation", ["normal", "weight_g", "parametrizations"])


@generations
@pytest.mark.parametrize("parameterization", ["weight_norm", "normal"])
@pytest.mark.parametrize("name", NAMES)
def test_feed_forward_layers(torch, name, generation, parameterization, rng):
    module, make, shape, dim = modules(torch)[name]
    module = normalize(torch, module, generation, dim=dim)
    x = rng.normal(size=shape).astype(np.float32)
    expected = run_torch(torch, module, x)
    layer = make(parameterization=parameterization)
    tfwn.convert.from_torch(module.state_dict(), layer)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)

    # The conversion back restores every name and every number.
    state = state_of(module)
    back = tfwn.convert.to_torch(layer, generation)
    assert {n: a.shape for n, a in back.items()} == {n: a.shape for n, a in state.items()}
    if parameterization == "weight_norm" and generation != "normal":
        for key, value in state.items():
            np.testing.assert_array_equal(back[key], value)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in back.items()})
    np.testing.assert_allclose(run_torch(torch, module, x), expected, rtol=1e-4, atol=1e-5)


@generations
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("name", ["linear", "transpose2d", "depthwise"])
def test_another_dim_keeps_the_function(torch, name, dim, generation, rng):
    module, make, shape, _ = modules(torch)[name]
    module = normalize(torch, module, generation, dim=dim)
    x = rng.normal(size=shape).astype(np.float32)
    layer = make()
    tfwn.convert.from_torch(module.state_dict(), layer)
    np.testing.assert_allclose(layer(x), run_torch(torch, module, x), rtol=1e-4, atol=1e-5)


@generations
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_recurrent_layers(torch, kind, generation, rng):
    module = getattr(torch.nn, kind)(3, 4, num_layers=2, batch_first=True)
    names = ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]
    module = normalize(torch, module, generation, names)
    make = getattr(tfwn, {"RNN": "SimpleRNN"}.get(kind, kind))
    first, second = make(4, return_sequences=True), make(4, return_sequences=True)
    tfwn.convert.from_torch(
        {f"rnn.{name}": tensor for name, tensor in module.state_dict().items()},
        {"rnn": first, "rnn@l1": second},
    )
    x = rng.normal(size=[2, 5, 3]).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x))[0].numpy()
    np.testing.assert_allclose(second(first(x)), expected, rtol=1e-4, atol=1e-5)
    back = tfwn.convert.to_torch({"": first, "@l1": second}, generation)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in back.items()})
    with torch.no_grad():
        again = module(torch.from_numpy(x))[0].numpy()
    np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-5)


def test_both_directions_of_a_bidirectional_layer(torch, rng):
    module = torch.nn.LSTM(3, 4, batch_first=True, bidirectional=True)
    module = normalize(torch, module, "parametrizations", ["weight_ih_l0", "weight_hh_l0_reverse"])
    forward = tfwn.LSTM(4, return_sequences=True)
    backward = tfwn.LSTM(4, return_sequences=True, go_backwards=True)
    layers = {"": forward, "@l0_reverse": backward}
    tfwn.convert.from_torch(module, layers)
    x = rng.normal(size=[2, 5, 3]).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x))[0].numpy()
    found = np.concatenate([forward(x), backward(x)[:, ::-1]], -1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["conv2d", "depthwise", "transpose2d"])
def test_channels_first(torch, name, rng):
    module, make, shape, dim = modules(torch)[name]
    module = normalize(torch, module, "weight_g", dim=dim)
    layer, x = make(data_format="channels_first"), rng.normal(size=shape).astype(np.float32)
    tfwn.convert.from_torch(module, layer)
    found = tf.transpose(layer(tf.transpose(x, [0, 3, 1, 2])), [0, 2, 3, 1])
    np.testing.assert_allclose(found, run_torch(torch, module, x), rtol=1e-4, atol=1e-5)


@generations
@pytest.mark.parametrize("parameterization", ["weight_norm", "normal"])
@pytest.mark.parametrize("types", [{"compute_dtype": "bfloat16"}, {"dtype": "bfloat16"}], ids=str)
def test_half_precision_goes_to_torch(torch, types, parameterization, generation, rng):
    """PyTorch gets w as exact as the variables, even if a call of the layer rounds it."""
    mask = np.tri(4, 3)
    layer = tfwn.Dense(3, kernel_mask=mask, parameterization=parameterization, **types)
    layer.build([None, 4])
    variable = layer.weight.w if parameterization == "normal" else layer.weight.v
    variable.assign_add(tf.cast(1 - mask, variable.dtype))  # Masked, so it must not count.
    module = normalize(torch, torch.nn.Linear(4, 3), generation)
    state = tfwn.convert.to_torch(layer, generation)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    rtol = 1e-2 if "dtype" in types else 1e-6  # v, g and b are in bfloat16.
    found = run_torch(torch, module, np.eye(4, dtype=np.float32))
    np.testing.assert_allclose(found, layer.weight(tf.float32), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(torch, kind, rng):
    module = getattr(torch.nn, kind)(3, 4)
    cell = getattr(tfwn, kind.replace("RNNCell", "SimpleRNNCell"))(4)
    tfwn.convert.from_torch(module.state_dict(), cell)
    x = rng.normal(size=[2, 3]).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x))
    expected = expected[0] if kind == "LSTMCell" else expected
    output, _ = cell(x, cell.get_initial_state(2))
    np.testing.assert_allclose(output, expected.numpy(), rtol=1e-4, atol=1e-5)


@generations
def test_embedding(torch, generation):
    module = normalize(torch, torch.nn.Embedding(5, 3), generation)
    layer = tfwn.Embedding(5, 3)
    tfwn.convert.from_torch(module.state_dict(), layer)
    with torch.no_grad():
        expected = module(torch.tensor([1, 3])).numpy()
    np.testing.assert_allclose(layer(tf.constant([1, 3])), expected, rtol=1e-5)
    back = tfwn.convert.to_torch(layer, generation)
    for name, value in state_of(module).items():
        np.testing.assert_allclose(back[name], value, rtol=1e-5)


def test_a_training_step_goes_on_as_it_would_in_torch(torch, rng):
    module = normalize(torch, torch.nn.Linear(4, 3), "parametrizations")
    layer = tfwn.Dense(3)
    tfwn.convert.from_torch(module.state_dict(), layer)
    x = rng.normal(size=[6, 4]).astype(np.float32)
    module(torch.from_numpy(x)).square().sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.sub_(0.01 * parameter.grad)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x) ** 2)
    gradients = tape.gradient(loss, layer.trainable_variables)
    for variable, gradient in zip(layer.trainable_variables, gradients, strict=True):
        variable.assign_sub(0.01 * gradient)
    for name, value in tfwn.convert.to_torch(layer).items():
        np.testing.assert_allclose(value, state_of(module)[name], rtol=1e-4, atol=1e-6)


def keras_wrappers():
    layers = keras.layers
    return {
        "linear": lambda: layers.Dense(3),
        "no_bias": lambda: layers.Dense(3, use_bias=False),
        "conv1d": lambda: layers.Conv1D(6, 3, groups=2),
        "conv2d": lambda: layers.Conv2D(5, (2, 3)),
        "conv3d": lambda: layers.Conv3D(3, 2),
        "depthwise": lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        "transpose1d": lambda: layers.Conv1DTranspose(3, 3, strides=2),
        "transpose2d": lambda: layers.Conv2DTranspose(5, 3),
        "transpose3d": lambda: layers.Conv3DTranspose(3, 2),
    }


@generations
@pytest.mark.parametrize("axis", ["auto", None])
@pytest.mark.parametrize("name", NAMES)
def test_modules_into_wrapped_keras_layers(torch, name, axis, generation, rng):
    module, _, shape, dim = modules(torch)[name]
    module = normalize(torch, module, generation, dim=dim)
    x = rng.normal(size=shape).astype(np.float32)
    expected = run_torch(torch, module, x)
    layer = tfwn.keras.WeightNormalization(keras_wrappers()[name](), axis=axis)
    tfwn.convert.from_torch(module, layer)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
    back = tfwn.convert.to_torch(layer, generation)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in back.items()})
    np.testing.assert_allclose(run_torch(torch, module, x), expected, rtol=1e-4, atol=1e-5)


@generations
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_recurrent_modules_into_wrapped_keras_layers(torch, kind, generation, rng):
    module = getattr(torch.nn, kind)(3, 4, batch_first=True)
    module = normalize(torch, module, generation, ["weight_ih_l0", "weight_hh_l0"])
    make = getattr(keras.layers, {"RNN": "SimpleRNN"}.get(kind, kind))
    x = rng.normal(size=[2, 5, 3]).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x))[0].numpy()
    for options in ({}, {"weight_names": ["recurrent_kernel"]}):
        layer = tfwn.keras.WeightNormalization(make(4, return_sequences=True), **options)
        tfwn.convert.from_torch(module, layer)
        np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_what_has_no_counterpart(torch):
    grouped = torch.nn.ConvTranspose1d(4, 6, 3, groups=2)
    for layer in (
        tfwn.Conv1DTranspose(6, 3),
        tfwn.keras.WeightNormalization(keras.layers.Conv1DTranspose(6, 3)),
    ):
        with pytest.raises(ValueError, match="transposed convolution with groups=2"):
            tfwn.convert.from_torch(grouped, layer)
    einsum = tfwn.keras.WeightNormalization(keras.layers.EinsumDense("ab,bc->ac", [6]))
    with pytest.raises(ValueError, match="no counterpart"):
        tfwn.convert.from_torch(torch.nn.Linear(4, 6), einsum)
    with pytest.raises(ValueError, match="is not weight-normalized"):
        tfwn.convert.from_torch(torch.nn.Linear(4, 6), keras.layers.Dense(6))


def test_torch_half_precision_tensors(torch):
    state = {"weight": torch.ones(2, 3, dtype=torch.bfloat16), "bias": torch.zeros(2)}
    layer = tfwn.Dense(2)
    tfwn.convert.from_torch(state, layer)
    np.testing.assert_allclose(layer.weight(), np.ones([3, 2]), rtol=1e-6)


def linear(**changes):
    return {"weight": np.ones([2, 3], np.float32), "bias": np.zeros(2, np.float32)} | changes


def unchanged(layer, state, message, **options):
    before = [variable.numpy() for variable in layer.variables]
    with pytest.raises(ValueError, match=message):
        tfwn.convert.from_torch(state, layer, **options)
    for old, variable in zip(before, layer.variables, strict=True):
        np.testing.assert_array_equal(variable, old)


def test_errors_leave_the_layer_alone():
    layer = tfwn.Dense(2)
    layer.build([None, 3])
    unchanged(layer, {"bias": np.zeros(2)}, r"neither weight nor any of.*it has \['bias'\]")
    unchanged(layer, linear(weight=np.ones([3, 2])), r"layout, \(2, 3\), got \(3, 2\)")
    unchanged(layer, {"weight": np.ones([2, 3])}, "has a bias, but the state dict has none")
    unchanged(layer, linear(bias=np.zeros(3)), r"bias of shape \(3,\), expected \(2,\)")
    unchanged(layer, linear(other=np.zeros(3)), r"belong to no layer: \['other'\]")
    tfwn.convert.from_torch(linear(other=np.zeros(3)), layer, strict=False)
    np.testing.assert_allclose(layer.weight(), np.ones([3, 2]), rtol=1e-6)

    no_bias = tfwn.Dense(2, use_bias=False)
    no_bias.build([None, 3])
    unchanged(no_bias, linear(), "has no bias, but")
    exponential = tfwn.Dense(2, exponential_g=True)
    exponential.build([None, 3])
    state = {"weight_v": np.ones([2, 3]), "weight_g": [[1.0], [-1.0]], "bias": np.zeros(2)}
    unchanged(exponential, state, "g must be positive")
    unchanged(exponential, linear(weight=np.eye(2, 3) * [[1], [0]]), "weight: a unit is zero")
    for g in (np.ones(2), np.ones([1, 2]), np.ones([2, 3, 1])):
        state = {"weight_v": np.ones([2, 3]), "weight_g": g, "bias": np.zeros(2)}
        unchanged(layer, state, r"weight: the shape of g must be \[\] or that of v, \[2, 3\]")
    with pytest.raises(ValueError, match="generation must be one of"):
        tfwn.convert.to_torch(layer, "first")
    with pytest.raises(ValueError, match="no variables yet"):
        tfwn.convert.to_torch(tfwn.Dense(2))
    with pytest.raises(ValueError, match="no counterpart"):
        tfwn.convert.to_torch(tfwn.MeanOnlyBatchNormalization())
    with pytest.raises(ValueError, match="reset_after=False"):
        tfwn.convert.to_torch(tfwn.GRU(2, reset_after=False))
    with pytest.raises(ValueError, match="peepholes"):
        tfwn.convert.to_torch(tfwn.LSTMCell(2, peepholes=True))


def test_plain_arrays_there_and_back(rng):
    weights = {
        "dense/w": rng.normal(size=[4, 3]),
        "dense/b": rng.normal(size=[3]),
        "up/w": rng.normal(size=[3, 3, 5, 2]).astype(np.float32),
    }

    def axis(name):
        return -2 if name.startswith("up") else -1

    parts = tfwn.convert.to_weight_norm(weights, axis)
    assert {name: part.shape for name, part in parts.items()} == {
        "dense/w/v": (4, 3),
        "dense/w/g": (3,),
        "dense/b": (3,),
        "up/w/v": (3, 3, 5, 2),
        "up/w/g": (5,),
    }
    np.testing.assert_allclose(parts["dense/w/g"], np.linalg.norm(weights["dense/w"], axis=0))
    assert parts["up/w/g"].dtype == np.float32
    back = tfwn.convert.to_normal(parts, axis)
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_allclose(back[name], value, rtol=1e-6)
    expected = tfwn.weight_norm(parts["up/w/v"], 2 * parts["up/w/g"], -2)
    parts["up/w/g"] *= 2
    np.testing.assert_allclose(tfwn.convert.to_normal(parts, axis)["up/w"], expected, rtol=1e-6)


def test_plain_arrays_at_the_extremes():
    v = np.array([[0.0, 3e-30, 3e30], [0.0, 4e-30, 4e30]], np.float32)
    parts = tfwn.convert.to_weight_norm({"w": v})
    np.testing.assert_allclose(parts["w/g"], [0, 5e-30, 5e30], rtol=1e-6)
    np.testing.assert_allclose(tfwn.convert.to_normal(parts)["w"], v, rtol=1e-6)
    empty = tfwn.convert.to_weight_norm({"w": np.zeros([0, 3], np.float32)})
    np.testing.assert_array_equal(empty["w/g"], np.zeros(3))


def test_plain_array_errors():
    with pytest.raises(ValueError, match=r"axis must lie in \[-2, 2\)"):
        tfwn.convert.to_weight_norm({"w": np.ones([2, 2])}, axis=2)
    with pytest.raises(ValueError, match=r"w/g must have shape \(3,\), got \(2,\)"):
        tfwn.convert.to_normal({"w/v": np.ones([2, 3]), "w/g": np.ones(2)})
    integers = np.ones([2, 2], np.int32)
    with pytest.raises(ValueError, match="w must have a float dtype, got int32"):
        tfwn.convert.to_weight_norm({"w": integers}, select=lambda name: True)
    with pytest.raises(ValueError, match="w/v must have a float dtype, got int32"):
        tfwn.convert.to_normal({"w/v": integers, "w/g": np.ones(2)})


def test_tables_of_integers_are_no_weights():
    weights = {"ids": np.arange(6).reshape(2, 3), "w": tf.ones([2, 3], tf.bfloat16)}
    parts = tfwn.convert.to_weight_norm(weights)
    assert sorted(parts) == ["ids", "w/g", "w/v"]
    back = tfwn.convert.to_normal(parts)
    np.testing.assert_array_equal(back["ids"], weights["ids"])
    assert back["ids"].dtype == weights["ids"].dtype
    np.testing.assert_allclose(back["w"].astype(float), 1, rtol=2e-2)
