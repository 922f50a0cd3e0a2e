"""Times a training step of section 5.2's auto-encoders: weight norm against the alternatives.

    python -m benchmarks.vae [--dataset mnist] [--preset paper] [--batch-size 100] [--rounds 7]

Every contender trains the same network on the same batch: sampling of z, loss, gradients, Adamax
and the average of the parameters. The contenders are ours, normal and with weight norm, with and
without XLA; weight norm in plain TensorFlow; and, for MNIST in float32, PyTorch, normal and with
torch.nn.utils.parametrizations.weight_norm, with and without torch.compile.
"""

import argparse
import dataclasses
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import numpy as np
import tensorflow as tf
import torch

from benchmarks import plain, timing, vae_peer
from models.common import runtime
from models.vae.config import Config
from models.vae.model import initialize, make_network
from models.vae.training import make_optimizer, make_train_step


def training_step(config: Config, images: np.ndarray):
    dtype = runtime.compute_dtype(config)
    network, averaged = (make_network(config, dtype) for _ in range(2))
    initialize(config, network, images)
    optimizer = make_optimizer(config, network.trainable_variables)
    step = make_train_step(
        config, tf.distribute.get_strategy(), network, averaged, optimizer, per_epoch=600
    )
    number = tf.constant(0, tf.int64)
    batch = tf.constant(images)
    run = lambda: step(batch, number).numpy()  # noqa: E731
    run()
    return run


def torch_steps(config: Config, images: np.ndarray):
    """Returns PyTorch's steps by name, if its network has as many parameters as ours."""
    normal = make_network(dataclasses.replace(config, parameterization="normal"))
    ours = sum(int(tf.size(variable)) for variable in normal.trainable_variables)
    theirs = vae_peer.parameters(config)
    if ours != theirs:
        raise SystemExit(f"our network has {ours:,} parameters, but PyTorch's has {theirs:,}")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    made = {}
    for compiled in (False, True):
        for kind in ("normal", "weight_norm"):
            one = dataclasses.replace(config, parameterization=kind)
            name = f"PyTorch{', torch.compile' if compiled else ''}, {kind}"
            made[name] = vae_peer.training_step(one, images, compiled)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", choices=["mnist", "cifar10"], default="mnist")
    parser.add_argument("--preset", choices=["paper", "cpu"], default="paper")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    options = parser.parse_args()

    machine = timing.describe_machine("tensorflow", "torch")
    config = Config.of_preset(
        options.preset,
        dataset=options.dataset,
        batch_size=options.batch_size,
        learning_rate=1e-6,  # So small that many steps on one batch of noise are stable.
        mixed_precision="none" if options.dtype == "float32" else "bfloat16",
    )
    size = [28, 28, 1] if config.mnist else [32, 32, 3]
    random = np.random.default_rng(0)
    images = random.integers(0, 256, [options.batch_size, *size], np.uint8)

    def ours(kind, jit_compile=False):
        one = dataclasses.replace(config, parameterization=kind, jit_compile=jit_compile)
        return training_step(one, images)

    contenders = {kind: ours(kind) for kind in ("normal", "weight_norm")}
    contenders |= {f"{kind}, jit_compile": ours(kind, True) for kind in ("normal", "weight_norm")}
    with plain.weight_norm():
        contenders[plain.NAME] = ours("weight_norm")
    if config.mnist and options.dtype == "float32":
        contenders |= torch_steps(config, images)

    times = timing.interleave(contenders, rounds=options.rounds)
    title = (
        f"A training step, {options.dataset}, preset {options.preset}, {options.dtype}, "
        f"batch {options.batch_size}"
    )
    path = options.out / f"vae-{options.dataset}-{options.preset}-{options.dtype}.json"
    timing.report_steps(times, title, path, {**machine, **dataclasses.asdict(config)})


if __name__ == "__main__":
    main()
