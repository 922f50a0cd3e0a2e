"""Times a training step of section 5.1's network: the parameterizations, and PyTorch.

    python -m benchmarks.cifar [--dtype float32] [--width 96] [--batch-size 100] [--rounds 7]

Every contender trains the same network on the same batch: noise, dropout, loss, gradients, Adam.
Our normal parameterization is compared with the other four and with weight norm in plain
TensorFlow. Our weight norm is compared with PyTorch's, which is
torch.nn.utils.parametrizations.weight_norm: with channels last (also under torch.compile) and with
channels first.
"""

import argparse
import dataclasses
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import numpy as np
import tensorflow as tf
import torch

from benchmarks import plain, timing
from models.cifar.config import PAPER, Config
from models.cifar.network import Network, initialize
from models.cifar.training import make_optimizer, make_steps
from models.common import runtime

LAST, FIRST = "PyTorch channels-last", "PyTorch channels-first"
COMPILED = f"{LAST}, torch.compile"


def tensorflow_step(config: Config, images, labels):
    dtype = runtime.compute_dtype(config)
    network = Network(config, dtype)
    network(images[:1])
    initialize(config, network, images)
    optimizer = make_optimizer(config, network.trainable_variables)
    train_step, _ = make_steps(config, tf.distribute.get_strategy(), network, optimizer)
    seed = tf.constant([0, 1], tf.int64)
    run = lambda: train_step(images, labels, seed).numpy()  # noqa: E731
    run()
    return run


class Noise(torch.nn.Module):
    def forward(self, x):
        return x + 0.15 * torch.randn_like(x)


def torch_network(width: int) -> torch.nn.Sequential:
    nn = torch.nn

    def conv(inputs, outputs, kernel, padding="same"):
        return nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.LeakyReLU(0.1)

    network = nn.Sequential(
        Noise(),
        *conv(3, width, 3),
        *conv(width, width, 3),
        *conv(width, width, 3),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        *conv(width, 2 * width, 3),
        *conv(2 * width, 2 * width, 3),
        *conv(2 * width, 2 * width, 3),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        *conv(2 * width, 2 * width, 3, 0),
        *conv(2 * width, 2 * width, 1),
        *conv(2 * width, 2 * width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            torch.nn.utils.parametrizations.weight_norm(layer)
    return network


def torch_step(config: Config, images, labels, memory_format, compiled: bool = False):
    network = torch_network(config.width).to(memory_format=memory_format)
    adam = torch.optim.Adam(network.parameters(), lr=0.003, fused=True)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous(memory_format=memory_format)
    y = torch.from_numpy(labels)
    half = config.mixed_precision == "bfloat16"
    forward = torch.compile(network) if compiled else network

    def run():
        adam.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = forward(x)
        loss = torch.nn.functional.cross_entropy(logits.float(), y)
        loss.backward()
        adam.step()
        return loss.item()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["parameterizations", "peers"], help="only one half")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    options = parser.parse_args()

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    machine = timing.describe_machine("tensorflow", "torch")
    random = np.random.default_rng(0)
    images = random.normal(size=(options.batch_size, 32, 32, 3)).astype(np.float32)
    labels = random.integers(0, 10, options.batch_size)
    config = Config(
        width=options.width,
        batch_size=options.batch_size,
        mixed_precision="none" if options.dtype == "float32" else "bfloat16",
    )

    def ours(kind):
        values = {"parameterization": kind}
        return tensorflow_step(dataclasses.replace(config, **values), images, labels)

    contenders = {"weight_norm": ours("weight_norm")}
    if options.only != "peers":
        contenders |= {kind: ours(kind) for kind in PAPER if kind != "weight_norm"}
        with plain.weight_norm():
            contenders[plain.NAME] = ours("weight_norm")
    if options.only != "parameterizations":
        for name, *how in (
            (LAST, torch.channels_last),
            (COMPILED, torch.channels_last, True),
            (FIRST, torch.contiguous_format),
        ):
            contenders[name] = torch_step(config, images, labels, *how)

    times = timing.interleave(contenders, rounds=options.rounds)
    title = f"A training step, {options.dtype}, width {options.width}, batch {options.batch_size}"
    path = options.out / f"cifar-{options.dtype}-{options.width}.json"
    timing.report_steps(times, title, path, {**machine, "threads": threads, **vars(config)})


if __name__ == "__main__":
    main()
