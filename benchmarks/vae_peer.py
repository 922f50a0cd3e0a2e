"""Section 5.2's MNIST auto-encoder in PyTorch, for benchmarks.vae: the same layers and step.

A masked layer's weights are masked after normalization, not before, because PyTorch's
parametrization has no mask. Neither this nor the order of channels in upsampling changes the amount
of work.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models.vae.config import Config
from models.vae.flow import mask


class Masked(nn.Linear):
    """A masked layer of MADE."""

    def __init__(self, kernel_mask: np.ndarray, bias: bool = True):
        super().__init__(*kernel_mask.shape, bias=bias)
        self.register_buffer("mask", torch.from_numpy(kernel_mask.T.copy()))

    def forward(self, x):
        return functional.linear(x, self.weight * self.mask, self.bias)


class Autoregressive(nn.Module):
    """Maps z and a context to m and s."""

    def __init__(self, latents: int, hidden: tuple[int, ...]):
        super().__init__()
        first, *rest = zip((latents, *hidden[:-1]), hidden, strict=True)
        self.first = Masked(mask(*first, latents, False), bias=False)
        self.rest = nn.ModuleList(Masked(mask(*sizes, latents, False)) for sizes in rest)
        last = mask(hidden[-1], latents, latents, True)
        self.last = Masked(np.concatenate([last, last], 1))

    def forward(self, z, context):
        x = functional.elu(self.first(z) + context)
        for layer in self.rest:
            x = functional.elu(layer(x))
        return self.last(x).chunk(2, 1)


def upsampling(inputs: int, outputs: int, kernel: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, 4 * outputs, kernel, padding=kernel // 2), nn.PixelShuffle(2)
    )


class Block(nn.Module):
    """elu(skip(x) + .1 conv2(elu(conv1(x))))."""

    def __init__(self, inputs: int, outputs: int, down: bool = False, up: bool = False):
        super().__init__()
        middle = inputs if up else outputs
        self.conv1 = nn.Conv2d(inputs, middle, 3, 2 if down else 1, padding=1)
        self.conv2: nn.Module = (
            upsampling(middle, outputs, 3) if up else nn.Conv2d(middle, outputs, 3, padding=1)
        )
        self.skip: nn.Module = nn.Identity()
        if up:
            self.skip = upsampling(inputs, outputs, 1)
        elif down:
            self.skip = nn.Conv2d(inputs, outputs, 2, 2)
        elif inputs != outputs:
            self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return functional.elu(self.skip(x) + 0.1 * self.conv2(functional.elu(self.conv1(x))))


def log_normal(x):
    return -0.5 * (np.log(2 * np.pi) + x**2)


class VAE(nn.Module):
    """The model of models/vae/mnist.py; returns the loss of a batch."""

    def __init__(self, config: Config):
        super().__init__()
        maps, self.config = config.maps, config
        encoder, decoder = [], []
        for stage, outputs in enumerate(maps):
            for i in range(config.blocks):
                inputs = (1, *maps)[stage] if i == 0 else outputs
                encoder.append(Block(inputs, outputs, down=stage > 0 and i == 0))
        for stage, inputs in reversed(list(enumerate(maps))):
            for i in range(config.blocks):
                up = stage > 0 and i == config.blocks - 1
                decoder.append(Block(inputs, maps[stage - 1] if up else inputs, up=up))
        size = 7 * 7 * maps[-1]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.encoder_dense = nn.Linear(size, config.hidden)
        self.posterior = nn.Linear(config.hidden, 2 * config.latents + config.made[0])
        self.flow = nn.ModuleList(
            Autoregressive(config.latents, config.made) for _ in range(config.flow_steps)
        )
        self.decoder_dense = nn.Sequential(
            nn.Linear(config.latents, config.hidden), nn.ELU(),
            nn.Linear(config.hidden, size), nn.ELU(),
        )  # fmt: skip
        self.logits = nn.Conv2d(maps[0], 1, 3, padding=1)

    def forward(self, x, noise):
        latents = self.config.latents
        h = functional.elu(self.encoder_dense(self.encoder(x).flatten(1)))
        mu, log_sigma, context = self.posterior(h).split([latents, latents, self.config.made[0]], 1)
        z, log_q = mu + log_sigma.exp() * noise, log_normal(noise) - log_sigma
        for step in self.flow:
            m, s = step(z, context)
            s = s + 1.5
            sigma = torch.sigmoid(s)
            z, log_q = sigma * z + (1 - sigma) * m, log_q - functional.logsigmoid(s)
            z, log_q = z.flip(1), log_q.flip(1)
        pixels = self.decoder_dense(z).unflatten(1, (-1, 7, 7))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        logits = self.logits(self.decoder(pixels))
        error = functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return (error + (log_q - log_normal(z)).sum()) / len(x)


def training_step(config: Config, images: np.ndarray, compiled: bool) -> Callable[[], float]:
    """Returns a function that runs a step: sampling, loss, gradients, Adamax, parameter average."""
    network: Any = VAE(config).to(memory_format=torch.channels_last)
    if config.parameterization == "weight_norm":
        for module in [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
            nn.utils.parametrizations.weight_norm(module)
    parameters = list(network.parameters())
    averaged = [p.detach().clone() for p in parameters]
    adamax = torch.optim.Adamax(
        parameters, config.learning_rate, (config.beta_1, config.beta_2), config.epsilon
    )
    loss_of = torch.compile(network) if compiled else network
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)

    def run() -> float:
        x = (pixels.float() / 255).contiguous(memory_format=torch.channels_last)
        loss = loss_of(x, torch.randn(len(x), config.latents))
        adamax.zero_grad(set_to_none=True)
        loss.backward()
        adamax.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1e-3)
        return loss.item()

    run()
    return run


def parameters(config: Config) -> int:
    """Returns the number of parameters, including masked ones, without weight norm's g."""
    return sum(p.numel() for p in VAE(config).parameters())
