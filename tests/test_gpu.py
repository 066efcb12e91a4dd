# SPDX-License-Identifier: Apache-2.0
"""The ops on a GPU: the CPU's bits, and training. Values are tested in test_ops.py."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import require_op_on_gpu, require_xla, tensor

import lbe_ops
from lbe_ops import reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu():
    require_op_on_gpu()


def assert_on_gpu(*tensors):
    """TensorFlow moves an op without a kernel for the GPU to the CPU, silently."""
    assert [a.device for a in tensors if not a.device.endswith("/device:GPU:0")] == []


SHAPES = [(2, 1), (9, 38), (130, 7, 9), (8193, 3), (64, 5000), (1500, 1100)]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_the_cpu(dtype, shape, mode, rng):
    x, _ = tensor(rng.normal(0.3, 1.7, shape), dtype)

    def function(x):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            entropy = lbe_ops.batch_entropy(x, native=True)
            statistics = lbe_ops.unit_statistics(x, native=True)
            loss = tf.reduce_sum(statistics.mean) + tf.reduce_sum(statistics.variance)
        return (
            entropy,
            statistics.mean,
            statistics.variance,
            tape.gradient(entropy, x),
            tape.gradient(loss, x),
        )

    found = {}
    for device in ("/CPU:0", "/GPU:0"):
        with tf.device(device):
            run = tf.function(function) if mode == "graph" else function
            outputs = run(tf.identity(x))
        assert all(output.device.endswith(device[1:]) for output in outputs)
        found[device] = [output.numpy().tobytes() for output in outputs]
    assert found["/GPU:0"] == found["/CPU:0"]


ACTIVATIONS = sorted(reference.ACTIVATIONS)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("bias", [False, True], ids=["tap", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_the_cpu_in_an_epilogue(dtype, shape, bias, mode, rng):
    z, _ = tensor(rng.normal(0.3, 1.7, shape), dtype)
    b, _ = tensor(rng.normal(0.3, 1.7, shape[-1]), dtype)
    arguments = [z, b] if bias else [z]

    def function(*arguments):
        results = []
        for activation in ACTIVATIONS:
            with tf.GradientTape() as tape:
                tape.watch(arguments)
                y, entropy, valid = lbe_ops.ops.epilogue(
                    *arguments, activation=activation, slope=0.3, native=True
                )
                loss = tf.reduce_sum(tf.cast(y * y, entropy.dtype)) + 50 * entropy
            results += [y, entropy, valid, *tape.gradient(loss, arguments)]
        return results

    found = {}
    for device in ("/CPU:0", "/GPU:0"):
        with tf.device(device):
            run = tf.function(function) if mode == "graph" else function
            outputs = run(*map(tf.identity, arguments))
        assert all(output.device.endswith(device[1:]) for output in outputs)
        found[device] = [output.numpy().tobytes() for output in outputs]
    assert found["/GPU:0"] == found["/CPU:0"]


@pytest.mark.parametrize("rows", [0, 1])
def test_an_epilogue_of_a_batch_too_small(rows):
    z, bias = tf.fill((rows, 3), -1.0), tf.constant([0.0, 2.0, 4.0])
    with tf.device("/GPU:0"), tf.GradientTape() as tape:
        tape.watch([z, bias])
        y, entropy, valid = lbe_ops.ops.epilogue(
            tf.identity(z), bias, activation="relu", ddof=1, native=True
        )
        loss = tf.reduce_sum(y) + entropy
    dz, dbias = tape.gradient(loss, [z, bias])
    assert_on_gpu(y, entropy, valid)
    np.testing.assert_array_equal(y, [[0.0, 1.0, 3.0]] * rows)
    assert (float(entropy), float(valid)) == (0, 0)
    np.testing.assert_array_equal(dz, [[0.0, 1.0, 1.0]] * rows)
    np.testing.assert_array_equal(dbias, np.array([0.0, 1.0, 1.0]) * rows)


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["regularizer", "fused"])
@pytest.mark.parametrize("use_native", [True, False])
def test_training(use_native, fused, xla):
    """The op runs where the layers run, and trains as plain TensorFlow does."""
    if use_native and xla:
        require_xla()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 20)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32)
    inputs = keras.Input((20,))
    hidden = inputs
    for _ in range(8):
        layer = lbe_ops.Dense_LBE if fused else keras.layers.Dense
        hidden = layer(
            16, "relu", activity_regularizer=lbe_ops.LBERegularizer(native=use_native)
        )(hidden)
    model = lbe_ops.LBEModel(inputs, keras.layers.Dense(2)(hidden), LBE_strength=0.1)
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=xla,
    )
    losses = model.fit(x, y, batch_size=64, epochs=5, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]

    # Where `fit` ran the op cannot be asked; so the same once more, on the model.
    @tf.function(jit_compile=xla, autograph=False)
    def entropy_of_the_first_layer(x):
        activations = model.layers[1](x)
        return activations, lbe_ops.batch_entropy(activations, native=use_native)

    assert_on_gpu(*entropy_of_the_first_layer(tf.constant(x)))
    assert_on_gpu(*(weight.value for weight in model.trainable_weights))


def test_many_steps_without_a_wait():
    """Launches pile up on the stream; each result is still its own."""
    x = tf.random.stateless_normal((2048, 1024), [1, 2])
    with tf.device("/GPU:0"):
        expected = [lbe_ops.batch_entropy(x * k, native=True) for k in range(1, 5)]
        expected = [float(entropy) for entropy in expected]
        results = [
            lbe_ops.batch_entropy(x * (1 + k % 4), native=True) for k in range(200)
        ]
        assert_on_gpu(*results)
        for k, entropy in enumerate(results):
            assert float(entropy) == expected[k % 4]
