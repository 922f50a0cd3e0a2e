"""Set-up shared by all tests: two logical CPU devices, seeds and the real data."""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
import tensorflow as tf

# Two devices, so that strategies have two replicas. TensorFlow must not be initialized yet.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(autouse=True)
def _seeds():
    tf.keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _collective_keys():
    # Every strategy numbers its collectives from the same start, so two strategies in one process
    # mix up their collectives. TensorFlow's own tests avoid that in the same way.
    tf.distribute.MirroredStrategy._collective_key_base += 100_000


@pytest.fixture
def rng():
    """A NumPy random generator with the same seed in every test."""
    return np.random.default_rng(0)


@pytest.fixture
def data_dir():
    """The folder of real data in TensorFlow Datasets' layout; skips the test if it is missing."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "data"
    path = pathlib.Path(os.environ.get("TFWN_DATA_DIR", default))
    if not path.is_dir():
        pytest.skip(f"needs real data: no folder {path}; set TFWN_DATA_DIR")
    return path
