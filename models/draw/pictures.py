"""Pictures of the model's samples and of how it draws them."""

import itertools
from pathlib import Path

import numpy as np
import tensorflow as tf

from models.common import checkpoints, plots, replicas, runtime, video
from models.draw.config import Config, Sample
from models.draw.network import Network, window


def sample_noise(config: Config, seed: int = 0, count: int = 100) -> tf.Tensor:
    """Returns z for `count` images, [T, count, latent_units]."""
    shape = [config.glimpses, count, config.latent_units]
    return tf.random.stateless_normal(shape, replicas.fold_in([seed, 0], 0), alg="philox")


def with_window(canvas: np.ndarray, parameters, config: Config, scale: int) -> np.ndarray:
    """Returns the enlarged canvas with the window's outline in red, uint8 [height, width, 3].

    Args:
      canvas: float in [0, 1] [side, side].
      parameters: [5] as in `window`, or [0] for no outline.
      config: provides the window's write_size.
      scale: screen pixels per image pixel. The outline is as thick as the filters' sigma, but at
        most one image pixel.
    """
    from PIL import Image, ImageDraw

    side = len(canvas) * scale
    picture = Image.fromarray(np.round(255 * canvas).astype(np.uint8)).convert("RGB")
    picture = picture.resize((side, side), Image.Resampling.NEAREST)
    if len(parameters):
        seen = window(tf.constant(parameters[None]), config.write_size, len(canvas))
        y, x = seen.center[0].numpy()
        half = float(seen.delta[0, 0]) * (config.write_size - 1) / 2
        # Pixel values are at pixel centers. A window may be very large, so it is clipped.
        box = np.array([x - half, y - half, x + half, y + half]) + 0.5
        width = int(np.clip(round(float(seen.sigma[0, 0]) * scale), 1, scale))
        corners = tuple(np.clip(box * scale, -side, 2 * side))
        ImageDraw.Draw(picture).rectangle(corners, outline=(255, 40, 40), width=width)
    return np.asarray(picture)


def sample(asked: Sample) -> None:
    """The `sample` command."""
    found = checkpoints.open_run(asked.checkpoint, Config)
    config, out = found.config, Path(asked.out or found.folder / "samples")
    network = Network(config, dtype=runtime.compute_dtype(config))
    found.restore(network=network)
    canvases, windows = (part.numpy() for part in network.sample(sample_noise(config, asked.seed)))
    plots.write(out / "samples.png", plots.png(plots.tile(canvases[-1]), 3))
    none = np.zeros([len(canvases[0]), 0])
    finished = [(canvases[-1], none)] * (8 + len(canvases) // 4)
    with video.Video(out / "drawing.gif", rate=max(4, config.glimpses / 4)) as film:
        for pair in [*zip(canvases, windows, strict=True), *finished]:
            both = itertools.islice(zip(*pair, strict=True), 32)
            pictures = [with_window(c, p, config, asked.scale) for c, p in both]
            film.frame(plots.tile(np.stack(pictures), 8, asked.scale))
    print(f"wrote {out / 'drawing.gif'}" + config.note())
