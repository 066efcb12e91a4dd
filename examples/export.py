# SPDX-License-Identifier: Apache-2.0
"""What is exported is the net without LBE, which is served without this package.

python examples/export.py
"""

import subprocess
import sys
import tempfile

import keras

from lbe_ops import Dense_LBE, LBEModel

inputs = h = keras.Input((64,), name="pixels")
for _ in range(5):
    h = Dense_LBE(64, activation="relu")(h)
model = LBEModel(inputs, keras.layers.Dense(10)(h), LBE_strength=0.1)

SERVER = """
import sys, tensorflow as tf
served = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
(logits,) = served(pixels=tf.ones((3, 64))).values()
print("served", logits.shape, "lbe_ops" in sys.modules)
"""
with tempfile.TemporaryDirectory() as folder:
    model.export(folder, verbose=False)  # for TensorFlow Serving and TensorFlow Lite
    subprocess.run([sys.executable, "-c", SERVER, folder], check=True)
