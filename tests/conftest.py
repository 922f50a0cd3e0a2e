"""What all tests share: two virtual CPU devices, seeds, the real data."""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
import tensorflow as tf

# Two devices, so that a strategy has two replicas; this must happen before TensorFlow starts.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(autouse=True)
def _seeds():
    tf.keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _collective_keys():
    # Each strategy numbers its collectives from the same start, so that in one process those of two
    # are taken for one another. TensorFlow's own tests do this.
    tf.distribute.MirroredStrategy._collective_key_base += 100_000


@pytest.fixture
def rng():
    """NumPy's random numbers, the same in each run."""
    return np.random.default_rng(0)


@pytest.fixture
def data_dir():
    """The folder of the real data, in TensorFlow Datasets' layout; skips where there is none."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "data"
    path = pathlib.Path(os.environ.get("TFWN_DATA_DIR", default))
    if not path.is_dir():
        pytest.skip(f"needs real data: no folder {path}; set TFWN_DATA_DIR")
    return path
