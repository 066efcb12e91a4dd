# SPDX-License-Identifier: Apache-2.0
"""A small transformer that writes Python, with and without LBE on its hidden layers.

It learns the next character of the source of `argparse`. `norm` says where the layer
normalization is: before each branch (pre-LN), after each sum (post-LN), or nowhere.

    python examples/paper/transformer.py [--quick]
"""

import argparse
import inspect
import sys

import keras
import numpy as np

from lbe_ops import Dense_LBE, LBEModel

CONTEXT = 32


def build(norm, lbe, blocks, width=32):
    """Blocks of causal attention and of one hidden layer; logits for each position."""
    keras.utils.set_random_seed(1)

    def normalize(x, where):
        return keras.layers.LayerNormalization()(x) if norm == where else x

    inputs = keras.Input((CONTEXT,), dtype="int32")
    places = keras.ops.one_hot(keras.ops.arange(CONTEXT), CONTEXT)
    x = keras.layers.Embedding(128, width)(inputs)
    x = x + keras.layers.Dense(width)(keras.ops.zeros_like(x[:, :, :1]) + places)
    for _ in range(blocks):
        branch = normalize(x, "pre")
        attention = keras.layers.MultiHeadAttention(4, width // 4)
        x = normalize(x + attention(branch, branch, use_causal_mask=True), "post")
        branch, dense = normalize(x, "pre"), Dense_LBE if lbe else keras.layers.Dense
        hidden = dense(4 * width, "gelu", **({"LBE_alpha": 1.0} if lbe else {}))
        x = normalize(x + keras.layers.Dense(width)(hidden(branch)), "post")
    outputs = keras.layers.Dense(128)(x)
    if lbe:
        model = LBEModel(inputs, outputs, LBE_strength=0.1)
    else:
        model = keras.Model(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    return model


def main(quick):
    """Trains nets and prints how often they know the next character."""
    text = inspect.getsource(argparse).encode("ascii", "replace")
    codes = np.frombuffer(text[: 12_000 if quick else 90_000], np.uint8)
    rows = codes[: len(codes) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    x, y, cut = rows[:-1], np.roll(codes, -1)[: rows.size], len(rows) * 9 // 10
    y = y.reshape(rows.shape)[:-1]
    for norm in ("none",) if quick else ("none", "pre", "post"):
        for lbe in (False, True):
            model = build(norm, lbe, blocks=1 if quick else 4)
            model.fit(x[:cut], y[:cut], 64, epochs=2 if quick else 10, verbose=0)
            logs = model.evaluate(x[cut:], y[cut:], verbose=0, return_dict=True)
            accuracy = f"next character right: {logs['accuracy']:.3f}"
            print(f"norm: {norm:4}  LBE: {lbe!s:5}  {accuracy}", flush=True)


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
