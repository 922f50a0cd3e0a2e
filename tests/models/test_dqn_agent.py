"""Tests loss, optimizers, networks and actor in models/dqn/agent.py against their definitions."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from catch import CATCH, config_of, random_batch, random_states

import tfwn
from models.dqn import replay, training
from models.dqn.agent import Actor, FrameStack, Learner, Network, make_optimizer
from models.dqn.config import Config
from models.dqn.replay import Replay
from models.dqn.vector import Games, Steps


@pytest.fixture
def learner(rng):
    made = Learner(config_of(filters=(8, 8, 8), hidden=32), 6, tf.float32)
    made.initialize(random_states(rng))
    return made


def test_the_loss_is_the_huber_loss_of_the_td_error_summed(rng, learner):
    batch = random_batch(rng)
    s_t = np.moveaxis(batch.frames[:, :4], 1, -1)
    s_tp1 = np.moveaxis(batch.frames[:, 1:], 1, -1)
    q_t = learner.online(s_t).numpy().astype(np.float64)[np.arange(16), batch.actions]
    # The target network gets other weights, so that mixing up the two networks shows.
    for variable in learner.target.trainable_variables:
        variable.assign(variable * 1.1)
    q_tp1 = learner.target(s_tp1).numpy().astype(np.float64).max(1)
    error = batch.rewards + 0.99 * np.where(batch.terminals, 0, q_tp1) - q_t
    assert (abs(error) > 1).any()
    assert (abs(error) < 1).any()
    expected = np.where(abs(error) < 1, error**2 / 2, abs(error) - 0.5).sum()
    loss, q = learner.loss(batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(q, q_t.sum(), rtol=1e-4, atol=1e-4)


def test_the_error_s_derivative_is_clipped_and_does_not_flow_into_the_target(rng, learner):
    batch = random_batch(rng)
    with tf.GradientTape() as tape:
        loss, _ = learner.loss(batch)
    by_bias = tape.gradient(loss, learner.online.layers[-1].b)
    q_t = learner.online(np.moveaxis(batch.frames[:, :4], 1, -1)).numpy()
    q_tp1 = learner.target(np.moveaxis(batch.frames[:, 1:], 1, -1)).numpy().max(1)
    error = batch.rewards + 0.99 * ~batch.terminals * q_tp1 - q_t[np.arange(16), batch.actions]
    expected = np.zeros(6)
    np.add.at(expected, batch.actions, -np.clip(error, -1, 1))
    np.testing.assert_allclose(by_bias, expected, rtol=1e-4, atol=1e-5)


def test_the_learner_uses_the_papers_adamax(rng, learner):
    variables = learner.online.trainable_variables
    expected = [(p.numpy(), np.zeros(p.shape), np.zeros(p.shape)) for p in variables]
    for _ in range(3):
        gradients = [rng.normal(size=p.shape).astype(np.float32) for p in variables]
        learner.optimizer.apply([tf.constant(gradient) for gradient in gradients], variables)
        for i, ((p, m, u), gradient) in enumerate(zip(expected, gradients, strict=True)):
            m = 0.5 * m + 0.5 * gradient
            u = np.maximum(0.999 * u, abs(gradient))
            expected[i] = (p - 3e-4 * m / (u + 1e-6), m, u)
    for variable, (p, _, _) in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable, p, rtol=1e-5, atol=1e-7)


def test_rmsprop_is_natures(rng):
    w = tf.Variable(rng.normal(size=5), dtype=tf.float32)
    optimizer = make_optimizer(config_of(optimizer="rmsprop", learning_rate=2.5e-4), [w])
    expected, mean, square = w.numpy().astype(np.float64), np.zeros(5), np.zeros(5)
    for _ in range(4):
        gradient = rng.normal(size=5)
        optimizer.apply([tf.constant(gradient, tf.float32)], [w])
        mean = 0.95 * mean + 0.05 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        expected = expected - 2.5e-4 * gradient / np.sqrt(square - mean**2 + 0.01)
    np.testing.assert_allclose(w, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "golden"),
    [
        ("adamax", [11.427227, 21.236046, 16.344727, 7.752996]),
        ("rmsprop", [11.427227, 65.836609, 22.528992, 8.719635]),
    ],
)
def test_the_first_losses_are_golden(rng, optimizer, golden):
    config = config_of(filters=(8, 8, 8), hidden=32, optimizer=optimizer, learning_rate=1e-3)
    made = Learner(config, 6, tf.float32)
    made.initialize(random_states(rng))
    losses = []
    for _ in golden:
        made.update((random_batch(rng),))
        losses.append(made.sums.numpy()[0])
        made.sums.assign(tf.zeros(3))
    np.testing.assert_allclose(losses, golden, rtol=1e-5)


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_target_and_acting_networks_hold_the_effective_weights(rng, learner, dtype):
    copy = Network(config_of(filters=(8, 8, 8), hidden=32), 6, dtype, dtype)
    copy.copy_from(learner.online)
    states = random_states(rng, 8)
    # In float32, a tf.function and eager calls sum in different orders.
    tolerance = 1e-5 if dtype == tf.float32 else 0.05
    np.testing.assert_allclose(copy(states), learner.online(states), atol=tolerance)
    acting = learner.act(states).numpy()
    learner.update((random_batch(rng),))
    np.testing.assert_allclose(learner.act(states), learner.online(states), atol=1e-5)
    assert abs(learner.act(states).numpy() - acting).max() > 1e-3
    np.testing.assert_allclose(learner.target(states), acting, atol=1e-5)


def test_several_updates_in_one_call_equal_as_many_calls(rng):
    batches = [random_batch(rng) for _ in range(3)]
    states = random_states(rng)
    results = []
    for calls in ([(b,) for b in batches], [tuple(batches)]):
        made = Learner(config_of(), 6, tf.float32)
        made.initialize(states)
        for call in calls:
            made.update(call)
        results.append([v.numpy() for v in made.online.variables])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init_output", [1.0, 0.01])
def test_both_parameterizations_start_as_the_same_initialized_function(rng, init_output):
    states, q = random_states(rng), []
    for parameterization in ("normal", "weight_norm"):
        config = config_of(parameterization=parameterization, init_output=init_output)
        made = Learner(config, 6, tf.float32)
        made.initialize(states)
        assert tfwn.is_initialized(made.online)
        q.append(made.online(states).numpy() / init_output)
    np.testing.assert_allclose(q[0], q[1], atol=1e-5)
    np.testing.assert_allclose(q[0].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(q[0].std(0), 1, atol=1e-3)


def test_the_output_layer_may_be_left_uninitialized(rng):
    made = Learner(config_of(init_output=None), 6, tf.float32)
    before = made.online.layers[-1].weight().numpy()
    made.initialize(random_states(rng))
    np.testing.assert_array_equal(made.online.layers[-1].weight(), before)
    hidden = made.online.hidden(random_states(rng)).numpy()
    assert 0.3 < hidden.std() < 1


@pytest.mark.parametrize("parameterization", ["normal", "weight_norm"])
def test_natures_initial_weights_and_biases_are_uniform_up_to_the_root_of_fan_in(parameterization):
    made = Learner(Config.of_preset("nature", parameterization=parameterization), 6, tf.float32)
    fan_ins = (256, 512, 576, 3136, 512)
    for layer, fan_in in zip(made.online.layers, fan_ins, strict=True):
        w, b = (x.numpy().ravel() * fan_in**0.5 for x in (layer.weight(), layer.b))
        for values in (w, b):
            assert 0.5 < abs(values).max() <= 1 + 1e-5
            assert len(np.unique(values)) > 0.9 * len(values)
            # 6 standard deviations of a uniform variable's variance.
            assert abs(values.var() - 1 / 3) < 6 * 0.3 / len(values) ** 0.5
        assert np.isin(b, w).mean() < 0.5  # A few of 3136 * 512 values coincide.


def test_the_papers_preset_is_the_table_of_the_paper():
    config = Config()
    assert (config.steps, config.replay, config.learning_starts) == (50_000_000, 10**6, 50_000)
    assert (config.batch_size, config.update_every, config.target_every) == (64, 4, 10_000)
    learner = Learner(config, 6, tf.float32)
    shapes = [layer.weight.v.shape.as_list() for layer in learner.online.layers]
    assert shapes == [[8, 8, 4, 32], [4, 4, 32, 64], [3, 3, 64, 64], [3136, 512], [512, 6]]
    for rate, values in (
        (3e-4, {}),
        (1e-4, {"parameterization": "normal"}),
        (0.0, {"learning_rate": 0.0}),
    ):
        optimizer = make_optimizer(dataclasses.replace(config, **values), [tf.Variable(0.0)])
        assert float(optimizer.learning_rate) == np.float32(rate)


# The actor


def actor_of(num_envs=2, **values):
    config = config_of(num_envs=num_envs, game=CATCH, **values)
    memory = Replay(100, num_envs)
    games = Games(config, num_envs, 0, processes=0)
    actor = Actor(config, Learner(config, 3, tf.float32), games, memory)
    actor.begin()
    return actor, memory


def outcome(rewards, life_lost, over, cut):
    frames = np.zeros((len(rewards), 84, 84), np.uint8)
    columns = (np.array(column, bool) for column in (life_lost, over, cut))
    return Steps(frames, np.array(rewards, np.float32), *columns, [], [])


@pytest.mark.parametrize(("variant", "life_is_last"), [("nature", False), ("deep_q_rl", True)])
def test_rewards_are_clipped_and_a_lost_life_is_terminal_but_not_the_games_end(
    variant, life_is_last
):
    actor, memory = actor_of(4, variant=variant)
    after = outcome([7, -3, 0.5, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1])
    actor.remember(np.zeros(4, int), after)
    np.testing.assert_array_equal(memory._rewards[:, 0], [1, -1, 0.5, 0])
    ends = memory._ends[:, 0]
    np.testing.assert_array_equal(ends & replay.TERMINAL != 0, [True, True, False, False])
    np.testing.assert_array_equal(ends & replay.LAST != 0, [life_is_last, True, False, True])
    np.testing.assert_array_equal(ends & replay.CUT != 0, [False, False, False, True])


def test_the_stack_is_the_last_four_frames_and_zeros_before_a_game(rng):
    stack = FrameStack(2)
    frames = rng.integers(1, 255, (6, 2, 84, 84)).astype(np.uint8)
    for t, frame in enumerate(frames):
        stack.push(frame, np.array([t == 0, t in (0, 4)]))
    np.testing.assert_array_equal(stack.frames[0], np.moveaxis(frames[2:, 0], 0, -1))
    expected = np.moveaxis(frames[2:, 1], 0, -1).copy()
    expected[..., :2] = 0
    np.testing.assert_array_equal(stack.frames[1], expected)


def test_epsilon_decays_after_the_warm_up():
    actor, _ = actor_of(learning_starts=50, epsilon_steps=1000, epsilon=0.1)
    for step, expected in [(0, 1), (50, 1), (550, 0.55), (1050, 0.1), (9000, 0.1)]:
        assert actor.epsilon(step) == pytest.approx(expected)


@pytest.mark.parametrize("num_envs", [1, 2, 8])
def test_there_is_an_update_every_four_steps_after_the_warm_up(num_envs):
    actor, _ = actor_of(num_envs, learning_starts=40)
    due = [actor.updates(step) for step in range(0, 80, num_envs)]
    assert sum(due) == 10
    assert sum(due[: 40 // num_envs]) == 0


@pytest.mark.parametrize("variant", ["nature", "deep_q_rl"])
def test_the_target_network_is_copied_by_steps_but_by_updates_in_deep_q_rl(monkeypatch, variant):
    actor, _ = actor_of(1, variant=variant, learning_starts=20, target_every=6, batch_size=2)
    learner, copies = actor._learner, []
    learner.initialized.assign(True)
    monkeypatch.setattr(
        learner, "copy_to_target", lambda: copies.append((step + 1, int(iterations)))
    )
    iterations = learner.optimizer.iterations
    for step in range(90):
        training.advance(actor._config, learner, actor, step)
    steps, updates = zip(*copies, strict=True)
    if variant == "nature":
        assert list(steps) == list(range(6, 91, 6))
    else:  # A game has 5 actions and, after the 5th, an update.
        assert (list(updates), int(iterations)) == ([6, 12], 14)
