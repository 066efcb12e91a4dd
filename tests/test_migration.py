# SPDX-License-Identifier: Apache-2.0
"""Code written for the TensorFlow port runs with the import changed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from lbe_ops import Conv2D_LBE, Dense_LBE, LBE_Model, LBERegularizer


def data(*shape, classes=10):
    random = np.random.default_rng(0)
    return (
        random.normal(size=shape).astype(np.float32),
        random.integers(0, classes, shape[0]),
    )


def assert_trains(model, x, y, metrics=("loss", "ce", "lbe", "max_lbe", "accuracy")):
    model.compile(
        optimizer=tf.keras.optimizers.Adam(1e-3, beta_1=0.95, global_clipnorm=1.0),
        loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    before = [float(r.lbe_alpha.value) for r in model.lbe_regularizers]
    history = model.fit(
        x, y, batch_size=8, epochs=2, validation_data=(x, y), verbose=0
    ).history
    for name in metrics:
        assert np.isfinite(history[name]).all()
        assert np.isfinite(history[f"val_{name}"]).all()
    after = [float(r.lbe_alpha.value) for r in model.lbe_regularizers]
    assert all(a != b for a, b in zip(after, before, strict=True))
    return history


def test_regularizers_in_a_subclassed_model():
    class Net(LBE_Model):
        def __init__(self):
            super().__init__(LBE_strength=0.1)
            self.lbe_regs = [
                LBERegularizer(
                    lbe_alpha=6.0,
                    lbe_alpha_min=0.5,
                    lbe_beta=1.0,
                    other_activity_regularizer=None,
                )
                for _ in range(10)
            ]
            self.dense_layers = [
                tf.keras.layers.Dense(32, activation="relu", activity_regularizer=r)
                for r in self.lbe_regs
            ]
            self.flatten = tf.keras.layers.Flatten()
            self.out = tf.keras.layers.Dense(10)

        def call(self, x):
            x = self.flatten(x)
            for layer in self.dense_layers:
                x = layer(x)
            return self.out(x)

    model = Net()
    x, y = data(16, 8, 8)
    assert_trains(model, x, y)
    assert len(model.lbe_regularizers) == 10
    assert len(model.weights) == 10 * 2 + 2 + 1


def test_the_same_in_a_plain_subclassed_model():
    class Net(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.lbe_regs = [LBERegularizer(lbe_alpha=6.0) for _ in range(2)]
            self.dense_layers = [
                tf.keras.layers.Dense(8, activity_regularizer=r) for r in self.lbe_regs
            ]

        def call(self, x):
            for layer in self.dense_layers:
                x = layer(x)
            return x

    model = Net()
    x, y = data(16, 5, classes=8)
    model.compile("adam", tf.keras.losses.SparseCategoricalCrossentropy(True))
    model.fit(x, y, verbose=0)
    assert all(float(r.lbe_alpha.value) != 6.0 for r in model.lbe_regs)


def test_regularizer_on_flatten():
    regularizer = LBERegularizer(2.0, 0.5, 1.0)
    inputs = tf.keras.Input((4, 4))
    x = tf.keras.layers.Dense(3)(inputs)
    x = tf.keras.layers.Flatten(activity_regularizer=regularizer)(x)
    model = LBE_Model(inputs, tf.keras.layers.Dense(10)(x), LBE_strength=0.1)
    assert_trains(model, *data(16, 4, 4))


@pytest.mark.parametrize("positional", [True, False])
def test_functional_model_of_dense_layers(positional):
    inputs = tf.keras.Input((28, 28))
    x = tf.keras.layers.Flatten()(inputs)
    for _ in range(3):
        x = Dense_LBE(
            32,
            activation="relu",
            LBE_alpha=3.0,
            LBE_alpha_min=0.3,
            LBE_beta=1.0,
            activity_regularizer=tf.keras.regularizers.L1(1e-6),
        )(x)
    outputs = tf.keras.layers.Dense(10)(x)
    if positional:
        model = LBE_Model(inputs, outputs, 0.25)
    else:
        model = LBE_Model(inputs=inputs, outputs=outputs, LBE_strength=0.25)
    assert model.LBE_strength == 0.25
    history = assert_trains(model, *data(16, 28, 28))
    # The other regularizer is in the loss, once, and not multiplied.
    assert history["loss"][-1] > history["ce"][-1] + 0.25 * history["lbe"][-1]


def test_functional_model_of_convolutions():
    inputs = keras.Input((8, 8, 3))
    x = Conv2D_LBE(
        6, 3, padding="same", activation="relu", LBE_alpha=2.0, LBE_alpha_min=0.5
    )(inputs)
    x = Conv2D_LBE(6, (3, 3), strides=2, kernel_regularizer="l2", LBE_beta=0.5)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    assert_trains(LBE_Model(inputs, keras.layers.Dense(10)(x)), *data(16, 8, 8, 3))
