# SPDX-License-Identifier: Apache-2.0
"""A deep autoencoder with and without LBE: which of them reconstructs its input.

LBE is multiplied by whatever loss is compiled, here the mean squared error. A net whose
entropy vanishes can only answer with the mean image.

    python examples/paper/autoencoder.py [--quick]
"""

import sys

import keras
from sklearn.datasets import load_digits

from lbe_ops import LBEModel, LBERegularizer


def build(depth, width, lbe):
    """Hidden layers, ten latent units in the middle of them, and the reconstruction."""
    keras.utils.set_random_seed(1)
    inputs = x = keras.Input((64,))
    for number in range(depth):
        if number == depth // 2:
            x = keras.layers.Dense(10)(x)
        regularizer = LBERegularizer(lbe_alpha=1.0) if lbe else None
        x = keras.layers.Dense(width, "relu", activity_regularizer=regularizer)(x)
    outputs = keras.layers.Dense(64)(x)
    if lbe:
        model = LBEModel(inputs, outputs, LBE_strength=1.0)
    else:
        model = keras.Model(inputs, outputs)
    # A name that no other metric has: `loss` of a net with LBE is more than the error.
    metric = keras.metrics.MeanSquaredError(name="error")
    optimizer = keras.optimizers.Adam(2e-3, global_clipnorm=1.0)
    model.compile(optimizer, "mse", metrics=[metric])
    return model


def main(quick):
    """Trains both nets and prints their validation errors."""
    x, _ = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    train, validation = x[:1400], x[1400:]
    depth, width, epochs = (16, 32, 6) if quick else (30, 64, 30)
    print(f"mean image: error {((validation - train.mean(axis=0)) ** 2).mean():.4f}")
    for lbe in (False, True):
        model = build(depth, width, lbe)
        model.fit(train, train, batch_size=64, epochs=epochs, verbose=0)
        logs = model.evaluate(validation, validation, verbose=0, return_dict=True)
        print(f"LBE: {lbe!s:5}  error {logs['error']:.4f}", flush=True)


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
