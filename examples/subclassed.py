# SPDX-License-Identifier: Apache-2.0
"""A subclassed model: derive it from LBEModel, and put LBE on its layers.

python examples/subclassed.py
"""

import keras
from sklearn.datasets import load_digits

from lbe_ops import LBEModel, with_lbe

x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")


class Net(LBEModel):
    """Hidden layers with LBE, then logits."""

    def __init__(self, depth):
        super().__init__(LBE_strength=0.1)
        self.hidden = [
            with_lbe(keras.layers.Dense(64, "gelu"), lbe_alpha=1.0, lbe_alpha_min=0.05)
            for _ in range(depth)
        ]
        self.logits = keras.layers.Dense(10)

    def call(self, x):
        for layer in self.hidden:
            x = layer(x)
        return self.logits(x)


keras.utils.set_random_seed(1)
model = Net(depth=30)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile("adam", loss, metrics=["accuracy"])
model.fit(x[:1400], y[:1400], batch_size=64, epochs=30, verbose=0)
logs = model.evaluate(x[1400:], y[1400:], verbose=0, return_dict=True)
print(f"validation accuracy {logs['accuracy']:.3f}")
