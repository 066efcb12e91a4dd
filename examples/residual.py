# SPDX-License-Identifier: Apache-2.0
"""Residual blocks without normalization: LBE behind each block.

python examples/residual.py
"""

import keras
from sklearn.datasets import load_digits

from lbe_ops import LBE, LBEModel

x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")

keras.utils.set_random_seed(1)
inputs = keras.Input((64,))
h = keras.layers.Dense(64)(inputs)
for _ in range(20):
    branch = keras.layers.Dense(64, "gelu", kernel_initializer="he_normal")(h)
    h = LBE(lbe_alpha=1.0)(h + keras.layers.Dense(64)(branch))
model = LBEModel(inputs, keras.layers.Dense(10)(h), LBE_strength=0.1)
model.compile(
    keras.optimizers.Adam(1e-3, global_clipnorm=1.0),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(x[:1400], y[:1400], batch_size=64, epochs=5, verbose=0)
logs = model.evaluate(x[1400:], y[1400:], verbose=0, return_dict=True)
print(f"validation accuracy {logs['accuracy']:.3f}")
