"""A fixture for the three ways in which TensorFlow runs an op."""

import pytest
import tensorflow as tf


@pytest.fixture(params=["eager", "function", "xla"])
def mode(request):
    """A wrapper that makes a function run eagerly, as a graph, or compiled with XLA."""
    if request.param == "eager":
        return lambda f: f
    return lambda f: tf.function(f, jit_compile=request.param == "xla")
