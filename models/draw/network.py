"""The network: attention, encoder, decoder, and the bound (DRAW's paper, arXiv 1502.04623)."""

import functools
import itertools
from typing import Any, NamedTuple

import tensorflow as tf

import tfwn
from models.common import layers
from models.draw.config import Config

SIDE = 28  # Height and width of the images, in pixels.


class Window(NamedTuple):
    """An attention window: a grid of size x size Gaussian filters on the image.

    Attributes:
      center: the grid's center, y and x, in pixels, float32 [batch, 2].
      delta: distance between neighboring filters in pixels, [batch, 1].
      sigma: standard deviation of the filters in pixels, [batch, 1].
      gamma: intensity, [batch, 1].
    """

    center: tf.Tensor
    delta: tf.Tensor
    sigma: tf.Tensor
    gamma: tf.Tensor


def window(parameters: tf.Tensor, size: int, side: int) -> Window:
    """Returns the window for (g_y, g_x, log delta, log sigma^2, log gamma), [batch, 5].

    center = (g + 1) / 2 * side; delta = (side - 1) / (size - 1) * exp(log delta). If all
    parameters are 0, the grid covers the image.
    """
    g, log_delta, log_variance, log_gamma = tf.split(parameters, [2, 1, 1, 1], 1)
    # Beyond these limits, squared distances and the gradient of 1 / sigma^2 overflow float32.
    # Filters that far apart or that narrow see no pixel anyway.
    log_delta, log_variance = tf.minimum(log_delta, 40.0), tf.maximum(log_variance, -40.0)
    delta = (side - 1) / (size - 1) * tf.exp(log_delta)
    return Window((g + 1) / 2 * side, delta, tf.exp(log_variance / 2), tf.exp(log_gamma))


def filterbanks(window: Window, size: int, side: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns F_y and F_x, both [batch, size, side]; each row is a filter along one axis.

    mu_i = center + delta (i - size/2 + 1/2); F_ia = exp(-(a - mu_i)^2 / (2 sigma^2)) divided by
    its sum over the pixels a = 0, 1, ... plus 1e-4, so that a filter outside the image is 0.
    """
    i = tf.range(size, dtype=tf.float32) - size / 2 + 0.5
    a = tf.range(side, dtype=tf.float32)
    mu = window.center[:, :, None] + (window.delta * i)[:, None, :]
    exponent = -0.5 / tf.square(window.sigma)
    f = tf.exp(tf.square(a - mu[..., None]) * exponent[:, :, None, None])
    f /= tf.reduce_sum(f, 3, keepdims=True) + 1e-4
    return f[:, 0], f[:, 1]


class Network(tf.Module):
    """Encoder and decoder LSTMs, q(z|x), and the linear maps for reading and writing.

    Args:
      config: the Config.
      side: height and width of the images, in pixels.
      dtype: of matrix products and LSTMs; canvas, windows, q and the bound are float32.
    """

    def __init__(self, config: Config, side: int = SIDE, dtype=tf.float32):
        super().__init__()
        self.config, self.side, self.dtype = config, side, dtype
        choices = {"parameterization": config.parameterization, "compute_dtype": dtype}
        seeds = ([config.seed, index] for index in itertools.count())

        def initial(*_):
            return functools.partial(
                tf.random.stateless_normal, seed=next(seeds), stddev=config.initial_stddev
            )

        make = layers.Layers(config.parameterization, initial, dtype)

        def lstm(inputs, units):
            cell = tfwn.LSTMCell(
                units,
                kernel_initializer=initial(),
                recurrent_initializer=initial(),
                peepholes=True,
                peephole_initializer=initial(),
                unit_forget_bias=False,
                **choices,
            )
            cell.build(tf.TensorShape([None, inputs]))
            return cell

        def linear(inputs, units):
            layer = make.dense(units)
            layer.build(tf.TensorShape([None, inputs]))
            return layer

        h_dec, pixels = config.decoder_units, side**2
        if config.attention:
            seen, self.reader = 2 * config.read_size**2, linear(h_dec, 5)
        else:
            seen, self.reader = 2 * pixels, None
        self.encoder = lstm(seen + h_dec, config.encoder_units)
        self.q = linear(config.encoder_units, 2 * config.latent_units)
        self.decoder = lstm(config.latent_units, h_dec)
        self.writer = linear(h_dec, 5 + config.write_size**2 if config.attention else pixels)

    def weights(self) -> dict:
        """Returns every w by the name of its layer, computed once for all glimpses."""
        cells = {"encoder": self.encoder, "decoder": self.decoder}
        layers = {"q": self.q, "writer": self.writer}
        if self.reader is not None:
            layers["reader"] = self.reader
        named: dict[str, Any] = {name: cell.effective_weights() for name, cell in cells.items()}
        return named | {name: layer.weight() for name, layer in layers.items()}

    def read(self, x, error, h_dec, weights) -> tf.Tensor:
        """Returns what the encoder reads from x and from the error x - sigmoid(c), [batch, ...].

        With attention that is gamma F_y I F_x' of both images I, else the two whole images.
        """
        both, size, side = tf.concat([x, error], 2), self.config.read_size, self.side
        if self.reader is None:
            return tf.reshape(both, [-1, 2 * side**2])
        parameters = tf.cast(self.reader(h_dec, weights["reader"]), tf.float32)
        seen = window(parameters, size, side)
        f_y, f_x = filterbanks(seen, size, side)
        rows = tf.reshape(f_y @ both, [-1, 2 * size, side])
        return seen.gamma * tf.reshape(tf.matmul(rows, f_x, transpose_b=True), [-1, 2 * size**2])

    def write(self, h_dec, weights) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the update of the canvas, [batch, side, side], and the window's parameters.

        With attention the update is F_y' w F_x / gamma, else a linear map of h_dec.
        """
        linear = tf.cast(self.writer(h_dec, weights["writer"]), tf.float32)
        size, side = self.config.write_size, self.side
        if self.reader is None:
            return tf.reshape(linear, [-1, side, side]), linear[:, :0]
        parameters, patch = tf.split(linear, [5, size**2], 1)
        written = window(parameters, size, side)
        f_y, f_x = filterbanks(written, size, side)
        patch = tf.reshape(patch / written.gamma, [-1, size, size])
        return tf.matmul(f_y, patch @ f_x, transpose_a=True), parameters

    def __call__(self, x, u, weights=None) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the cross-entropy of x, [batch], and KL_t, [T, batch]; the bound is -their sum.

        Args:
          x: float32 [batch, side, side], 0 or 1.
          u: float32 [T, batch, latent_units], standard normal noise.
          weights: `self.weights()`, if already computed.
        """
        weights = self.weights() if weights is None else weights
        steps, _, latent = u.shape
        noise = tf.TensorArray(tf.float32, steps, element_shape=u.shape[1:]).unstack(u)
        qs = tf.TensorArray(tf.float32, steps, element_shape=[u.shape[1], 2 * latent])

        def glimpse(t, canvas, encoder, decoder, qs):
            h_dec = decoder[0]
            r = self.read(x, x - tf.sigmoid(canvas), h_dec, weights)
            seen = tf.concat([tf.cast(r, self.dtype), h_dec], 1)
            h_enc, encoder = self.encoder(seen, encoder, weights["encoder"])
            q = tf.cast(self.q(h_enc, weights["q"]), tf.float32)
            mu, log_sigma = tf.split(q, 2, 1)
            z = mu + tf.exp(log_sigma) * noise.read(t)
            h_dec, decoder = self.decoder(z, decoder, weights["decoder"])
            return t + 1, canvas + self.write(h_dec, weights)[0], encoder, decoder, qs.write(t, q)

        batch = tf.shape(x)[0] if x.shape[0] is None else x.shape[0]
        states = [cell.get_initial_state(batch) for cell in (self.encoder, self.decoder)]
        _, canvas, _, _, qs = tf.while_loop(
            lambda t, *_: t < steps,
            glimpse,
            (0, tf.zeros_like(x), *states, qs),
            maximum_iterations=steps,
        )
        mu, log_sigma = tf.split(qs.stack(), 2, 2)
        kl = tf.reduce_sum((tf.exp(2 * log_sigma) + tf.square(mu) - 1) / 2 - log_sigma, 2)
        losses = tf.nn.sigmoid_cross_entropy_with_logits(x, canvas)
        return tf.reduce_sum(losses, [1, 2]), kl

    def sample(self, u) -> tuple[tf.Tensor, tf.Tensor]:
        """Draws images; returns sigmoid(c_t), [T, batch, side, side], and the windows' parameters.

        Args:
          u: float32 [T, batch, latent_units]: z, standard normal.
        """
        weights = self.weights()
        canvas = tf.zeros([u.shape[1], self.side, self.side])
        decoder = self.decoder.get_initial_state(u.shape[1])
        canvases, windows = [], []
        for z in u:
            h_dec, decoder = self.decoder(z, decoder, weights["decoder"])
            written, parameters = self.write(h_dec, weights)
            canvas += written
            canvases.append(tf.sigmoid(canvas))
            windows.append(parameters)
        return tf.stack(canvases), tf.stack(windows)
