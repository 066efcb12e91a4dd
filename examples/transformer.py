# SPDX-License-Identifier: Apache-2.0
"""A transformer block with LBE on its hidden layer, on the characters of a text.

python examples/transformer.py
"""

import argparse
import inspect

import keras
import numpy as np

from lbe_ops import Dense_LBE, LBEModel

text = np.frombuffer(inspect.getsource(argparse).encode("ascii", "ignore"), np.uint8)
samples = text[: len(text) // 65 * 65].reshape(-1, 65).astype("int32")
x, y = samples[:, :-1], samples[:, 1:]

keras.utils.set_random_seed(1)
inputs = keras.Input((64,), dtype="int32")
h = keras.layers.Embedding(128, 64)(inputs)
for _ in range(2):
    normed = keras.layers.LayerNormalization()(h)
    h += keras.layers.MultiHeadAttention(4, 16)(normed, normed, use_causal_mask=True)
    hidden = Dense_LBE(256, activation="gelu", LBE_alpha=0.5)
    h += keras.layers.Dense(64)(hidden(keras.layers.LayerNormalization()(h)))
model = LBEModel(inputs, keras.layers.Dense(128)(h), LBE_strength=0.1)
model.compile(
    keras.optimizers.Adam(3e-3, global_clipnorm=1.0),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = model.fit(x, y, batch_size=64, epochs=3, verbose=0).history
print(f"accuracy of the next character {history['accuracy'][-1]:.3f}")
