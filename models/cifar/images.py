"""The data set and its ZCA whitening, the first row of table A."""

import dataclasses

import numpy as np
import tensorflow as tf

from models.cifar.config import Config
from models.common import data


def zca(images: np.ndarray, epsilon: float) -> dict[str, np.ndarray]:
    """Returns ZCA's mean and w = U diag((s + epsilon)^-1/2) U': (x - mean) w has covariance I.

    Args:
      images: float32 [examples, ...].
      epsilon: added to the eigenvalues s of the covariance U diag(s) U'.
    """
    x = images.reshape(len(images), -1).astype(np.float64)
    mean = x.mean(axis=0)
    x -= mean
    s, u = np.linalg.eigh(x.T @ x / len(x))
    return {"mean": mean, "w": (u / np.sqrt(s + epsilon)) @ u.T}


def load(config: Config, data_dir: str = "") -> data.Images:
    """Returns the data set with float32 images, scaled and whitened."""
    raw = data.load(config.dataset, data_dir or config.data_dir)
    train, test = (
        (images.astype(np.float32) - 127.5) / 128 for images in (raw.train_images, raw.test_images)
    )
    if config.whiten:
        name = f"zca-{config.zca_epsilon:g}"
        whitening = data.cached(name, raw.train_images, lambda: zca(train, config.zca_epsilon))
        mean, w = (whitening[key].astype(np.float32) for key in ("mean", "w"))
        for images in (train, test):
            # Once and in place: repeating the product in every step would be slow on a CPU.
            for part in np.array_split(images.reshape(len(images), -1), -(-len(images) // 5000)):
                part[:] = tf.matmul(part - mean, w)
    return dataclasses.replace(raw, train_images=train, test_images=test)
