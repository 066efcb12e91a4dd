# SPDX-License-Identifier: Apache-2.0
"""LBE on the convolutions of a model of keras.applications.

python examples/applications.py
"""

import keras
from sklearn.datasets import load_digits

from lbe_ops import add_lbe

x, y = load_digits(return_X_y=True)
x = keras.ops.image.resize(x.reshape(-1, 8, 8, 1) / 16, (32, 32))
x = keras.ops.convert_to_numpy(keras.ops.repeat(x, 3, axis=-1))[:256]

keras.utils.set_random_seed(1)
net = keras.applications.MobileNetV2(
    (32, 32, 3), alpha=0.35, weights=None, classes=10, classifier_activation=None
)
model = add_lbe(net, keras.layers.Conv2D, LBE_strength=0.1)
model.compile(
    "adam",
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = model.fit(x, y[:256], batch_size=64, epochs=1, verbose=0).history
print(", ".join(f"{name} {values[-1]:.3f}" for name, values in history.items()))
