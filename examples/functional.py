# SPDX-License-Identifier: Apache-2.0
"""A functional model of 30 GELU layers, which do not train without LBE.

python examples/functional.py
"""

import keras
from sklearn.datasets import load_digits

from lbe_ops import Dense_LBE, LBEModel

x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")

keras.utils.set_random_seed(1)
inputs = h = keras.Input((64,))
for _ in range(30):
    h = Dense_LBE(64, activation="gelu", LBE_alpha=1.0, LBE_alpha_min=0.05)(h)
model = LBEModel(inputs, keras.layers.Dense(10)(h), LBE_strength=0.1)
model.compile(
    keras.optimizers.Adam(1e-3, global_clipnorm=1.0),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(x[:1400], y[:1400], batch_size=64, epochs=30, verbose=0)
logs = model.evaluate(x[1400:], y[1400:], verbose=0, return_dict=True)
print(f"validation accuracy {logs['accuracy']:.3f}")
