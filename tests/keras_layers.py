"""Keras layers of every supported kind, with inputs, for tests that each kind must pass."""

import keras
import tensorflow as tf


class Attention(keras.layers.Layer):
    """Self-attention as a layer with a single input."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(2, 4)

    def build(self, input_shape):
        self.attention.build(input_shape, input_shape)

    def call(self, x):
        return self.attention(x, x)


def normal(*shape):
    return tf.random.stateless_normal(shape, seed=[1, 2])


# For each name: a function that creates the layer, the layer's input, and its number of kernels.
LAYERS = {
    "dense": (lambda: keras.layers.Dense(5), normal(4, 8), 1),
    "conv": (lambda: keras.layers.Conv1D(4, 3), normal(4, 6, 8), 1),
    "transposed": (lambda: keras.layers.Conv2DTranspose(3, 2), normal(2, 4, 4, 3), 1),
    "einsum": (
        lambda: keras.layers.EinsumDense("abc,cde->abed", (None, 3, 2), bias_axes="ed"),
        normal(2, 5, 4),
        1,
    ),
    "embedding": (lambda: keras.layers.Embedding(9, 3), tf.constant([[1, 2, 1]]), 1),
    "lstm": (lambda: keras.layers.LSTM(3), normal(4, 6, 8), 2),
    "bidirectional": (
        lambda: keras.layers.Bidirectional(keras.layers.LSTM(3)),
        normal(4, 6, 8),
        4,
    ),
    "attention": (Attention, normal(2, 5, 8), 4),
}
