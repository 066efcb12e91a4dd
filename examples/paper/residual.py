# SPDX-License-Identifier: Apache-2.0
"""LBE in a residual net: behind every block, with and without batch normalization.

Shortcuts keep information flowing, so that LBE has little left to do (the experiment
"ResNet" of Peer et al., TMLR 2022, on small images and with few blocks).

    python examples/paper/residual.py [--quick]
"""

import sys

import keras
from sklearn.datasets import load_digits

from lbe_ops import LBE, LBEModel


def build(blocks, filters, normalized, lbe):
    """A convolutional net of blocks as in He et al. (CVPR 2016)."""
    keras.utils.set_random_seed(1)

    def convolve(x):
        x = keras.layers.Conv2D(
            filters, 3, padding="same", kernel_initializer="he_normal"
        )(x)
        return keras.layers.BatchNormalization(momentum=0.9)(x) if normalized else x

    inputs = keras.Input((8, 8, 1))
    x = keras.layers.ReLU()(convolve(inputs))
    for _ in range(blocks):
        branch = convolve(keras.layers.ReLU()(convolve(x)))
        x = keras.layers.ReLU()(x + branch)
        if lbe:
            x = LBE(lbe_alpha=1.0)(x)
    x = keras.layers.GlobalMaxPooling2D()(x)
    outputs = keras.layers.Dense(10)(x)
    if lbe:
        model = LBEModel(inputs, outputs, LBE_strength=0.05)
    else:
        model = keras.Model(inputs, outputs)
    model.compile(
        keras.optimizers.Adam(2e-3, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def main(quick):
    """Trains the four nets and prints their accuracy."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
    blocks, filters, epochs = (1, 8, 2) if quick else (10, 16, 10)
    for normalized in (False, True):
        for lbe in (False, True):
            model = build(blocks, filters, normalized, lbe)
            model.fit(x[:1400], y[:1400], batch_size=64, epochs=epochs, verbose=0)
            logs = model.evaluate(x[1400:], y[1400:], verbose=0, return_dict=True)
            print(
                f"batch normalization: {normalized!s:5}  LBE: {lbe!s:5}  "
                f"validation accuracy {logs['accuracy']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
