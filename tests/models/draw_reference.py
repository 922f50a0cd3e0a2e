"""The DRAW paper's model in NumPy, in float64 and image by image."""

import numpy as np


def filterbank(g, log_delta, log_variance, size, side):
    center = (g + 1) / 2 * side
    delta = (side - 1) / (size - 1) * np.exp(log_delta)
    f = np.zeros((size, side))
    for i in range(size):
        mu = center + (i - size / 2 + 0.5) * delta
        for a in range(side):
            f[i, a] = np.exp(-((a - mu) ** 2) / (2 * np.exp(log_variance)))
        f[i] /= f[i].sum() + 1e-4
    return f


def window(parameters, size, side):
    g_y, g_x, log_delta, log_variance, log_gamma = parameters
    f_y = filterbank(g_y, log_delta, log_variance, size, side)
    f_x = filterbank(g_x, log_delta, log_variance, size, side)
    return f_y, f_x, np.exp(log_gamma)


def sigmoid(t):
    return 1 / (1 + np.exp(-t))


def effective(weight):
    """w = g v / ||v||, column by column, or w itself."""
    if weight.parameterization == "normal":
        return weight.w.numpy().astype(np.float64)
    v, g = weight.v.numpy().astype(np.float64), weight.g.numpy().astype(np.float64)
    return np.stack([g[k] * v[:, k] / np.linalg.norm(v[:, k]) for k in range(len(g))], 1)


def lstm(cell, x, h, c):
    gates = x @ effective(cell.weight) + h @ effective(cell.recurrent_weight) + cell.b.numpy()
    i, f, a, o = np.split(gates, 4)
    p_i, p_f, p_o = cell.peephole.numpy()
    c_new = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * np.tanh(a)
    return sigmoid(o + p_o * c_new) * np.tanh(c_new), c_new


def linear(layer, h):
    return h @ effective(layer.weight) + layer.b.numpy()


def write(network, h_dec):
    config, written = network.config, linear(network.writer, h_dec)
    if not config.attention:
        return written.reshape(network.side, network.side)
    f_y, f_x, gamma = window(written[:5], config.write_size, network.side)
    patch = written[5:].reshape(config.write_size, config.write_size)
    return f_y.T @ patch @ f_x / gamma


def losses(network, x, u):
    """Returns the cross-entropy and all KL_t of one image x, with the noise u [T, latent]."""
    config = network.config
    canvas = np.zeros_like(x)
    h_enc, c_enc = np.zeros((2, config.encoder_units))
    h_dec, c_dec = np.zeros((2, config.decoder_units))
    kl = []
    for noise in u:
        error = x - sigmoid(canvas)
        if config.attention:
            f_y, f_x, gamma = window(linear(network.reader, h_dec), config.read_size, len(x))
            r = [gamma * (f_y @ image @ f_x.T) for image in (x, error)]
        else:
            r = [x, error]
        r = np.concatenate(r, 1).ravel()  # The two images side by side, row by row.
        h_enc, c_enc = lstm(network.encoder, np.append(r, h_dec), h_enc, c_enc)
        mu, log_sigma = np.split(linear(network.q, h_enc), 2)
        kl.append(np.sum(-log_sigma + (np.exp(2 * log_sigma) + mu**2) / 2 - 0.5))
        z = mu + np.exp(log_sigma) * noise
        h_dec, c_dec = lstm(network.decoder, z, h_dec, c_dec)
        canvas = canvas + write(network, h_dec)
    p = sigmoid(canvas)
    return -np.sum(x * np.log(p) + (1 - x) * np.log(1 - p)), np.array(kl)
