"""Creates the files in this folder with TensorFlow Addons 0.23.0 on Keras 2 (tf_keras).

Run TF_USE_LEGACY_KERAS=1 python make.py WRAPPERS with the path of Addons'
tensorflow_addons/layers/wrappers.py. The whole of Addons does not work with Keras 3 installed.
"""

import importlib.util
import sys

import numpy as np
import tensorflow as tf

spec = importlib.util.spec_from_file_location("wrappers", sys.argv[1])
wrappers = sys.modules["wrappers"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wrappers)
layers = tf.keras.layers
rng = np.random.default_rng(0)


def save(name, inputs, *parts, whole=False):
    model = tf.keras.Sequential([tf.keras.Input(inputs), *parts])
    x = rng.normal(1.0, 2.0, size=[8, *inputs]).astype(np.float32)
    model(x)
    model.compile("sgd", "mse")
    model.fit(x, np.zeros_like(model(x)), epochs=2, verbose=0)
    (model.save if whole else model.save_weights)(f"{name}.h5")
    np.savez_compressed(f"{name}.npz", x=x, y=model(x))


def normalized(layer, data_init):
    return wrappers.WeightNormalization(layer, data_init=data_init)


for data_init in (True, False):
    suffix = "data_init" if data_init else "plain"
    save(
        f"images_{suffix}",
        [5, 5, 2],
        normalized(layers.Conv2D(3, 2, activation="relu"), data_init),
        layers.BatchNormalization(),
        normalized(layers.Conv2DTranspose(3, 2, use_bias=False), data_init),
        layers.Flatten(),
        normalized(layers.Dense(2), data_init),
        whole=data_init,
    )
save("sequences", [4, 3], normalized(layers.LSTM(3), False), normalized(layers.Dense(2), True))
