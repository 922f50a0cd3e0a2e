"""Tests the evaluation protocols in models/dqn/play.py."""

import numpy as np
import pytest
import tensorflow as tf
from catch import CATCH, config_of

from models.dqn import play


def act(states):
    """Returns Q-values with which the paddle never moves."""
    return tf.tile([[0.0, 1.0, 0.0]], [len(states), 1])


def test_a_score_has_its_standard_error(rng):
    scores = rng.normal(size=7)
    spread = np.sqrt(((scores - scores.mean()) ** 2).sum() / 6)
    np.testing.assert_allclose(play.standard_error(list(scores)), spread / np.sqrt(7), rtol=1e-12)
    assert np.isnan(play.standard_error([5.0]))


def test_natures_protocol_is_30_games_each_counted_once():
    scores, lengths = play.play_games(
        config_of(game=CATCH, protocol="nature", num_envs=8), act, [0]
    )
    assert len(scores) == 30
    assert lengths == [5] * 30


def test_the_papers_protocol_counts_the_games_that_end_within_its_steps():
    scores, _ = play.play_games(config_of(game=CATCH, test_steps=52, num_envs=4), act, [0])
    assert len(scores) == 4 * (13 // 5)


def test_if_no_game_ends_the_unfinished_ones_count():
    scores, lengths = play.play_games(config_of(game=CATCH, test_steps=16, num_envs=4), act, [0])
    assert (scores, lengths) == ([0.0] * 4, [4] * 4)


def test_the_mean_of_the_largest_q_is_over_all_states(rng):
    states = rng.integers(0, 256, (250, 84, 84, 4)).astype(np.uint8)
    by_state = states[:, 0, 0, :3].astype(float)
    found = play.mean_max_q(lambda part: part[:, 0, 0, :3], states)
    assert found == pytest.approx(by_state.max(1).mean())
