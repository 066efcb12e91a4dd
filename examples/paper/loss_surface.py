# SPDX-License-Identifier: Apache-2.0
"""The loss around trained weights: a slice along two random directions, as a table.

The directions are filter-normalized: what they add to a unit's weights is as long as
these are (Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018).

    python examples/paper/loss_surface.py [--quick]
"""

import sys

import keras
import numpy as np
from sklearn.datasets import load_digits

from lbe_ops import LBEModel, LBERegularizer


def build(depth, width, lbe):
    """A net of dense layers, with and without LBE."""
    keras.utils.set_random_seed(1)
    inputs = x = keras.Input((64,))
    for _ in range(depth):
        regularizer = LBERegularizer(lbe_alpha=3.0) if lbe else None
        x = keras.layers.Dense(width, "relu", activity_regularizer=regularizer)(x)
    outputs = keras.layers.Dense(10)(x)
    if lbe:
        model = LBEModel(inputs, outputs, LBE_strength=0.015)
    else:
        model = keras.Model(inputs, outputs)
    # A metric of its own: `loss` of a net with LBE is more than the cross-entropy.
    model.compile(
        keras.optimizers.Adam(2e-3, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.SparseCategoricalCrossentropy("error", from_logits=True)
        ],
    )
    return model


def surface(model, x, y, steps):
    """The cross-entropy at `steps x steps` points around the trained weights."""
    kernels = [w for w in model.trainable_variables if w.path.endswith("kernel")]
    trained, generator = [w.numpy() for w in kernels], np.random.default_rng(1)
    directions = []
    for _ in range(2):
        random = [generator.normal(size=w.shape) for w in trained]
        directions.append(
            [
                d * np.linalg.norm(w, axis=0) / np.linalg.norm(d, axis=0)
                for d, w in zip(random, trained, strict=True)
            ]
        )
    values = np.empty((steps, steps))
    for i, a in enumerate(np.linspace(-1, 1, steps)):
        for j, b in enumerate(np.linspace(-1, 1, steps)):
            for kernel, w, d, e in zip(kernels, trained, *directions, strict=True):
                kernel.assign(w + a * d + b * e)
            logs = model.evaluate(x, y, 512, verbose=0, return_dict=True)
            values[i, j] = logs["error"]
    return values


def main(quick):
    """Trains both nets and prints the surfaces."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    depth, width, epochs, steps = (4, 32, 3, 3) if quick else (15, 64, 20, 9)
    for lbe in (False, True):
        model = build(depth, width, lbe)
        model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
        print(f"LBE: {lbe}, cross-entropy for steps of -1 to 1 in both directions")
        print(np.array2string(surface(model, x, y, steps), precision=2), flush=True)


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
