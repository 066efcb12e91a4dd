# SPDX-License-Identifier: Apache-2.0
"""Twelve convolutions with LBE on each.

python examples/convolution.py
"""

import keras
from sklearn.datasets import load_digits

from lbe_ops import Conv2D_LBE, LBEModel

x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)

keras.utils.set_random_seed(1)
inputs = h = keras.Input((8, 8, 1))
for _ in range(12):
    h = Conv2D_LBE(16, 3, padding="same", activation="gelu", LBE_alpha=1.0)(h)
h = keras.layers.GlobalMaxPooling2D()(h)
model = LBEModel(inputs, keras.layers.Dense(10)(h), LBE_strength=0.1)
model.compile(
    keras.optimizers.Adam(2e-3, global_clipnorm=1.0),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(x[:1400], y[:1400], batch_size=64, epochs=4, verbose=0)
logs = model.evaluate(x[1400:], y[1400:], verbose=0, return_dict=True)
print(f"validation accuracy {logs['accuracy']:.3f}")
