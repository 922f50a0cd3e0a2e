"""Playing without learning: the tests after each epoch, and the commands `evaluate` and `watch`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from models.common import checkpoints, progress, runtime, video
from models.dqn.agent import FrameStack, Network
from models.dqn.config import Config, Evaluate, Watch
from models.dqn.games import make_game
from models.dqn.vector import Games

Act = Callable[[tf.Tensor], tf.Tensor]  # Maps states to Q-values, float32 [batch, actions].


def play_games(
    config: Config,
    act: Act,
    seed: Any,
    *,
    games: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[float], list[int]]:
    """Plays full games; returns their scores (not clipped) and lengths.

    "paper": `test_steps` actions with no limit on a game's length. Only games that end within them
    count, or the unfinished ones if none ends.
    "nature": 30 games of at most 5 minutes (18,000 frames).

    Args:
      config: the protocol and how the game is played.
      act: the network as a function.
      seed: seeds games and actions.
      games: number of games to play instead of following the protocol.
      report: called with (done, total), counted in actions or in games.
    """
    count = config.num_envs
    wanted = np.zeros(count, np.int64)  # Games to play in each environment; all 0: count actions.
    if games or config.protocol == "nature":
        np.add.at(wanted, np.arange(games or 30) % count, 1)
    generator = np.random.default_rng(seed)
    made = Games(config, count, int(generator.integers(2**31)), testing=True)
    stack, played = FrameStack(count), np.zeros(count, np.int64)
    stack.push(made.reset())
    scores: list[float] = []
    lengths: list[int] = []
    for step in range(0, 10**12 if wanted.any() else config.test_steps, count):
        if step // count % 64 == 0:
            if wanted.any():
                report(int(np.minimum(played, wanted).sum()), int(wanted.sum()))
            else:
                report(step, config.test_steps)
        actions = generator.integers(0, made.num_actions, count)
        greedy = generator.random(count) >= config.test_epsilon
        actions[greedy] = act(tf.constant(stack.frames)).numpy().argmax(1)[greedy]
        after = made.step(actions)
        ended = after.over | after.cut
        stack.push(after.frames, ended)
        # A fixed number of games per environment, because otherwise short games would count more.
        counts = (played < wanted)[ended] if wanted.any() else np.ones(ended.sum(), bool)
        scores += [score for score, good in zip(after.scores, counts, strict=True) if good]
        lengths += [length for length, good in zip(after.lengths, counts, strict=True) if good]
        played += ended
        if wanted.any() and (played >= wanted).all():
            break
    made.close()
    return (scores, lengths) if scores else made.unfinished()


def standard_error(scores: Sequence[float]) -> float:
    """Returns the standard error of the mean score, nan for one game."""
    count = len(scores)
    return float(np.std(scores, ddof=1)) / math.sqrt(count) if count > 1 else math.nan


def mean_max_q(act: Act, states: np.ndarray) -> float:
    """Returns the mean over states, uint8 [states, 84, 84, 4], of the largest Q-value."""
    parts = [states[begin : begin + 100] for begin in range(0, len(states), 100)]
    q = np.concatenate([act(tf.constant(part)).numpy() for part in parts])
    return float(q.max(1).mean())


def restore(path: str) -> tuple[Config, Act, checkpoints.Found]:
    """Returns a run's Config, its network as a function, and the checkpoint it comes from."""
    found = checkpoints.open_run(path, Config)
    dtype = runtime.compute_dtype(found.config)
    actions = make_game(found.config).action_space.n
    network = Network(found.config, int(actions), dtype, dtype)
    found.restore(learner=tf.train.Checkpoint(acting=network))
    return found.config, tf.function(network.__call__), found


def evaluate(asked: Evaluate) -> None:
    """Prints the mean score, its standard error and the range of the scores."""
    trained, act, found = restore(asked.checkpoint)
    config = dataclasses.replace(
        trained,
        num_envs=asked.num_envs,
        protocol=asked.protocol,
        test_epsilon=asked.epsilon,
        test_steps=asked.test_steps or trained.test_steps,
    )
    with progress.evaluation() as report:
        scores, lengths = play_games(config, act, [asked.seed], games=asked.games, report=report)
    error = standard_error(scores)
    spread = "" if math.isnan(error) else f" +- {error:,.1f} (standard error)"
    limit = "at most 5 minutes each"
    if asked.protocol == "paper":
        limit = "without a time limit"
        limit += "" if asked.games else f", {config.test_steps:,} steps in all"
    print(f"{config.title}, {found.path}")
    count = "1 game" if len(scores) == 1 else f"{len(scores)} games"
    print(f"score {np.mean(scores):,.1f}{spread}, {count}{found.note()}")
    print(f"protocol {asked.protocol}: {limit}, epsilon {asked.epsilon:g}, raw rewards")
    print(f"lowest {min(scores):,.0f}, highest {max(scores):,.0f}, length {np.mean(lengths):,.0f}")


def watch(asked: Watch) -> None:
    """Plays until the game is over and records it, with score and Q-values, as a video.

    gymnasium's RecordVideo needs MoviePy, writes no GIF, and shows only the screen.
    """
    config, act, found = restore(asked.checkpoint)
    out = Path(asked.out or found.folder / "game.gif")
    game = make_game(config, show=True)
    generator = np.random.default_rng([asked.seed, 5])
    stack, score, over = FrameStack(1), 0.0, False
    stack.push(game.reset(seed=asked.seed)[0][None])
    with video.Video(out, rate=15) as film:
        for _ in range(int(asked.seconds * 15)):
            q = act(tf.constant(stack.frames)).numpy()[0]
            action = int(q.argmax())
            if generator.random() < asked.epsilon:
                action = int(generator.integers(len(q)))
            film.frame(picture(game.render(), f"{config.game}  {score:,.0f}", q, action))
            frame, reward, over, cut, _ = game.step(action)
            stack.push(frame[None])
            score += reward
            if over or cut:
                break
    print(f"{out}: score {score:,.0f} {'' if over else '(game not over)'}")


def picture(screen: np.ndarray, text: str, q: np.ndarray, chosen: int) -> np.ndarray:
    """Returns a screen, uint8 [height, width, 3], above a line of text and bars of Q-values."""
    from PIL import Image, ImageDraw

    width, height, panel = 320, 420, 40
    image = Image.new("RGB", (width, height + panel))
    image.paste(Image.fromarray(screen).resize((width, height), Image.Resampling.NEAREST))
    draw = ImageDraw.Draw(image)
    draw.text((8, height + 12), text, fill="white", font_size=15)
    bar = min(14, 130 // len(q))
    for index, length in enumerate(29 * (q - q.min()) / max(q.max() - q.min(), 1e-9)):
        left = width - 8 - bar * (len(q) - index)
        box = (left, height + 33 - round(length), left + bar - 3, height + 36)
        draw.rectangle(box, fill="orange" if index == chosen else "gray")
    return np.asarray(image)
