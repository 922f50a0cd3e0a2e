"""Weight normalization for TensorFlow 2 (Salimans & Kingma 2016)."""

from tfwn.ops import weight_norm

__all__ = ["weight_norm"]
