"""Image data sets from TFDS as uint8 arrays, and a cache for results computed from them."""

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

# The sites that TFDS downloads from.
SOURCES = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/",
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/",
}
# Stand-ins with the same shapes, which need no files.
SYNTHETIC = tuple(f"synthetic_{name}" for name in SOURCES)
NAMES = (*SOURCES, *SYNTHETIC)


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set in memory.

    Attributes:
      train_images, test_images: uint8 [examples, height, width, channels].
      train_labels, test_labels: int64 [examples].
      caveat: a caveat shown with every result on these images; "" for the original data.
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
      data_dir: a folder in TFDS's layout; default: $TFWN_DATA_DIR, else TFDS's own. A missing
        data set is downloaded to it.

    Raises:
      UserError: unknown name, damaged data, or missing data that cannot be downloaded.
    """
    if name not in NAMES:
        known = ", ".join(NAMES)
        raise UserError(f"data set {name!r}: unknown; choose from {known}" + nearest(name, NAMES))
    if name in SYNTHETIC:
        return _synthetic(name)
    import tensorflow_datasets as tfds

    directory = os.path.expanduser(data_dir or os.environ.get("TFWN_DATA_DIR", "")) or None
    where = directory or tfds.core.constants.DATA_DIR
    remedy = (
        f"`tfds build {name} --data_dir {where}` with network access, give the folder that holds "
        f"it as --data-dir, or do without: --preset smoke (--dataset synthetic_{name})"
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
    """Returns images binarized at random: a pixel x becomes 1 with probability x / 255, else 0.

    Args:
      parts: arrays of images, uint8 [examples, ...].
      seed: the seed of the random numbers, which are drawn for the arrays in order.
    """
    random = np.random.default_rng(seed)
    # Draws integers because floats would need 200 MB.
    return [(random.integers(0, 255, x.shape, np.uint8) < x).view(np.uint8) for x in parts]


def steps_per_epoch(batch_size: int, examples: int) -> int:
    """Returns the number of whole batches; raises UserError if there is none."""
    if batch_size > examples:
        raise UserError(f"--batch-size {batch_size} must not exceed the {examples} training images")
    return examples // batch_size


def cached(name: str, source: np.ndarray, make: Callable[[], dict[str, np.ndarray]]) -> dict:
    """Returns make(), {name: array} computed from `source`, cached in the user's cache folder.

    The folder is $XDG_CACHE_HOME/tfwn, or ~/.cache/tfwn. The file's name contains a digest of
    `source`. A damaged file is replaced. If the folder is not writable, nothing is cached.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tfwn"
    digest = hashlib.blake2b(source.tobytes(), digest_size=12).hexdigest()
    path = folder / f"{name}-{digest}.npz"
    try:
        # np.load(path) would leave a damaged file open.
        with open(path, "rb") as archive, np.load(archive) as arrays:
            return dict(arrays)
    except Exception:  # Missing or damaged, for which zipfile and NumPy raise many types.
        result = make()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        # Several processes may do this at once: each writes its own file, and the last one wins.
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            np.savez(f"{temporary}/new.npz", allow_pickle=False, **result)
            os.replace(f"{temporary}/new.npz", path)
    return result


def _reach(url: str) -> None:
    """Raises an error if a server cannot be reached; TFDS would keep trying for many minutes."""
    with contextlib.suppress(urllib.error.HTTPError):  # Any response will do.
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=15).close()


def _synthetic(name: str, train: int = 1000, test: int = 200) -> Images:
    """Returns images that can be learned: noisy copies of ten pictures, or discs for MNIST."""
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
    """Returns a caveat if the images are lossy JPEG instead of TFDS's PNG, else ""."""
    import tensorflow_datasets as tfds

    raw = builder.as_dataset(
        split="test", decoders={"image": tfds.decode.SkipDecoding()}, shuffle_files=False
    )
    encoded = next(iter(raw.take(1)))["image"].numpy()
    if encoded.startswith(b"\xff\xd8"):
        return "images re-encoded as JPEG (lossy): results are not those of the original data"
    return ""
