"""TensorFlow's settings for a run: seeds, determinism, compute dtype, strategy."""

import functools
import json
import os
from typing import Any

import numpy as np
import tensorflow as tf

from models.common import options
from models.common.errors import UserError


def configure(config: options.RunConfig) -> tf.distribute.Strategy:
    """Seeds everything and returns the strategy under which to build the model.

    With `--strategy none` it is tf.distribute's default strategy, so programs need no special case.
    """
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.keras.utils.set_random_seed(config.seed)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    strategy = tf.distribute.get_strategy()
    if config.strategy == "mirrored":
        strategy = _mirrored()
    elif config.strategy == "multi_worker":
        _check_cluster()
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    replicas, batch_size = strategy.num_replicas_in_sync, getattr(config, "batch_size", 0)
    if batch_size % replicas:
        raise UserError(f"--batch-size {batch_size} must be a multiple of the {replicas} replicas")
    return strategy


# Cached because the collectives of two strategies in one process would interfere.
_mirrored = functools.cache(tf.distribute.MirroredStrategy)


def compute_dtype(config: options.RunConfig) -> tf.DType:
    """Returns the type of matrix products and activations; weights and losses are float32."""
    return tf.bfloat16 if config.mixed_precision == "bfloat16" else tf.float32


def is_chief(config: options.RunConfig) -> bool:
    """Returns whether this process writes the run folder: it is the only one, or the chief."""
    if config.strategy != "multi_worker":
        return True
    task = _cluster().get("task", {})
    has_chief = "chief" in _cluster().get("cluster", {})
    return task.get("type") == "chief" if has_chief else int(task.get("index", 0)) == 0


def generator(seed: int, *purpose: int) -> np.random.Generator:
    """Returns a NumPy generator that depends only on the seed and the numbers in `purpose`.

    A permutation, such as `generator(seed, epoch).permutation(n)`, need not be saved, because a
    resumed run can compute it again.
    """
    return np.random.default_rng([seed, *purpose])


def _cluster() -> dict[str, Any]:
    try:
        return json.loads(os.environ.get("TF_CONFIG") or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f"TF_CONFIG is not JSON ({error})") from None


def _check_cluster() -> None:
    content = _cluster()
    task = content.get("task", {})
    workers = content.get("cluster", {}).get(task.get("type"), [])
    if not 0 <= task.get("index", -1) < len(workers):
        raise UserError(
            "--strategy multi_worker needs TF_CONFIG, with a different index in each process: "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
            + (f", got {json.dumps(content)}" if content else "")
        )
