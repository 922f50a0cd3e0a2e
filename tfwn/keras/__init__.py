"""Weight normalization for Keras 3 layers and models."""

from tfwn.keras.wrapper import WeightNormalization

__all__ = ["WeightNormalization"]
