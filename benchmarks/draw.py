"""Times a training step of section 5.3's DRAW: the parameterizations, and PyTorch.

    python -m benchmarks.draw [--glimpses 64] [--batch-size 100] [--rounds 7] [--no-compile]

Every contender trains the same model on the same batch: noise, bound, gradients, clipping, Adam.
Our weight norm is compared with our normal parameterization, with weight norm in plain TensorFlow,
and with PyTorch's torch.nn.utils.parametrizations.weight_norm. Ours runs with and without
--jit-compile, PyTorch with and without torch.compile on its glimpse. All compute w once per step.
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import numpy as np
import tensorflow as tf
import torch
from torch.nn import functional

from benchmarks import plain, timing
from models.draw.config import Config
from models.draw.network import SIDE, Network
from models.draw.training import make_optimizer, make_steps

OURS = "weight_norm"
PEER, COMPILED = "PyTorch", "PyTorch, torch.compile"


def tensorflow_step(config: Config, images):
    """Returns a function that runs a step, and the seconds to its graph and to its first result."""
    network = Network(config)
    optimizer = make_optimizer(config, network.trainable_variables)
    train_step, _ = make_steps(config, tf.distribute.get_strategy(), network, optimizer)
    seed = tf.constant([0, 1], tf.int64)
    run = lambda: train_step(images, seed).numpy()  # noqa: E731
    begin = time.perf_counter()
    train_step.get_concrete_function(images, seed)
    built = time.perf_counter() - begin
    run()
    return run, built, time.perf_counter() - begin


class TorchCell(torch.nn.Module):
    """An LSTM cell with peepholes."""

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.input = torch.nn.Linear(inputs, 4 * units)
        self.state = torch.nn.Linear(units, 4 * units, bias=False)
        self.peephole = torch.nn.Parameter(0.01 * torch.randn(3, units))

    def weights(self):
        """Returns the weights, which are normalized only here, once per step."""
        return self.input.weight, self.input.bias, self.state.weight, self.peephole


def lstm(x, h, c, weights):
    w, b, u, (p_i, p_f, p_o) = weights
    i, f, a, o = (functional.linear(x, w, b) + functional.linear(h, u)).chunk(4, 1)
    c_new = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(a)
    return torch.sigmoid(o + p_o * c_new) * torch.tanh(c_new), c_new


def filterbanks(parameters, size: int, side: int):
    g, log_delta, log_variance, log_gamma = parameters.split([2, 1, 1, 1], 1)
    i = torch.arange(size) - size / 2 + 0.5
    a = torch.arange(side, dtype=torch.float32)
    delta = (side - 1) / (size - 1) * log_delta.exp()
    mu = ((g + 1) / 2 * side)[:, :, None] + (delta * i)[:, None, :]
    f = torch.exp((a - mu[..., None]) ** 2 * (-0.5 * torch.exp(-log_variance))[:, :, None, None])
    f = f / (f.sum(3, keepdim=True) + 1e-4)
    return f[:, 0], f[:, 1], log_gamma.exp()


class TorchDraw(torch.nn.Module):
    """The model of models/draw, with attention."""

    def __init__(self, config: Config, compiled: bool):
        super().__init__()
        self.config = config
        h_enc, h_dec, z = config.encoder_units, config.decoder_units, config.latent_units
        self.encoder = TorchCell(2 * config.read_size**2 + h_dec, h_enc)
        self.decoder = TorchCell(z, h_dec)
        self.q = torch.nn.Linear(h_enc, 2 * z)
        self.reader = torch.nn.Linear(h_dec, 5)
        self.writer = torch.nn.Linear(h_dec, 5 + config.write_size**2)
        for name, parameter in self.named_parameters():
            parameter.data.zero_() if "bias" in name else parameter.data.normal_(0, 0.01)
        for layer in [module for module in self.modules() if isinstance(module, torch.nn.Linear)]:
            torch.nn.utils.parametrizations.weight_norm(layer)
        self.step: Any = torch.compile(self.glimpse) if compiled else self.glimpse

    def glimpse(self, x, canvas, h_enc, c_enc, h_dec, c_dec, u, weights):
        encoder, decoder, q, reader, writer = weights
        config, side = self.config, SIDE
        read_size, write_size = config.read_size, config.write_size
        f_y, f_x, gamma = filterbanks(functional.linear(h_dec, *reader), read_size, side)
        both = torch.cat([x, x - torch.sigmoid(canvas)], 2)
        rows = (f_y @ both).reshape(-1, 2 * read_size, side)
        r = gamma * (rows @ f_x.transpose(1, 2)).reshape(-1, 2 * read_size**2)
        h_enc, c_enc = lstm(torch.cat([r, h_dec], 1), h_enc, c_enc, encoder)
        mu, log_sigma = functional.linear(h_enc, *q).chunk(2, 1)
        kl = (torch.exp(2 * log_sigma) + mu**2 - 1) / 2 - log_sigma
        h_dec, c_dec = lstm(mu + torch.exp(log_sigma) * u, h_dec, c_dec, decoder)
        parameters, patch = functional.linear(h_dec, *writer).split([5, write_size**2], 1)
        f_y, f_x, gamma = filterbanks(parameters, write_size, side)
        patch = (patch / gamma).reshape(-1, write_size, write_size)
        return canvas + f_y.transpose(1, 2) @ patch @ f_x, h_enc, c_enc, h_dec, c_dec, kl.sum()

    def forward(self, x, u):
        weights = [self.encoder.weights(), self.decoder.weights()]
        weights += [(layer.weight, layer.bias) for layer in (self.q, self.reader, self.writer)]
        sizes = [self.config.encoder_units] * 2 + [self.config.decoder_units] * 2
        state = [torch.zeros_like(x), *(torch.zeros(len(x), size) for size in sizes)]
        kl = torch.zeros([])
        for noise in u:
            *state, kl_t = self.step(x, *state, noise, weights)
            kl = kl + kl_t
        loss = functional.binary_cross_entropy_with_logits(state[0], x, reduction="sum")
        return (loss + kl) / len(x)


def torch_step(config: Config, images, compiled: bool = False):
    network = TorchDraw(config, compiled)
    adam = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
    x = torch.from_numpy(images).float()

    def run():
        u = torch.randn(config.glimpses, len(x), config.latent_units)
        adam.zero_grad(set_to_none=True)
        loss = network(x, u)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        adam.step()
        return loss.item()

    begin = time.perf_counter()
    run()
    return run, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--glimpses", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="without XLA and torch.compile")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    options = parser.parse_args()

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    machine = timing.describe_machine("tensorflow", "torch")
    images = np.random.default_rng(0).integers(0, 2, (options.batch_size, SIDE, SIDE))
    images = images.astype(np.uint8)
    config = Config(glimpses=options.glimpses, batch_size=options.batch_size)
    contenders, first = {}, {}

    def ours(name, **values):
        made = tensorflow_step(dataclasses.replace(config, **values), images)
        contenders[name], first[name] = made[0], f"{made[1]:.1f} + {made[2] - made[1]:.1f}"

    ours(OURS, parameterization="weight_norm")
    ours("normal", parameterization="normal")
    with plain.weight_norm():
        ours(plain.NAME, parameterization="weight_norm")
    contenders[PEER], seconds = torch_step(config, images)
    first[PEER] = f"{seconds:.1f}"
    if not options.no_compile:
        for kind in ("weight_norm", "normal"):
            ours(f"{kind}, --jit-compile", parameterization=kind, jit_compile=True)
        contenders[COMPILED], seconds = torch_step(config, images, compiled=True)
        first[COMPILED] = f"{seconds:.1f}"

    times = timing.interleave(contenders, rounds=options.rounds)
    title = f"A training step, {options.glimpses} glimpses, batch {options.batch_size}"
    path = options.out / f"draw-{options.glimpses}-{options.batch_size}.json"
    machine |= {"threads": threads, **vars(config)}
    timing.report_steps(times, title, path, machine, OURS, ("graph + first step, seconds", first))


if __name__ == "__main__":
    main()
