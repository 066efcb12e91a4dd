# SPDX-License-Identifier: Apache-2.0
"""Several devices, with the entropies of the whole batch; here, two parts of a CPU.

python examples/devices.py
"""

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

from lbe_ops import Dense_LBE, LBEModel

x, y = load_digits(return_X_y=True)
x = (x / 16).astype("float32")

# With GPUs: MirroredStrategy() alone.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    keras.utils.set_random_seed(1)
    inputs = h = keras.Input((64,))
    for _ in range(5):
        h = Dense_LBE(64, activation="gelu", LBE_alpha=1.0)(h)
    model = LBEModel(inputs, keras.layers.Dense(10)(h), LBE_strength=0.1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
history = model.fit(x, y, batch_size=64, epochs=3, verbose=0).history
print(f"{strategy.num_replicas_in_sync} replicas, {history['accuracy'][-1]:.3f}")
