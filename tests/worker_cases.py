# SPDX-License-Identifier: Apache-2.0
"""A training in one of several processes; run by test_synchronized.py.

`python worker_cases.py FOLDER [plain]` trains as `TF_CONFIG` says, or alone without it,
and prints what came out as JSON.
"""

import json
import os
import sys

import keras
import numpy as np
import tensorflow as tf

from lbe_ops import BatchEntropyLogger, Dense_LBE, LBEModel

FOLDER = sys.argv[1]
several = "TF_CONFIG" in os.environ
strategy = (
    tf.distribute.MultiWorkerMirroredStrategy()
    if several
    else tf.distribute.get_strategy()
)
x = np.random.default_rng(0).normal(size=(56, 8)).astype("float32")
y = (x[:, 0] > 0) * 1


class OwnStep(LBEModel):
    """With a `train_step` of its own, as in Keras' guides."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss * strategy.num_replicas_in_sync)
            else:
                metric.update_state(y, self(x))
        return {metric.name: metric.result() for metric in self.metrics}


def model_of(kind, **options):
    with strategy.scope():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((8,))
        h = inputs
        for _ in range(3):
            h = Dense_LBE(16, activation="relu", LBE_alpha=1.0)(h)
        model = kind(inputs, keras.layers.Dense(2)(h), **options)
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        )
    return model


fit = {"batch_size": 16, "epochs": 3, "shuffle": False, "verbose": 0}
if "plain" in sys.argv:
    try:
        model_of(keras.Model).fit(x, y, **fit)
        print(json.dumps("trained"))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
    os._exit(0)

model = model_of(LBEModel, weigh_by_samples=True)
logger = BatchEntropyLogger(x)
callbacks = [
    logger,
    keras.callbacks.ModelCheckpoint(f"{FOLDER}/model.keras"),
    keras.callbacks.BackupAndRestore(f"{FOLDER}/backup"),
]
data = {"validation_data": (x[:21], y[:21]), "callbacks": callbacks}
history = model.fit(x, y, **fit, **data).history
own = model_of(OwnStep)
print(
    json.dumps(
        {
            "history": history,
            "evaluate": model.evaluate(x, y, batch_size=16, verbose=0),
            "predict": model.predict(x[:10], batch_size=4, verbose=0).tolist(),
            "entropies": logger.values,
            "weights": [weight.tolist() for weight in model.get_weights()],
            "saved": sorted(os.listdir(FOLDER)),
            "own step": own.fit(x[:48], y[:48], **fit).history["loss"],
        }
    )
)
