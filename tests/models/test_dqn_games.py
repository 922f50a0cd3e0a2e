"""models/dqn/games.py: what DQN sees and hears, against ALE itself."""

import ale_py
import numpy as np
import pytest

from models.common.errors import UserError
from models.dqn import config
from models.dqn.games import Atari, Environments, FrameStack, preprocess, rom_path

GAMES = ["SpaceInvaders", "Breakout", "Enduro", "Seaquest"]


def emulator(game, seed):
    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", seed)
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(rom_path(game))
    ale.reset_game()
    return ale


def naive_preprocess(screen):
    """The definition, one pixel at a time, in exact fractions of whole numbers."""
    height, width, _ = screen.shape
    red, green, blue = (screen[..., i].astype(int) for i in range(3))
    luminance = (299 * red + 587 * green + 114 * blue + 500) // 1000
    result = np.zeros((84, 84), np.uint8)
    for i in range(84):
        # 168 y is the height of the centre of row i, in rows of the screen.
        y, fy = divmod((2 * i + 1) * height - 84, 168)
        y0, y1 = max(y, 0), min(y + 1, height - 1)
        for j in range(84):
            x, fx = divmod((2 * j + 1) * width - 84, 168)
            x0, x1 = max(x, 0), min(x + 1, width - 1)
            total = (
                (168 - fy) * ((168 - fx) * luminance[y0, x0] + fx * luminance[y0, x1])
                + fy * ((168 - fx) * luminance[y1, x0] + fx * luminance[y1, x1])
            )  # fmt: skip
            result[i, j] = (total + 168 * 168 // 2) // 168**2
    return result


@pytest.mark.parametrize("shape", [(210, 160), (250, 160), (84, 84), (50, 40)])
def test_preprocessing_is_its_definition_on_any_pixels(rng, shape):
    screen = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    np.testing.assert_array_equal(preprocess(screen), naive_preprocess(screen))


@pytest.mark.parametrize("game", GAMES)
def test_frames_rewards_and_lives_are_those_of_the_raw_emulator(rng, game):
    env, ale = Atari(game, 5, noop_max=0), emulator(game, 5)
    actions = ale.getMinimalActionSet()
    assert env.num_actions == len(actions)
    np.testing.assert_array_equal(env.reset(), naive_preprocess(ale.getScreenRGB()))
    for number in range(120):
        action = int(rng.integers(len(actions)))
        screens, reward, lives = [], 0, ale.lives()
        for _ in range(4):
            reward += ale.act(actions[action])
            screens.append(ale.getScreenRGB())
        step = env.step(action)
        assert (step.reward, step.life_lost) == (reward, ale.lives() < lives)
        assert (step.over, step.cut) == (ale.game_over(), False)
        if number % 20 == 0:
            expected = naive_preprocess(np.maximum(screens[-2], screens[-1]))
            np.testing.assert_array_equal(step.frame, expected)


def test_flicker_is_seen_in_both_screens():
    """Space Invaders draws its shots in every other screen."""
    env = Atari("SpaceInvaders", 0)
    env.reset()
    differs = 0
    for _ in range(60):
        env.step(1)
        both = env.screens.max(0)
        differs += (both != env.screens[0]).any() and (both != env.screens[1]).any()
    assert differs > 5


def play(env, steps, seed=0):
    generator = np.random.default_rng(seed)
    result = []
    for _ in range(steps):
        step = env.step(int(generator.integers(env.num_actions)))
        result.append((step.frame.tobytes(), *step[1:]))
        if step.over or step.cut:
            result.append(env.reset().tobytes())
    return result


def test_a_lost_life_does_not_end_the_game_and_the_last_one_does():
    env = Atari("Breakout", 0)
    env.reset()
    lost = []
    for _ in range(2000):
        step = env.step(1)
        if step.life_lost:
            lost.append(step.over)
        if step.over:
            break
    assert lost == [False] * 4 + [True]


def test_a_game_begins_with_1_to_30_noops():
    env = Atari("Breakout", 3)
    starts = []
    for _ in range(60):
        env.reset()
        starts.append(env._ale.getEpisodeFrameNumber())
    assert (min(starts), max(starts)) == (1, 30)


def test_a_game_is_cut_at_its_longest_length_which_is_not_its_end():
    env = Atari("SpaceInvaders", 0, noop_max=0, max_frames=100)
    env.reset()
    outcomes = [env.step(0)[3:] for _ in range(25)]
    assert outcomes == [(False, False)] * 24 + [(False, True)]


def test_noops_after_a_life_let_the_game_go_on_unseen():
    plain, other = (Atari("Breakout", 0, noop_max=0, life_noops=n) for n in (0, 2))
    frames = []
    for env in (plain, other):
        env.reset()
        while not env.step(1).life_lost:
            pass
        frames.append(env._ale.getEpisodeFrameNumber())
    assert frames[1] == frames[0] + 2


@pytest.mark.parametrize("game", GAMES)
def test_a_saved_game_goes_on_as_it_would_have(game):
    env = Atari(game, 7, max_frames=1500)
    env.reset()
    play(env, 150)
    state = env.state_dict()
    expected = play(env, 400, seed=1)
    other = Atari(game, 8, max_frames=1500)
    other.reset()
    other.load_state_dict(state)
    assert play(other, 400, seed=1) == expected


def environments_of(count, seed=0, game="Breakout"):
    return Environments(lambda i: Atari(game, seed + i), count)


def test_an_ended_game_begins_anew_and_tells_its_score():
    games = environments_of(3, game="SpaceInvaders")
    games.reset()
    alone = Atari("SpaceInvaders", 1)
    alone.reset()
    score, length = 0.0, 0
    for _ in range(1000):
        step = alone.step(1)
        score, length = score + step.reward, length + 1
        after = games.step(np.ones(3, int))
        if after.over[1]:
            break
        np.testing.assert_array_equal(after.frames[1], step.frame)
    assert step.over
    assert score > 0
    index = after.over[:1].sum()
    assert (after.scores[index], after.lengths[index]) == (score, length)
    np.testing.assert_array_equal(after.frames[1], alone.reset())


def test_sent_and_received_is_stepped(rng):
    one, two = environments_of(2), environments_of(2)
    np.testing.assert_array_equal(one.reset(), two.reset())
    for _ in range(50):
        actions = rng.integers(0, 4, 2)
        one.send(actions)
        expected, got = two.step(actions), one.recv()
        for a, b in zip(expected, got, strict=True):
            np.testing.assert_array_equal(a, b)
    one.close()


def test_all_games_are_saved_with_their_scores_so_far(rng):
    games = environments_of(2)
    games.reset()
    plan = rng.integers(0, 4, (700, 2))
    for actions in plan[:100]:
        games.step(actions)
    state = games.state_dict()
    expected = [games.step(actions) for actions in plan[100:]]
    assert sum(len(after.scores) for after in expected) > 2
    other = environments_of(2, seed=50)
    other.reset()
    other.load_state_dict(state)
    for actions, want in zip(plan[100:], expected, strict=True):
        for a, b in zip(want, other.step(actions), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_stack_is_the_last_four_frames_and_zeros_before_a_game(rng):
    stack = FrameStack(2)
    frames = rng.integers(1, 255, (6, 2, 84, 84)).astype(np.uint8)
    for t, frame in enumerate(frames):
        stack.push(frame, np.array([t == 0, t in (0, 4)]))
    np.testing.assert_array_equal(stack.frames[0], np.moveaxis(frames[2:, 0], 0, -1))
    expected = np.moveaxis(frames[2:, 1], 0, -1).copy()
    expected[..., :2] = 0
    np.testing.assert_array_equal(stack.frames[1], expected)


@pytest.mark.parametrize("name", ["SpaceInvaders", "space_invaders", "space-invaders"])
def test_a_game_has_its_name_in_any_spelling(name):
    assert config.Config(game=name).game == "SpaceInvaders"
    assert rom_path(name).endswith("space_invaders.bin")


def test_an_unknown_game_is_told_with_the_nearest_names():
    with pytest.raises(UserError, match=r"--game SpaceInvader: .*did you mean SpaceInvaders"):
        config.rom_name("SpaceInvader")


def test_a_missing_rom_is_told_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr("ale_py.roms.get_rom_path", lambda _: tmp_path / "breakout.bin")
    with pytest.raises(UserError, match=r"lacks its ROM.*pip install --force-reinstall"):
        rom_path("Breakout")
