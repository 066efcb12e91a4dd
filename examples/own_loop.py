# SPDX-License-Identifier: Apache-2.0
"""A training loop of one's own.

python examples/own_loop.py
"""

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

from lbe_ops import Dense_LBE, LBEModel

x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")

keras.utils.set_random_seed(1)
inputs = h = keras.Input((64,))
for _ in range(20):
    h = Dense_LBE(64, activation="gelu", LBE_alpha=1.0, LBE_alpha_min=0.05)(h)
model = LBEModel(inputs, keras.layers.Dense(10)(h), LBE_strength=0.1)
optimizer = keras.optimizers.Adam(1e-3, global_clipnorm=1.0)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(optimizer, loss)


@tf.function
def step(x, y):
    """One step; returns the loss with LBE."""
    with tf.GradientTape() as tape:
        value = model.compute_loss(x, y, model(x, training=True))
    variables = model.trainable_variables
    optimizer.apply(tape.gradient(value, variables), variables)
    return value


batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), 1).batch(64)
for epoch in range(5):
    print(f"epoch {epoch + 1}: loss {[step(*batch) for batch in batches][-1]:.3f}")
