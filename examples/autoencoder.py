# SPDX-License-Identifier: Apache-2.0
"""A deep autoencoder: LBE is multiplied by whatever loss is compiled.

python examples/autoencoder.py
"""

import keras
from sklearn.datasets import load_digits

from lbe_ops import Dense_LBE, LBEModel

x = (load_digits().data / 16).astype("float32")

keras.utils.set_random_seed(1)
inputs = h = keras.Input((64,))
for units in [64] * 8 + [10] + [64] * 8:
    h = Dense_LBE(units, activation="gelu", LBE_alpha=1.0, LBE_alpha_min=0.05)(h)
model = LBEModel(inputs, keras.layers.Dense(64)(h), LBE_strength=0.1)
model.compile(keras.optimizers.Adam(1e-3, global_clipnorm=1.0), "mse")
model.fit(x[:1400], x[:1400], batch_size=64, epochs=10, verbose=0)
logs = model.evaluate(x[1400:], x[1400:], verbose=0, return_dict=True)
mean = ((x[1400:] - x[:1400].mean(axis=0)) ** 2).mean()
print(f"squared error {logs['ce']:.4f}, of the mean image {mean:.4f}")
