"""Weight normalization for TensorFlow 2 (Salimans & Kingma 2016)."""

from tfwn.dense import Dense
from tfwn.ops import weight_norm
from tfwn.weight import Weight

__all__ = ["Dense", "Weight", "weight_norm"]
