"""Tests the frames, rewards and lives from models/dqn/games.py against ALE itself."""

import ale_py
import gymnasium
import numpy as np
import pytest
from ale_py import roms

from models.common.errors import UserError
from models.dqn.config import Config, check_game, rom_of
from models.dqn.games import Atari, Screens, luminance, make_game, scale

GAMES = ["SpaceInvaders", "Breakout", "Enduro", "Seaquest"]


def emulator(game, seed):
    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", seed)
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path(rom_of(game)))
    ale.reset_game()
    return ale


def atari(game, scaling="bilinear", **options):
    return Atari(make_game(Config(game=game)).env, scaling, **options)


def naive_luminance(rgb):
    red, green, blue = (rgb[..., i].astype(int) for i in range(3))
    return (299 * red + 587 * green + 114 * blue + 500) // 1000


def naive_bilinear(gray):
    """The definition, pixel by pixel, in exact integer fractions."""
    height, width = gray.shape
    result = np.zeros((84, 84), np.uint8)
    for i in range(84):
        # The center of row i is at y + fy / 168, in rows of the screen.
        y, fy = divmod((2 * i + 1) * height - 84, 168)
        y0, y1 = max(y, 0), min(y + 1, height - 1)
        for j in range(84):
            x, fx = divmod((2 * j + 1) * width - 84, 168)
            x0, x1 = max(x, 0), min(x + 1, width - 1)
            total = (
                (168 - fy) * ((168 - fx) * gray[y0, x0] + fx * gray[y0, x1])
                + fy * ((168 - fx) * gray[y1, x0] + fx * gray[y1, x1])
            )  # fmt: skip
            result[i, j] = (total + 168 * 168 // 2) // 168**2
    return result


def naive_area(gray):
    """Splits each pixel into 84 x 84 parts; a target pixel is the mean of height * width parts."""
    height, width = gray.shape
    rows = np.add.reduceat(np.repeat(gray, 84, 0), np.arange(0, 84 * height, height), 0)
    both = np.add.reduceat(np.repeat(rows, 84, 1), np.arange(0, 84 * width, width), 1)
    return ((both + height * width // 2) // (height * width)).astype(np.uint8)


NAIVE = {"bilinear": naive_bilinear, "area": naive_area}


@pytest.mark.parametrize("scaling", NAIVE)
@pytest.mark.parametrize("shape", [(210, 160), (250, 160), (84, 84), (50, 40), (84, 421)])
def test_frames_are_their_definition_on_any_pixels(rng, shape, scaling):
    screen = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    gray = naive_luminance(screen)
    np.testing.assert_array_equal(luminance(screen), gray)
    np.testing.assert_array_equal(scale(luminance(screen), scaling), NAIVE[scaling](gray))
    np.testing.assert_array_equal(scale(np.full(shape, 255, np.uint8), scaling), 255)


def test_areas_are_averaged_as_opencv_does(rng):
    cv2 = pytest.importorskip("cv2")
    gray = rng.integers(0, 256, (210, 160)).astype(np.uint8)
    expected = cv2.resize(gray, (84, 84), interpolation=cv2.INTER_AREA)
    assert abs(scale(gray, "area").astype(int) - expected).max() <= 1  # OpenCV sums in float32.


@pytest.mark.parametrize("scaling", NAIVE)
@pytest.mark.parametrize("game", GAMES)
def test_frames_rewards_and_lives_are_those_of_the_raw_emulator(rng, game, scaling):
    env, ale = atari(game, scaling, noop_max=0), emulator(game, 5)
    actions = ale.getMinimalActionSet()
    assert env.action_space.n == len(actions)
    naive = lambda rgb: NAIVE[scaling](naive_luminance(rgb))  # noqa: E731
    np.testing.assert_array_equal(env.reset(seed=5)[0], naive(ale.getScreenRGB()))
    for number in range(120):
        action = rng.integers(len(actions))
        screens, expected, lives = [], 0, ale.lives()
        for _ in range(4):
            expected += ale.act(actions[action])
            screens.append(ale.getScreenRGB())
        frame, reward, over, cut, info = env.step(action)
        assert (reward, info.get("life_lost", False)) == (expected, ale.lives() < lives)
        assert (over, cut) == (ale.game_over(), False)
        both = np.maximum(screens[-2], screens[-1])
        np.testing.assert_array_equal(env.render(), both)
        if number % 20 == 0:
            np.testing.assert_array_equal(frame, naive(both))


def test_flicker_is_seen_in_both_screens():
    """Space Invaders draws its shots only in every other screen."""
    env = atari("SpaceInvaders")
    env.reset(seed=0)
    differs = 0
    for _ in range(60):
        env.step(1)
        both, newer = env.render(), env.unwrapped.ale.getScreenRGB()
        differs += (both != newer).any()
    assert differs > 5


def test_a_color_is_learned_when_it_is_first_seen(rng):
    """This includes a color that appears in only one of the two screens."""
    palette = rng.integers(0, 256, (256, 3)).astype(np.uint8)
    screens = rng.integers(0, 40, (30, 21, 16)).astype(np.uint8)
    screens += np.arange(30, dtype=np.uint8)[:, None, None] * 7

    class Fake:
        def getScreen(self, out=None):
            return now.copy() if out is None else out.__setitem__(..., now)

        def getScreenRGB(self):
            return palette[now]

    now = screens[0]
    made, before = Screens(Fake()), screens[0]
    for now in screens:
        made.grab()
        both = np.maximum(palette[before], palette[now])
        np.testing.assert_array_equal(made.color(), both)
        np.testing.assert_array_equal(made.luminance(), naive_luminance(both))
        before = now


def play(env, steps, seed=0):
    generator = np.random.default_rng(seed)
    result = []
    for _ in range(steps):
        frame, *step = env.step(generator.integers(env.action_space.n))
        result.append((frame.tobytes(), *step))
        if step[1] or step[2]:
            result.append(env.reset()[0].tobytes())
    return result


def test_a_lost_life_does_not_end_the_game_and_the_last_one_does():
    env = atari("Breakout")
    env.reset(seed=0)
    lost = []
    for _ in range(2000):
        _, _, over, _, info = env.step(1)
        if info:
            lost.append(over)
        if over:
            break
    assert lost == [False] * 4 + [True]


def test_a_game_begins_with_1_to_30_noops():
    env = atari("Breakout")
    env.reset(seed=3)
    starts = []
    for _ in range(60):
        env.reset()
        starts.append(env.unwrapped.ale.getEpisodeFrameNumber())
    assert (min(starts), max(starts)) == (1, 30)


def test_a_game_is_cut_at_its_longest_length_which_is_not_its_end():
    env = atari("SpaceInvaders", noop_max=0, max_frames=100)
    env.reset(seed=0)
    outcomes = [env.step(0)[2:4] for _ in range(25)]
    assert outcomes == [(False, False)] * 24 + [(False, True)]


def test_noops_after_a_life_let_the_game_go_on_unseen():
    frames = []
    for noops in (0, 2):
        env = atari("Breakout", noop_max=0, life_noops=noops)
        env.reset(seed=0)
        while not env.step(1)[-1]:
            pass
        frames.append(env.unwrapped.ale.getEpisodeFrameNumber())
    assert frames[1] == frames[0] + 2


@pytest.mark.parametrize("game", GAMES)
def test_a_saved_game_goes_on_as_it_would_have(game):
    env = atari(game, max_frames=1500)
    env.reset(seed=7)
    play(env, 150)
    state = env.state_dict()
    expected = play(env, 400, seed=1)
    other = atari(game, max_frames=1500)
    other.reset(seed=8)
    other.load_state_dict(state)
    assert play(other, 400, seed=1) == expected


@pytest.mark.parametrize(
    "name",
    ["SpaceInvaders", "space_invaders", "ALE/SpaceInvaders-v5", "SpaceInvadersNoFrameskip-v4"],
)
def test_a_game_has_its_name_in_any_spelling(name):
    assert Config(game=name).game == "SpaceInvaders"
    check_game(name)


def test_every_game_of_gymnasium_has_its_name():
    gymnasium.register_envs(ale_py)
    for name in (n for n in gymnasium.registry if n.startswith("ALE/")):
        assert f"ALE/{Config(game=name).game}-v5" == name


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("SpaceInvader", "not one of ale-py's 10. games; did you mean SpaceInvaders"),
        ("ALE/Brakout-v5", "did you mean Breakout"),
        ("CartPol-v1", "gymnasium: .*CartPole"),
        ("no_such_module:Env-v0", "gymnasium: .*no_such_module"),
        ("catch:Cetch-v0", "gymnasium: .*Catch"),
    ],
)
def test_an_unknown_game_is_told_with_the_nearest_name(name, told):
    with pytest.raises(UserError, match=f"--game {name}: .*{told}"):
        check_game(name)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("CartPole-v1", r"its observations are Box \[4\] of type float32; DQN needs .*uint8"),
        ("catch:Float-v0", "its observations are Box .* of type float64; DQN needs images"),
        ("Pendulum-v1", "its actions are Box.*DQN needs Discrete actions"),
        ("Combat", "cannot be made .*Combat"),
    ],
)
def test_what_cannot_be_played_is_refused_with_the_rule(name, told):
    check_game(name)
    with pytest.raises(UserError, match=f"--game {name}: {told}"):
        make_game(Config(game=name))


def test_an_environment_that_is_not_atari_is_seen_in_gray_and_cut_at_its_limit():
    env = make_game(Config(game="catch:Colorful-v0"))
    frame, _ = env.reset(seed=0)
    inner = env.unwrapped
    np.testing.assert_array_equal(frame, naive_bilinear(naive_luminance(inner.frame())))
    np.testing.assert_array_equal(env.render(), inner.frame())
    outcomes = [env.step(0)[2:4] for _ in range(3)]
    assert outcomes == [(False, False), (False, False), (False, True)]
    assert inner.paddle == 0
    env.reset()
    env.step(0)
    other = make_game(Config(game="catch:Colorful-v0"))
    other.reset()
    other.load_state_dict(env.state_dict())
    for _ in range(2):
        (one, *_), (two, *_) = *[env.step(2)], *[other.step(2)]
        np.testing.assert_array_equal(one, two)
    assert other.step(2)[2:4] == env.step(2)[2:4]
