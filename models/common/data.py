"""Image data sets by TFDS as uint8 arrays, and a cache for what is computed from them."""

import contextlib
import dataclasses
import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np

from models.common.errors import UserError, first_line, nearest

# Where TFDS downloads each from.
SOURCES = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/",
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/",
}
# The same shape, and no files needed.
SYNTHETIC = tuple(f"synthetic_{name}" for name in SOURCES)
NAMES = (*SOURCES, *SYNTHETIC)


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set in memory.

    Attributes:
      train_images, test_images: uint8 [examples, height, width, channels].
      train_labels, test_labels: int64 [examples].
      caveat: what to say beside every result obtained on it; "" for the original data.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    caveat: str = ""


def load(name: str, data_dir: str = "") -> Images:
    """Returns a data set: "cifar10", "mnist", "synthetic_cifar10" or "synthetic_mnist".

    Args:
      name: the data set.
      data_dir: its folder, in TFDS's layout; default $TFWN_DATA_DIR, else TFDS's own. A missing
        data set is downloaded to it.

    Raises:
      UserError: an unknown name; data that are damaged, or missing and not to be downloaded.
    """
    if name not in NAMES:
        known = ", ".join(NAMES)
        raise UserError(f"data set {name!r}: unknown; there are {known}" + nearest(name, NAMES))
    if name in SYNTHETIC:
        return _synthetic(name)
    import tensorflow_datasets as tfds

    directory = os.path.expanduser(data_dir or os.environ.get("TFWN_DATA_DIR", "")) or None
    where = directory or tfds.core.constants.DATA_DIR
    remedy = (
        f"`tfds build {name} --data_dir {where}` where there is a network, name the folder that "
        f"holds it by --data-dir, or do without: --preset smoke (--dataset synthetic_{name})"
    )
    if data_dir and not os.path.isdir(where):
        raise UserError(f"--data-dir {data_dir}: there is no such folder; run {remedy}")
    builder = tfds.builder(name, data_dir=directory)
    if not builder.is_prepared():
        try:
            _reach(SOURCES[name])
            builder.download_and_prepare()
        except Exception as error:
            raise UserError(
                f"{name} is not in {where}, and downloading it failed ({first_line(error)}): "
                f"run {remedy}"
            ) from error
    try:
        splits = builder.as_dataset(
            split=["train", "test"], batch_size=-1, as_supervised=True, shuffle_files=False
        )
        (train_x, train_y), (test_x, test_y) = (tfds.as_numpy(split) for split in splits)
        caveat = _caveat(builder)
    except Exception as error:
        raise UserError(
            f"{name} in {builder.data_path} is damaged ({first_line(error)}): remove that folder "
            f"and run `tfds build {name} --data_dir {where}`"
        ) from error
    return Images(train_x, train_y, test_x, test_y, caveat)


def binarize(*parts: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """Returns uint8 images as 0 or 1: each pixel 1 with the probability of its gray value.

    Args:
      parts: uint8 [examples, ...]; 255 is always 1, 0 never.
      seed: seeds the draw, which goes through the parts in order.
    """
    random = np.random.default_rng(seed)
    # Integers, because floats would need 200 MB.
    return [(random.integers(0, 255, x.shape, np.uint8) < x).view(np.uint8) for x in parts]


def steps_per_epoch(batch_size: int, examples: int) -> int:
    """Returns the number of whole batches, of which there must be one."""
    if batch_size > examples:
        raise UserError(f"--batch-size {batch_size} is more than the {examples} training images")
    return examples // batch_size


def order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Returns the order of the training images in an epoch, counted from 0."""
    return np.random.default_rng([seed, epoch]).permutation(examples)


def cached(name: str, source: np.ndarray, make: Callable[[], dict[str, np.ndarray]]) -> dict:
    """Returns make(), {name: array}, a function of `source` that is cached in the user's folder.

    The folder is $XDG_CACHE_HOME/tfwn (~/.cache/tfwn); a digest of `source` is part of the file's
    name. A damaged file is made again. If the folder cannot be written, nothing is cached.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tfwn"
    digest = hashlib.blake2b(source.tobytes(), digest_size=12).hexdigest()
    path = folder / f"{name}-{digest}.npz"
    try:
        # NumPy would leave a damaged file open.
        with open(path, "rb") as archive, np.load(archive) as arrays:
            return dict(arrays)
    except Exception:  # Missing, cut short or not an archive: zipfile and NumPy raise many kinds.
        result = make()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        # Two processes may be here at once: each writes its own file, the last one stays.
        handle, temporary = tempfile.mkstemp(suffix=".npz", dir=folder)
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **result)
        os.replace(temporary, path)
    return result


def _reach(url: str) -> None:
    """Raises if a server cannot be reached, because TFDS would try for many minutes."""
    # Any answer will do.
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=15).close()


def _synthetic(name: str, train: int = 1000, test: int = 200) -> Images:
    """Returns images that a loss can fall on: noisy copies of ten pictures, or discs for MNIST."""
    random = np.random.default_rng(0)
    count = train + test
    if name == "synthetic_mnist":
        y, x = np.mgrid[:28, :28]
        middles = random.uniform(6, 22, (2, count, 1, 1))
        labels = random.integers(0, 10, count)
        radii = (3 + labels / 3)[:, None, None]
        inside = radii + 0.5 - np.hypot(y - middles[0], x - middles[1])
        images = 255 * inside.clip(0, 1)[..., None]  # The edges are gray.
    else:
        pictures = random.integers(0, 256, (10, 32, 32, 3))
        labels = random.integers(0, 10, count)
        images = (pictures[labels] + random.normal(0, 60, (count, 32, 32, 3))).clip(0, 255)
    images = images.astype(np.uint8)
    caveat = "synthetic images: for smoke tests only"
    return Images(images[:train], labels[:train], images[train:], labels[train:], caveat)


def _caveat(builder) -> str:
    """Returns what is wrong with the images: TFDS stores PNG, but some copies are lossy JPEG."""
    import tensorflow_datasets as tfds

    raw = builder.as_dataset(
        split="test", decoders={"image": tfds.decode.SkipDecoding()}, shuffle_files=False
    )
    encoded = next(iter(raw.take(1)))["image"].numpy()
    if encoded.startswith(b"\xff\xd8"):
        return "images re-encoded as JPEG (lossy): results are not those of the original data"
    return ""
