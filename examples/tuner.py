# SPDX-License-Identifier: Apache-2.0
"""KerasTuner looks for a strength of LBE and its alpha.

pip install keras-tuner
python examples/tuner.py
"""

import tempfile

import keras
import keras_tuner
from sklearn.datasets import load_digits

from lbe_ops import Dense_LBE, LBEModel

x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")


def build(choice):
    """A model of what the tuner has chosen."""
    alpha = choice.Choice("alpha", [0.5, 1.0, 2.0])
    inputs = h = keras.Input((64,))
    for _ in range(20):
        h = Dense_LBE(32, activation="gelu", LBE_alpha=alpha, LBE_alpha_min=0.05)(h)
    strength = choice.Float("strength", 0.01, 1.0, sampling="log")
    model = LBEModel(inputs, keras.layers.Dense(10)(h), LBE_strength=strength)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(1e-3, global_clipnorm=1.0)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


with tempfile.TemporaryDirectory() as folder:
    tuner = keras_tuner.RandomSearch(
        build, "val_accuracy", max_trials=3, seed=1, directory=folder
    )
    tuner.search(x[:1400], y[:1400], epochs=3, validation_split=0.2, verbose=0)
    print(tuner.get_best_hyperparameters()[0].values)
