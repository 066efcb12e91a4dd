# SPDX-License-Identifier: Apache-2.0
"""How much information flows through a deep plain net: batch entropy over depth.

Each layer's batch entropy H before and after a short training, with and without LBE
(the experiment "information flow" of Peer et al., TMLR 2022). Without LBE H vanishes
with depth, and nothing is learned; LBE raises it layer by layer, from the front.

    python examples/paper/info_flow.py [--quick]
"""

import sys

import keras
from sklearn.datasets import load_digits

from lbe_ops import BatchEntropyLogger, Dense_LBE, LBEModel


def build(depth, width, lbe):
    """A net of dense layers whose initial weights are the same with and without LBE."""
    keras.utils.set_random_seed(1)
    inputs = x = keras.Input((64,))
    for _ in range(depth):
        if lbe:
            layer = Dense_LBE(width, "relu", LBE_alpha=3.0, LBE_alpha_min=0.3)
        else:
            layer = keras.layers.Dense(width, "relu")
        x = layer(x)
    outputs = keras.layers.Dense(10)(x)
    if lbe:
        model = LBEModel(inputs, outputs, LBE_strength=0.003)
    else:
        model = keras.Model(inputs, outputs)
    model.compile(
        keras.optimizers.Adam(2e-3, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def main(quick):
    """Trains both nets and prints H of every tenth layer."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    depth, width, epochs = (30, 32, 6) if quick else (50, 64, 20)
    for lbe in (False, True):
        model = build(depth, width, lbe)
        # All but the last of the dense layers: that one makes the logits.
        names = [layer.name for layer in model.layers[1:-1]]
        logger = BatchEntropyLogger(x[1400:], names)
        logger.set_model(model)
        rows = {"before": logger.measure()}
        model.fit(x[:1400], y[:1400], batch_size=64, epochs=epochs, verbose=0)
        rows["after"] = logger.measure()
        accuracy = model.evaluate(x[1400:], y[1400:], verbose=0, return_dict=True)
        print(f"LBE: {lbe}, validation accuracy {accuracy['accuracy']:.3f}")
        for when, values in rows.items():
            shown = "  ".join(f"{h:.1e}" for h in values[::10])
            print(f"  H of layers 1, 11, 21 ... {when:>6} training: {shown}")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
