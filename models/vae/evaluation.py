"""Evaluation with averaged weights: the bound, and the importance-weighted log-likelihood."""

import functools
import math
from typing import Any

import numpy as np
import tensorflow as tf

from models.common import checkpoints, progress, replicas, runtime
from models.vae.config import Config, Evaluate
from models.vae.model import caveats, load, make_network, prepare


def make_evaluate_step(config: Config, strategy, network):
    """Returns evaluate_step(images, pixels, seed): log p(x, z) - log q(z|x) and KL, [images, 2].

    `pixels` seeds dynamic binarization, `seed` seeds z.
    """

    def replica_step(images, pixels, seed):
        x = prepare(config, replicas.share(images), pixels)
        log_px, kl = network(x, seed)
        kl = tf.reduce_sum(kl, 1)
        return tf.stack([log_px - kl, kl], 1)

    @functools.partial(tf.function, jit_compile=config.jit_compile)
    def evaluate_step(images, pixels, seed):
        return strategy.gather(strategy.run(replica_step, (images, pixels, seed)), axis=0)

    return evaluate_step


def bounds(
    config: Config, evaluate_step, images: np.ndarray, samples=1, report=lambda done, total: None
):
    """Returns means over the images, in nats: bound, kl and, if samples > 1, log_likelihood.

    log_likelihood is the importance-weighted bound, the mean of log mean_k p(x, z_k) / q(z_k|x).
    All k share one x, even with dynamic binarization. Every call uses the same random numbers and
    reports its progress to report(done, total).
    """
    parts, batch = [], 500
    starts = range(0, len(images), batch)
    seed = tf.constant([config.seed, -1], tf.int64)  # No training step has this seed.
    for number, start in enumerate(starts):
        draws, here = [], replicas.fold_in(seed, number)
        for k in range(samples):
            report(number * samples + k, len(starts) * samples)
            pixels, z = replicas.fold_in(here, 0), replicas.fold_in(here, k)
            part = evaluate_step(images[start : start + batch], pixels, z)
            draws.append(part.numpy().astype(np.float64))
        parts.append(draws)
    log_w, kl = np.moveaxis(np.concatenate(parts, 1), -1, 0)  # [samples, images]
    result = {"bound": log_w.mean(), "kl": kl.mean()}
    if samples > 1:
        result["log_likelihood"] = log_mean_exp(log_w).mean()
    return result | units(config, result)


def log_mean_exp(log_w: np.ndarray) -> np.ndarray:
    """Returns log(mean(exp(log_w))) over the first axis."""
    top = log_w.max(0)
    return top + np.log(np.exp(log_w - top).mean(0))


def units(config: Config, result: dict[str, float]) -> dict[str, float]:
    """Returns CIFAR-10's bound in bits/dim and on the axis of figure 3; {} for MNIST."""
    if config.mnist:
        return {}
    bits = -result["bound"] / (3072 * math.log(2))
    return {"bits_per_dim": bits, "paper_axis": 3072 * math.log(2) * (8 - bits)}


def describe(result: dict[str, float]) -> str:
    """Returns the result of `bounds` as text."""
    words = f"bound {result['bound']:.2f} nats"
    if "bits_per_dim" in result:
        words += f" ({result['bits_per_dim']:.3f} bits/dim, {result['paper_axis']:.0f} in figure 3)"
    if "log_likelihood" in result:
        words += f"  log-likelihood {result['log_likelihood']:.2f}"
    return words + f"  KL {result['kl']:.2f}"


def restore(path: str) -> tuple[checkpoints.Found, Any]:
    """Returns a checkpoint and the run's network with averaged weights."""
    found = checkpoints.open_run(path, Config)
    network = make_network(found.config, runtime.compute_dtype(found.config))
    found.restore(averaged=network)
    return found, network


def evaluate(asked: Evaluate) -> None:
    """The `evaluate` command."""
    found, network = restore(asked.checkpoint)
    config = found.config
    images = load(config, asked.data_dir)
    step = make_evaluate_step(config, tf.distribute.get_strategy(), network)
    with progress.evaluation() as report:
        result = bounds(config, step, images.test_images, asked.eval_samples, report)
    print(f"test {describe(result)}{found.note(*caveats(config, images))}")
