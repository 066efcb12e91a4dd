# SPDX-License-Identifier: Apache-2.0
"""How the units of each layer are distributed over a batch, before and after training.

`unit_statistics` gives mean, variance and entropy of every unit. Batch entropy sees the
variance alone, as if units were Gaussian; after a ReLU they are not: the share of
exact zeros and the skewness beside it say how far off that is.

    python examples/paper/neuron_distribution.py [--quick]
"""

import sys

import keras
import numpy as np
from sklearn.datasets import load_digits

from lbe_ops import unit_statistics


def describe(activations):
    """A line about the units of a layer, from its output for a batch."""
    statistics = unit_statistics(activations)
    x, mean = np.array(activations, np.float64), statistics.mean.numpy()
    variance = statistics.variance.numpy()
    deviation = np.sqrt(variance)
    alive = deviation > 0
    skewness = np.mean(((x - mean)[:, alive] / deviation[alive]) ** 3)
    return (
        f"H {statistics.entropy.numpy().mean():.3f}  "
        f"deviation {np.sqrt(variance.mean()):.3f}  "
        f"dead units {1 - alive.mean():4.0%}  zeros {np.mean(x == 0):4.0%}  "
        f"skewness {skewness:.1f}"
    )


def main(quick):
    """Trains a net of six layers and prints a line for each, before and after."""
    keras.utils.set_random_seed(1)
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    width, epochs = (32, 2) if quick else (500, 20)
    inputs = h = keras.Input((64,))
    hidden = []
    for _ in range(6):
        h = keras.layers.Dense(width, "relu", kernel_initializer="he_normal")(h)
        hidden.append(h)
    model = keras.Model(inputs, keras.layers.Dense(10, "softmax")(h))
    model.compile("adam", "sparse_categorical_crossentropy")
    outputs = keras.Model(inputs, hidden)
    for when in ("before", "after"):
        print(f"{when} training")
        for number, activations in enumerate(outputs(x[1400:]), start=1):
            print(f"  layer {number}: {describe(activations)}")
        if when == "before":
            model.fit(x[:1400], y[:1400], batch_size=128, epochs=epochs, verbose=0)


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
