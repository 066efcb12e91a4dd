# SPDX-License-Identifier: Apache-2.0
"""Normalization, SELU and LBE in a deep net: who keeps the entropy up, and who learns.

The experiment "normalization" of Peer et al. (TMLR 2022), with LBE beside it.

    python examples/paper/normalization.py [--quick]
"""

import sys

import keras
from sklearn.datasets import load_digits

from lbe_ops import LBE, BatchEntropyLogger, LBEModel

NETS = ("none", "batch", "layer", "selu", "lbe")


def build(kind, depth, width):
    """A net whose layers are weights, normalization, activation, and LBE or not."""
    keras.utils.set_random_seed(1)
    inputs = x = keras.Input((64,))
    for _ in range(depth):
        initializer = "lecun_normal" if kind == "selu" else "glorot_uniform"
        x = keras.layers.Dense(width, kernel_initializer=initializer)(x)
        if kind == "batch":
            x = keras.layers.BatchNormalization(momentum=0.9)(x)
        elif kind == "layer":
            x = keras.layers.LayerNormalization()(x)
        x = keras.layers.Activation("selu" if kind == "selu" else "relu")(x)
        if kind == "lbe":
            x = LBE(lbe_alpha=3.0)(x)
    outputs = keras.layers.Dense(10)(x)
    if kind == "lbe":
        model = LBEModel(inputs, outputs, LBE_strength=0.015)
    else:
        model = keras.Model(inputs, outputs)
    model.compile(
        keras.optimizers.Adam(2e-3, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def main(quick):
    """Trains a net of each kind and prints its entropies and its accuracy."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    depth, width, epochs = (8, 16, 1) if quick else (30, 64, 20)
    print("net    H after layer 1, middle, last    validation accuracy")
    for kind in NETS:
        model = build(kind, depth, width)
        model.fit(x[:1400], y[:1400], batch_size=64, epochs=epochs, verbose=0)
        logger = BatchEntropyLogger(x[1400:], keras.layers.Activation)
        logger.set_model(model)
        h = logger.measure()
        shown = "".join(f"{h[i]:10.1e}" for i in (0, depth // 2, depth - 1))
        logs = model.evaluate(x[1400:], y[1400:], verbose=0, return_dict=True)
        print(f"{kind:5s}{shown}    {logs['accuracy']:.3f}", flush=True)


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
