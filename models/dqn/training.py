"""Training: act, remember, learn, and evaluate after each epoch."""

import contextlib
import ctypes
import os
from pathlib import Path

import numpy as np
import tensorflow as tf

from models.common.run import Run
from models.dqn import figures, play
from models.dqn.agent import Actor, Learner
from models.dqn.config import Config
from models.dqn.replay import Batch, Replay
from models.dqn.vector import Games


def train(config: Config) -> None:
    """Trains, evaluates after each epoch, and leaves a learning curve in the run folder."""
    keep_freed_memory()
    with (
        Run(config, config.title) as run,
        contextlib.closing(Games(config, config.num_envs, config.seed)) as games,
        contextlib.closing(make_replay(config)) as replay,
    ):
        learner = Learner(config, games.num_actions, run.dtype)
        actor = Actor(config, learner, games, replay)
        actor.begin()
        run.begin(
            {"learner": learner, "optimizer": learner.optimizer},
            {"replay": replay, "actor": actor},
        )
        if games.processes:
            cores = len(os.sched_getaffinity(0))
            more = f"; --num-envs {cores} would use all {cores} cores" * (cores > len(games))
            run.say(f"{len(games)} games in {games.processes} processes{more}")
        if actor.anew.any():
            run.say(f"{config.game} cannot save its state, so its games start over")
        if replay.lost:
            run.say(f"the replay memory lacks its {replay.lost:,} oldest transitions")
        if len(replay) < min(run.step, config.learning_starts) and run.step < config.steps:
            run.say(
                f"the replay memory holds {len(replay):,} transitions; learning resumes when it "
                f"holds {config.learning_starts:,}"
            )
        held_out = load_held_out(run) if learner.initialized else None
        for step in run.steps(
            config.steps,
            stride=config.num_envs,
            save_every=save_every(config) if replay.file else None,
            warm_up=config.learning_starts,
            steps_per_epoch=config.test_every,
        ):
            if held_out is None and len(replay) >= config.learning_starts:
                if not learner.initialized:
                    run.say(f"{step:,} random steps are in the replay memory; learning begins")
                    learner.initialize(replay.sample(config.init_batch).states)
                held_out = replay.sample(config.held_out).states
                np.save(run.path / "held_out.npy", held_out)
            if step % config.test_every == 0 and learner.initialized:
                end_epoch(config, learner, run, held_out)
            advance(config, learner, actor, step)
            if crosses(step, step + config.num_envs, config.log_every):
                log(run, learner, actor, step + config.num_envs)
        end_epoch(config, learner, run, held_out)
        run.say(f"learning curve: {figures.learning_curve(run.path, config)}")
        if replay.file:
            size = replay.file.stat().st_blocks * 512 / 1e6
            run.say(f"replay memory: {replay.file}, {size:,.0f} MB, needed only to --resume")


def keep_freed_memory() -> None:
    """Makes malloc reuse the memory of batches, in the whole process.

    By default, malloc returns freed megabytes to the system, and touching the next batch's new
    pages takes six times as long as filling it.
    """
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    with contextlib.suppress(AttributeError):  # Not glibc.
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**28)


def make_replay(config: Config) -> Replay:
    """Returns the replay memory, in RAM or a file, saved with the checkpoints or not."""
    file = Path(config.replay_file or Path(config.out) / "replay.ring")
    return Replay(
        config.replay,
        config.num_envs,
        file=file if config.save_replay or config.replay_file else None,
        in_memory=not config.replay_file,
        new=not config.resume,
        spare=2 * save_every(config),
        whole_stacks=config.variant == "deep_q_rl",
        seed=config.seed,
    )


def save_every(config: Config) -> int:
    """Returns the number of steps between checkpoints of a saved replay memory."""
    return max(config.replay // 20, config.num_envs)


def load_held_out(run: Run) -> np.ndarray | None:
    """Returns the held-out states of a run, or None if they are lost."""
    file = run.path / "held_out.npy"
    try:
        return np.load(file)
    except (OSError, ValueError, EOFError):
        run.say(f"{file} is missing or damaged, so new states are held out from now on")
        return None


def advance(config: Config, learner: Learner, actor: Actor, step: int) -> None:
    """Plays an action in each game and performs the updates that are due."""
    actions, after = actor.choose(step), step + config.num_envs
    if config.num_envs == 1:
        # Nature's order: act, observe, remember, learn.
        actor.remember(actions, actor.games.step(actions))
        updates = learn(config, learner, actor, step)
    else:
        actor.games.send(actions)
        updates = learn(config, learner, actor, step)
        actor.remember(actions, actor.games.recv())
        if count := due(config, actor, after):
            actor.replay.prepare(config.batch_size, count, to_tensors)
    before = step
    if config.variant == "deep_q_rl":  # It counts updates.
        after = int(learner.optimizer.iterations)
        before = after - updates
    if crosses(before, after, config.target_every) and learner.initialized:
        learner.copy_to_target()


def learn(config: Config, learner: Learner, actor: Actor, step: int) -> int:
    """Performs the updates that are due after a step, in one call, and returns their number."""
    if count := due(config, actor, step):
        learner.update(actor.replay.batches(config.batch_size, count, to_tensors))
    return count


def due(config: Config, actor: Actor, step: int) -> int:
    """Returns the number of updates due after the actions of a step."""
    # A run resumed without its replay memory refills it first.
    return actor.updates(step) if len(actor.replay) >= config.learning_starts else 0


def to_tensors(batch: Batch) -> Batch:
    """Converts a batch to tensors."""
    return Batch(*map(tf.convert_to_tensor, batch))


def end_epoch(config: Config, learner: Learner, run: Run, held_out: np.ndarray | None) -> None:
    """Evaluates, logs the score and the Q-value of held-out states, and keeps the best network."""
    seed = [config.seed, run.step, 4]
    scores, lengths = play.play_games(config, learner.act, seed, report=run.evaluating)
    q = None if held_out is None else play.mean_max_q(learner.act, held_out)
    score = float(np.mean(scores))
    run.log(
        epoch=run.step / config.test_every,
        test_score=score,
        test_stderr=play.standard_error(scores),
        test_games=len(scores),
        test_length=np.mean(lengths),
        held_out_q=q,
    )
    shown = "" if q is None else f", held-out Q {q:.3f}"
    run.say(f"step {run.step:,}: score {score:,.1f} ({len(scores)} games){shown}")
    run.show(evaluation=score)
    run.keep_best(score)


def log(run: Run, learner: Learner, actor: Actor, step: int) -> None:
    """Writes a row of metrics and updates the progress line."""
    loss, q, count = learner.sums.numpy()
    learner.sums.assign([0.0, 0.0, 0.0])
    values = {"epsilon": actor.epsilon(step), "steps_per_second": run.rate}
    if count:
        values |= {"loss": float(loss / count), "q": float(q / count)}
    if actor.scores:
        values["score"] = float(np.mean(actor.scores))
        values["length"] = float(np.mean(actor.lengths))
        actor.scores, actor.lengths = [], []
    run.log(step, **values)
    run.show(**{name: values[name] for name in ("score", "loss", "q", "epsilon") if name in values})


def crosses(before: int, after: int, period: int) -> bool:
    """Returns whether a multiple of `period` lies in (before, after]."""
    return after // period > before // period
