"""Tests importing tfwn again, as interactive sessions and plugin hosts do."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
import importlib, sys
import keras, numpy as np, tensorflow as tf, tfwn, tfwn.keras

def check():
    v, g = tf.Variable([[3.0, 1.0], [4.0, 0.0]]), tf.Variable([1.0, 2.0])
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            loss = tf.reduce_sum(tfwn.weight_norm(v, g) ** 2)
        gradient = inner.gradient(loss, g)
        again = tf.reduce_sum(gradient**2)
    np.testing.assert_allclose(gradient, [2, 4], rtol=1e-6)
    np.testing.assert_allclose(outer.gradient(again, v), np.zeros([2, 2]), atol=1e-5)
    w = tf.vectorized_map(lambda v: tfwn.weight_norm(v, g), tf.ones([3, 2, 2]))
    np.testing.assert_allclose(w, np.broadcast_to([0.5**0.5, 2 * 0.5**0.5], [3, 2, 2]), rtol=1e-6)
    model = keras.Sequential(
        [keras.Input([3]), tfwn.keras.WeightNormalization(keras.layers.Dense(2))]
    )
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    model.save(sys.argv[1])
    x = tf.ones([1, 3])
    np.testing.assert_allclose(keras.models.load_model(sys.argv[1])(x), model(x))
    layer = tfwn.Dense(2)
    y = layer(x)
    np.testing.assert_allclose(tfwn.reparameterize(tfwn.fold(layer))(x), y, rtol=1e-5, atol=1e-6)

check()
"""

# One after the other in one process, with a check after each.
AGAIN = {
    "reload": [
        "importlib.reload(tfwn)",
        # Reloaded code must take effect, although TensorFlow keeps the gradient registered first.
        """
gradient = tfwn.ops._backward
importlib.reload(tfwn.ops)
assert tfwn.ops._backward is not gradient
calls = []
new = tfwn.ops._backward
tfwn.ops._backward = lambda *arguments: calls.append(1) or new(*arguments)
check()
assert calls
""",
        """
for name in sorted(name for name in sys.modules if name.startswith("tfwn")):
    importlib.reload(sys.modules[name])
""",
    ],
    "import anew": [
        """
del sys.modules["tfwn"]
import tfwn, tfwn.keras
""",
        """
for name in [name for name in sys.modules if name.partition(".")[0] == "tfwn"]:
    del sys.modules[name]
import tfwn, tfwn.keras
""",
    ],
}


@pytest.mark.parametrize("ways", AGAIN.values(), ids=AGAIN.keys())
def test_import_again(ways, tmp_path):
    code = CHECK + "".join(f"{way}\ncheck()\n" for way in ways)
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.keras"],
        check=True,
        cwd=Path(__file__).parents[2],
    )


def test_a_star_import_keeps_the_users_keras():
    code = (
        "import sys; keras = 1; from tfwn import *; assert keras == 1; assert Dense; "
        "assert 'tfwn.keras' not in sys.modules; import tfwn; assert tfwn.keras.WeightNormalization"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
