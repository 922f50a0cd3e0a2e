"""Weight normalization for TensorFlow 2 (Salimans & Kingma 2016)."""

import importlib

from tfwn import convert
from tfwn.conv import (
    Conv1D,
    Conv1DTranspose,
    Conv2D,
    Conv2DTranspose,
    Conv3D,
    Conv3DTranspose,
    DepthwiseConv2D,
)
from tfwn.data_dependent_init import data_dependent_init, is_initialized
from tfwn.dense import Dense
from tfwn.embedding import Embedding
from tfwn.mean_only_batch_norm import MeanOnlyBatchNormalization
from tfwn.ops import weight_norm
from tfwn.recurrent import GRU, LSTM, RNN, SimpleRNN
from tfwn.recurrent_cells import GRUCell, LSTMCell, SimpleRNNCell
from tfwn.reparameterize import fold, reparameterize
from tfwn.weight import Weight

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conv1D",
    "Conv1DTranspose",
    "Conv2D",
    "Conv2DTranspose",
    "Conv3D",
    "Conv3DTranspose",
    "Dense",
    "DepthwiseConv2D",
    "Embedding",
    "GRUCell",
    "LSTMCell",
    "MeanOnlyBatchNormalization",
    "SimpleRNN",
    "SimpleRNNCell",
    "Weight",
    "convert",
    "data_dependent_init",
    "fold",
    "is_initialized",
    "reparameterize",
    "weight_norm",
]


def __getattr__(name):
    # Imported lazily, because only tfwn.keras needs Keras 3. Not in __all__, because
    # `from tfwn import *` would import it and hide the user's own `keras`.
    if name == "keras":
        return importlib.import_module("tfwn.keras")
    raise AttributeError(f"module 'tfwn' has no attribute {name!r}")
