# SPDX-License-Identifier: Apache-2.0
"""Initializers, critical gains, and LSUV against NumPy in float64."""

import doctest
import json
import math
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import samples

import lbe_ops
from lbe_ops import Conv2D_LBE, Dense_LBE, LBEModel, initializers
from lbe_ops.initializers import (
    DeltaOrthogonal,
    LooksLinear,
    critical_gain,
    lsuv,
)

# Keras reads a variable into NumPy 2 in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

layers = keras.layers


def test_examples_in_docstrings():
    failed, attempted = doctest.testmod(initializers)
    assert attempted > 0
    assert failed == 0


# Initializers


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("inputs", "units"), [(6, 10), (10, 6), (8, 8)])
def test_looks_linear_kernels_are_mirrored_and_orthogonal(first, inputs, units):
    initializer = LooksLinear(first=first, seed=3, gain=1.5)
    kernel = np.array(initializer((inputs, units), "float64"))
    left, right = np.split(kernel / 1.5, 2, axis=1)
    np.testing.assert_array_equal(left, -right)
    if not first:
        upper, lower = np.split(left, 2)
        np.testing.assert_array_equal(upper, -lower)
        left = upper
    small = left if left.shape[0] < left.shape[1] else left.T
    np.testing.assert_allclose(small @ small.T, np.eye(len(small)), atol=1e-12)
    again = LooksLinear.from_config(initializer.get_config())
    np.testing.assert_array_equal(again((inputs, units), "float64"), kernel)


def test_looks_linear_refuses_what_it_cannot_make():
    for first, shape in ((True, (4, 3)), (False, (3, 4))):
        with pytest.raises(ValueError, match=r"must be even. Received: a kernel of"):
            LooksLinear(first=first)(shape)
    with pytest.raises(ValueError, match=r"gain must be a finite number. Received: "):
        LooksLinear(gain=math.inf)


def looks_linear_net(activation, gain, depth=100):
    """A net, and what the pairs of its last layer make of samples, beside these."""
    net = keras.Sequential([keras.Input((4,), dtype="float64")])
    for number in range(depth):
        kernel = LooksLinear(first=number == 0, seed=number, gain=gain)
        arguments = {"kernel_initializer": kernel, "dtype": "float64"}
        net.add(layers.Dense(8, activation, **arguments))
    x = samples(6, 4, dtype=np.float64)
    positive, negative = np.split(np.array(net(x)), 2, axis=1)
    return x, positive - negative


def leaky(z):
    return keras.ops.leaky_relu(z, 0.25)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "softplus", leaky])
def test_a_deep_looks_linear_net_is_an_isometry(activation):
    """Up to the activations in float64, which gelu's error function is not quite."""
    gain = critical_gain(activation, pairs=True)
    assert gain == pytest.approx(1 if activation is not leaky else 0.8, rel=1e-8)
    x, y = looks_linear_net(activation, gain)
    np.testing.assert_allclose(y @ y.T, x @ x.T, rtol=1e-5, atol=1e-5)


def test_looks_linear_makes_a_tanh_net_of_sigmoid():
    gain = critical_gain("sigmoid", pairs=True)
    assert gain == pytest.approx(2, rel=1e-8)
    x, y = looks_linear_net("sigmoid", gain, depth=20)
    h = x
    for number in range(20):
        matrix = LooksLinear(first=True, seed=number)((4, 8), "float64")[:, :4]
        h = np.tanh(h @ np.array(matrix))
    np.testing.assert_allclose(y, h, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("channels", [(3, 3), (3, 8), (8, 3)])
@pytest.mark.parametrize("window", [(), (3,), (4, 5), (3, 2, 1)])
def test_delta_orthogonal_is_an_orthogonal_matrix_at_the_centre(window, channels):
    kernel = np.array(DeltaOrthogonal(1.5, seed=3)((*window, *channels), "float64"))
    assert kernel.shape == (*window, *channels)
    centre = tuple((length - 1) // 2 for length in window)
    matrix = kernel[centre] / 1.5
    small = matrix if channels[0] <= channels[1] else matrix.T
    np.testing.assert_allclose(small @ small.T, np.eye(3), atol=1e-12)
    kernel[centre] = 0
    np.testing.assert_array_equal(kernel, 0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_deep_convolution_with_delta_orthogonal_kernels_is_an_isometry(rank):
    conv = (layers.Conv1D, layers.Conv2D, layers.Conv3D)[rank - 1]
    same = {"padding": "same", "dtype": "float64"}
    net = keras.Sequential([keras.Input((5,) * rank + (2,), dtype="float64")])
    for seed in range(20):
        kernel = DeltaOrthogonal(2.0 ** (-1) ** seed, seed=seed)
        units, size = 6 + seed // 10, 1 + seed % 4
        net.add(conv(units, size, kernel_initializer=kernel, **same))
    x = samples(4, *(5,) * rank, 2, dtype=np.float64)
    y = np.array(net(x))
    # Each position by itself, and angles between positions and samples as well.
    x, y = x.reshape(-1, 2), y.reshape(-1, 7)
    np.testing.assert_allclose(y @ y.T, x @ x.T, atol=1e-12)


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "initializer", [LooksLinear(seed=5), DeltaOrthogonal(0.5, seed=5)]
)
def test_kernels_have_the_dtype_and_equal_seeds_give_equal_ones(initializer, dtype):
    kernel = initializer((3, 4, 6), dtype=dtype)
    assert kernel.dtype == (dtype or "float32")
    data = keras.saving.serialize_keras_object(initializer)
    again = keras.saving.deserialize_keras_object(data)
    assert again.get_config() == initializer.get_config()
    np.testing.assert_array_equal(again((3, 4, 6), dtype=dtype), kernel)


@pytest.mark.parametrize("kind", [LooksLinear, DeltaOrthogonal])
def test_without_a_seed_kernels_differ_and_follow_the_seed_of_keras(kind):
    keras.utils.set_random_seed(1)
    one, two = np.array(kind()((4, 6))), np.array(kind()((4, 6)))
    assert np.abs(one - two).max() > 0.1
    keras.utils.set_random_seed(1)
    np.testing.assert_array_equal(kind()((4, 6)), one)


def test_delta_orthogonal_refuses_what_it_cannot_make():
    with pytest.raises(ValueError, match=r"gain must be a finite number. Received: "):
        DeltaOrthogonal(math.nan)
    with pytest.raises(ValueError, match=r"\[\*window, inputs, units\].*shape=\(3,\)"):
        DeltaOrthogonal()((3,))


def test_files_with_the_initializers_load(tmp_path):
    """Also those of LooksLinear from its former module, when it had no gain."""
    net = keras.Sequential(
        [
            keras.Input((5, 2)),
            layers.Conv1D(4, 3, kernel_initializer=DeltaOrthogonal(1.2, seed=1)),
            layers.Dense(6, "relu", kernel_initializer=LooksLinear(seed=7)),
        ]
    )
    net.save(tmp_path / "new.keras")
    with (
        zipfile.ZipFile(tmp_path / "new.keras") as new,
        zipfile.ZipFile(tmp_path / "old.keras", "w") as old,
    ):
        for name in new.namelist():
            content = new.read(name)
            if name == "config.json":
                text = content.decode()
                assert text.count('"lbe_ops.initializers", "class_name": "Looks') == 1
                text = text.replace(
                    '"lbe_ops.initializers", "class_name": "Looks',
                    '"lbe_ops.experiments.looks_linear", "class_name": "Looks',
                )
                assert text.count(', "gain": 1.0') == 1
                text = text.replace(', "gain": 1.0', "")
                content = json.dumps(json.loads(text))
            old.writestr(name, content)
    x = samples(3, 5, 2)
    for name in ("new.keras", "old.keras"):
        again = keras.saving.load_model(tmp_path / name)
        assert again.layers[1].kernel_initializer.get_config() == {
            "first": False,
            "seed": 7,
            "gain": 1.0,
        }
        assert again.layers[0].kernel_initializer.gain == 1.2
        np.testing.assert_array_equal(again(x), net(x))


# Critical gains

LAMBDA, ALPHA = 1.0507009873554805, 1.6732632423543772
ERF = np.vectorize(math.erf)
FORMULAS = {
    "relu": lambda z: np.maximum(z, 0),
    "tanh": np.tanh,
    "elu": lambda z: np.where(z > 0, z, np.expm1(z)),
    "selu": lambda z: LAMBDA * np.where(z > 0, z, ALPHA * np.expm1(z)),
    "gelu": lambda z: z * (1 + ERF(z / math.sqrt(2))) / 2,
    "silu": lambda z: z / (1 + np.exp(-z)),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "softplus": lambda z: np.log1p(np.exp(z)),
    "relu6": lambda z: np.clip(z, 0, 6),
    "hard_sigmoid": lambda z: np.clip(z / 6 + 0.5, 0, 1),
}


@pytest.mark.parametrize("name", sorted({*FORMULAS} - {"tanh"}))
def test_gain_keeps_the_second_moment(name):
    """By the trapezoidal rule, and by drawing, which is no integral at all."""
    formula = FORMULAS[name]
    z = np.linspace(-12, 12, 240001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    moment = np.sum(density * formula(z) ** 2) * (z[1] - z[0])
    gain = critical_gain(name)
    assert type(gain) is float
    assert gain == pytest.approx(moment**-0.5, rel=1e-8)
    assert critical_gain(getattr(keras.activations, name)) == gain
    drawn = np.mean(formula(samples(500_000, dtype=np.float64)) ** 2)
    assert gain == pytest.approx(drawn**-0.5, rel=1e-2)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (None, 1),
        ("linear", 1),
        ("relu", math.sqrt(2)),
        ("leaky_relu", math.sqrt(2 / (1 + 0.2**2))),
        (layers.LeakyReLU(negative_slope=0.5), math.sqrt(2 / (1 + 0.5**2))),
        ("tanh", 1),
        ("softsign", 1),
        ("hard_tanh", 1),
        (tf.tanh, 1),
        (np.tanh, 1),
        (lambda z: -3 * tf.sin(z), 1 / 3),
        (tf.exp, math.exp(-1)),
        ("selu", 1),
        (lambda z: z**3, 1 / math.sqrt(15)),  # odd, and does not damp
        (tf.abs, 1),
        (lambda z: 1e-7 * tf.exp(z), 1e7 * math.exp(-1)),  # small, but not odd
    ],
)
def test_gain_of_known_functions(activation, expected):
    assert critical_gain(activation) == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        *((name, 1) for name in ("relu", "gelu", "silu", "softplus")),
        *((name, 0.5) for name in (None, "tanh", "elu")),
        ("sigmoid", 2),
        ("hard_sigmoid", 3),
        (layers.LeakyReLU(negative_slope=0.5), 1 / 1.5),
    ],
)
def test_gain_of_pairs(activation, expected):
    assert critical_gain(activation, pairs=True) == pytest.approx(expected, rel=1e-8)


def test_gain_of_pairs_of_relu_is_exact():
    """Nets of ReLU from such kernels keep the bits that they have without a gain."""
    assert critical_gain("relu", pairs=True) == 1


def second_moments(name, depth, start=1.0, factor=1.0):
    """Of the pre-activations of an orthogonal net, layer by layer."""
    rng = np.random.default_rng(0)
    matrices = [np.linalg.qr(rng.normal(size=(200, 200)))[0] for _ in range(5)]
    z = rng.normal(size=(100, 200))
    z *= math.sqrt(start / np.mean(z**2))
    for layer in range(depth):
        z = factor * critical_gain(name) * FORMULAS[name](z) @ matrices[layer % 5]
        yield np.mean(z**2)


def test_gain_in_deep_nets():
    """What the docstring says of tanh, selu and gelu."""
    *_, kept = second_moments("tanh", 150)
    *_, lost = second_moments("tanh", 150, factor=0.9)
    # q' = q (1 - 2 q) near 0 falls as 1 / (2 depth), and not exponentially.
    assert kept == pytest.approx(1 / 300, rel=0.2)
    assert lost < 1e-12
    for start in (0.2, 5.0):
        *_, last = second_moments("selu", 60, start)
        assert last == pytest.approx(1, rel=0.1)
    (low,), (one,), (high,) = (second_moments("gelu", 1, q) for q in (0.9, 1, 1.1))
    assert one == pytest.approx(1, rel=0.02)
    assert (high - low) / 0.2 == pytest.approx(1.14, abs=0.03)  # > 1: it repels


@pytest.mark.parametrize("activation", ["softmax", "glu", "log_softmax"])
@pytest.mark.filterwarnings("ignore:You are using a softmax")
def test_gain_needs_functions_of_one_element(activation):
    with pytest.raises(ValueError, match=f"element by element.*'{activation}'"):
        critical_gain(activation)


@pytest.mark.parametrize("function", [tf.zeros_like, tf.math.log])
def test_gain_needs_a_moment(function):
    with pytest.raises(ValueError, match=r"finite and > 0. Received: (0.0|nan) for"):
        critical_gain(function)
    with pytest.raises(ValueError, match=r"activation\(-z\)\)\*\*2.*Received: 0.0 for"):
        critical_gain(tf.abs, pairs=True)


# LSUV


def dense_net(activation, depth=200, width=32, scale=0.3, dtype=None):
    keras.utils.set_random_seed(0)
    kernel = keras.initializers.VarianceScaling(scale)
    arguments = {"kernel_initializer": kernel, "dtype": dtype}
    hidden = [layers.Dense(width, activation, **arguments) for _ in range(depth)]
    return keras.Sequential([keras.Input((16,)), *hidden])  # add() is slow


def untouched(model, weights):
    """Whether the weights are these, and no layer has a hook."""
    assert not any(
        "call" in vars(layer) for layer in model._flatten_layers(recursive=True)
    )
    assert all(
        np.array_equal(*pair) for pair in zip(model.get_weights(), weights, strict=True)
    )
    return True


@pytest.mark.parametrize(
    ("activation", "orthogonal"),
    [("relu", False), ("tanh", False), ("gelu", False), ("sigmoid", True)],
)
def test_every_layer_of_a_deep_net_gets_unit_variance(activation, orthogonal):
    net = dense_net(activation, dtype="float64")
    before = [layer.kernel.numpy() for layer in net.layers]
    x = samples(100, 16)  # which the model takes as float32
    done = lsuv(net, x, orthogonal=orthogonal, seed=3)
    assert [each.layer for each in done] == [layer.path for layer in net.layers]
    y = x.astype(np.float64)
    for layer, start, scaled in zip(net.layers, before, done, strict=True):
        kernel = layer.kernel.numpy()
        if orthogonal:
            small = kernel if len(kernel) <= 32 else kernel.T
            eye = small @ small.T / scaled.factor**2
            np.testing.assert_allclose(eye, np.eye(len(small)), atol=1e-12)
        else:
            np.testing.assert_allclose(kernel, scaled.factor * start, rtol=1e-12)
        z = y @ kernel
        assert z.var() == pytest.approx(1, abs=0.05)
        # Such a net amplifies the error of the gelu of Keras, 5e-9.
        error = 1e-2 if activation == "gelu" else 1e-8
        assert z.var() == pytest.approx(scaled.variance, rel=error)
        y = FORMULAS[activation](z)
    assert untouched(net, net.get_weights())


def test_equal_seeds_give_equal_weights():
    x = samples(50, 16)

    def weights(**arguments):
        net = dense_net("tanh", depth=5)
        done = lsuv(net, x, **arguments)
        return [*net.get_weights(), [each.factor for each in done]]

    plain, one, two = weights(), weights(orthogonal=True, seed=1), None
    for expected, arguments in ((plain, {}), (one, {"orthogonal": True, "seed": 1})):
        for pair in zip(expected, weights(**arguments), strict=True):
            np.testing.assert_array_equal(*pair)
    two = weights(orthogonal=True, seed=2)
    assert np.abs(one[0] - two[0]).max() > 0.1
    # dense_net sets the seed of Keras.
    for pair in zip(weights(orthogonal=True), weights(orthogonal=True), strict=True):
        np.testing.assert_array_equal(*pair)


def conv_net(model):
    """Convolutions and a dense layer; nested, or with LBE, which is fused or not."""
    keras.utils.set_random_seed(0)
    lbe = model == "lbe"
    conv = Conv2D_LBE if lbe else layers.Conv2D
    bias = {"bias_initializer": keras.initializers.RandomNormal(0, 0.3)}
    body = [
        conv(8, 3, strides=2, padding="same", activation="relu", **bias, name="a"),
        layers.DepthwiseConv2D(2, depth_multiplier=2, activation="elu", name="b"),
        layers.BatchNormalization(),
        layers.Conv2D(6, (1, 3), activation=layers.LeakyReLU(), name="c"),
    ]
    inputs = keras.Input((9, 9, 3))
    x = inputs
    if model == "nested":
        x = keras.Sequential([keras.Input((9, 9, 3)), *body])(x)
    else:
        for layer in body:
            x = layer(x)
    x = layers.Flatten()(x)
    if model == "lbe":
        lbe_ops.with_lbe(body[3])
        x = Dense_LBE(10, "relu", name="d", **bias)(x)
    else:
        x = layers.Dense(10, "relu", name="d", **bias)(x)
    outputs = layers.Dense(3, "softmax", name="e")(x)
    made = (LBEModel if lbe else keras.Model)(inputs, outputs)
    dense = [layer for layer in made.layers if isinstance(layer, layers.Dense)]
    return made, [body[0], body[1], body[3], *dense]


@pytest.mark.parametrize("model", ["functional", "nested", "lbe"])
def test_convolutions_and_biases(model):
    net, scaled = conv_net(model)
    biases = [layer.bias.numpy() for layer in scaled]
    x = samples(32, 9, 9, 3)
    done = lsuv(net, x, target=0.5, tolerance=1e-3, max_iterations=100)
    assert [each.layer.split("/")[-1] for each in done] == list("abcde")
    for layer, bias in zip(scaled, biases, strict=True):
        np.testing.assert_array_equal(layer.bias.numpy(), bias)

    wide = [tf.cast(layer.kernel.value, tf.float64) for layer in scaled]
    a, b, c, d, e = zip(wide, biases, strict=True)
    y = tf.constant(x, tf.float64)
    z = [tf.nn.conv2d(y, a[0], 2, "SAME") + a[1]]
    y = tf.nn.relu(z[-1])
    z.append(tf.nn.depthwise_conv2d(y, b[0], [1] * 4, "VALID") + b[1])
    y = tf.nn.elu(z[-1]) / math.sqrt(1 + 1e-3)  # of the BatchNormalization
    z.append(tf.nn.conv2d(y, c[0], 1, "VALID") + c[1])
    y = tf.reshape(tf.nn.leaky_relu(z[-1], 0.3), (32, -1))
    z.append(y @ d[0] + d[1])
    z.append(tf.nn.relu(z[-1]) @ e[0] + e[1])
    for oracle, each in zip(z, done, strict=True):
        assert np.var(oracle) == pytest.approx(0.5, rel=1.01e-3)
        assert np.var(oracle) == pytest.approx(each.variance, rel=1e-5)


def test_an_lbe_model_trains_and_is_saved_after_it(tmp_path):
    net, _ = conv_net("lbe")
    net.compile("sgd", "sparse_categorical_crossentropy")
    x, y = samples(32, 9, 9, 3), np.arange(32) % 3
    net.fit(x, y, batch_size=16, verbose=0)
    traced = net.predict(x, verbose=0)
    lsuv(net, x)
    after = net.predict(x, verbose=0)
    assert np.abs(after - traced).max() > 1e-2
    np.testing.assert_allclose(net(x), after, atol=1e-5)
    history = net.fit(x, y, batch_size=16, verbose=0).history
    assert np.isfinite(history["loss"]).all() and history["lbe"][0] > 0
    net.save(tmp_path / "net.keras")
    again = keras.saving.load_model(tmp_path / "net.keras")
    np.testing.assert_allclose(again(x), net(x), atol=1e-6)
    lsuv(again, x)


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        ("float32", 1e-5),
        ("mixed_bfloat16", 0.01),
        ("mixed_float16", 1e-3),
        ("bfloat16", 0.01),
    ],
)
def test_dtypes(dtype, rounding):
    """The oracle takes every layer's input as the layer does, rounded."""
    net = dense_net("relu", depth=60, dtype=dtype)
    y = samples(100, 16)
    for layer, each in zip(net.layers, lsuv(net, y), strict=True):
        assert layer.kernel.dtype == layer.variable_dtype
        rounded = tf.cast(tf.cast(y, layer.compute_dtype), tf.float64)
        kernel = tf.cast(tf.cast(layer.kernel.value, layer.compute_dtype), tf.float64)
        z = rounded @ kernel
        assert np.var(z) == pytest.approx(1, abs=0.05 + rounding)
        assert np.var(z) == pytest.approx(each.variance, rel=rounding)
        y = layer(y)


def test_selected_layers_alone_change_and_frozen_ones_are_left_out(capsys):
    net = dense_net("relu", depth=4)
    names = [layer.name for layer in net.layers]
    before = net.get_weights()
    done = lsuv(net, samples(50, 16), layers=[names[2], names[1]], verbose=True)
    assert [each.layer.split("/")[-1] for each in done] == names[1:3]
    changed = [
        not np.array_equal(*pair)
        for pair in zip(net.get_weights(), before, strict=True)
    ]
    assert changed == [False, False, True, False, True, False, False, False]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert f"{names[1]}: kernel times {done[0].factor:.4g}, variance 1" in lines[0]
    net.layers[0].trainable = False
    assert len(lsuv(net, samples(50, 16), target=2)) == 3
    (frozen,) = lsuv(net, samples(50, 16), layers=names[0], target=2)
    assert frozen.variance == pytest.approx(2, rel=0.05)


class Counted(layers.Layer):
    """The identity; how often it was called eagerly."""

    calls = 0

    def call(self, x):
        if tf.executing_eagerly():
            self.calls += 1
        return x


class Subclassed(keras.Model):
    """A model of its own, whose `call` knows no `training`."""

    def __init__(self):
        super().__init__()
        self.shared = layers.Dense(6, "tanh")
        self.counted = Counted()
        self.attention = layers.MultiHeadAttention(2, 4)
        self.times = layers.TimeDistributed(layers.Dense(4, "relu"))
        self.recurrent = layers.Bidirectional(layers.LSTM(3))
        self.einsum = layers.EinsumDense("ab,bc->ac", 5)
        self.normed = layers.SpectralNormalization(layers.Dense(3, "relu"))

    def call(self, x):
        x = self.counted(self.shared(self.shared(x)))
        x = self.times(self.attention(x, x))
        return self.normed(self.einsum(self.recurrent(x)))


def test_layers_of_all_kinds_in_a_subclassed_model():
    keras.utils.clear_session()  # names count from 0
    keras.utils.set_random_seed(0)
    net = Subclassed()
    x = samples(40, 7, 6)
    net(x)
    net.counted.calls = 0
    recurrent = net.recurrent.get_weights()
    done = lsuv(net, x, tolerance=1e-4)
    assert net.counted.calls == 1
    assert [each.layer.split("/")[-1] for each in done] == [
        *("dense", "query", "key", "value", "attention_output"),
        *("dense_1", "einsum_dense", "dense_2"),
    ]
    for pair in zip(recurrent, net.recurrent.get_weights(), strict=True):
        np.testing.assert_array_equal(*pair)
    kernel = net.shared.kernel.numpy().astype(np.float64)
    assert (x @ kernel).var() == pytest.approx(1, rel=1e-3)  # at its first call
    assert all(each.variance == pytest.approx(1, abs=1e-4) for each in done)


def test_an_error_leaves_the_weights_as_they_were():
    net = dense_net("relu", depth=4)
    name = net.layers[2].path
    x = samples(50, 16)

    def fails(x, match, **arguments):
        before = net.get_weights()
        with pytest.raises(ValueError, match=match) as caught:
            lsuv(net, x, **arguments)
        assert "Exception encountered" not in str(caught.value)  # as Keras adds
        assert untouched(net, before)

    fails(0 * x, f"'{net.layers[0].path}' cannot be.*Received: 0.0")
    fails(x + np.inf, "must be finite and > 0. Received: nan", orthogonal=True)
    kernel = net.layers[2].kernel
    start = kernel.numpy()
    kernel.assign(0 * start)
    fails(x, f"'{name}' cannot be scaled.*Received: 0.0")
    kernel.assign(np.inf + start)
    fails(x, f"'{name}' cannot be scaled.*Received: nan")
    kernel.assign(start)
    net.layers[2].bias.assign(3 * samples(32))
    fails(x, rf"'{name}' does not come to 1.0 \+- 5.000%.*after 10 scalings.*biases")
    other = keras.Sequential([net, Counted()])
    other.layers[1].call = lambda x: 1 / 0
    before = net.get_weights()
    with pytest.raises(ZeroDivisionError):
        lsuv(other, x, layers=[net.layers[0].name])
    del other.layers[1].call
    assert untouched(net, before)


def test_bad_arguments():
    net, x = dense_net("relu", depth=2), samples(50, 16)
    for arguments, match in (
        ({"target": 0}, "target must be > 0. Received: target=0"),
        ({"target": math.inf}, "target must be a finite number"),
        ({"tolerance": -1}, "tolerance must be a finite number >= 0"),
        ({"max_iterations": 0}, "integer >= 1. Received: max_iterations=0"),
        ({"max_iterations": 1.5}, "integer >= 1. Received: max_iterations=1.5"),
        ({"layers": layers.Conv2D}, "No layer matches"),
        ({"layers": ["nowhere"]}, r"no such layer. Received: \['nowhere'\]"),
    ):
        with pytest.raises(ValueError, match=match):
            lsuv(net, x, **arguments)
    with pytest.raises(ValueError, match="'unbuilt', which is not built"):
        lsuv(keras.Sequential([layers.Dense(2)], name="unbuilt"), x)
    flat = keras.Sequential([keras.Input((16,)), layers.Flatten()], name="flat")
    with pytest.raises(ValueError, match=r"no layer with a kernel.*Received: 'flat'"):
        lsuv(flat, x)
    with pytest.raises(ValueError, match=r"has no variable `kernel`.*NoneType"):
        lsuv(flat, x, layers=layers.Flatten)
    net.layers[1].enable_lora(2)
    net.layers[1].trainable = True
    with pytest.raises(ValueError, match=f"'{net.layers[1].path}' has no variable"):
        lsuv(net, x)


class InGraph(layers.Layer):
    """Calls a layer in a graph."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x):
        return tf.function(self.layer, autograph=False)(x)


def test_every_layer_has_to_be_called_and_eagerly():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.two = layers.Dense(3), layers.Dense(3, name="two")

        def call(self, x, training=None):
            return self.two(self.one(x)) if training else self.one(x)

    net, x = Model(), samples(8, 16)
    net(x, training=True)
    before = net.get_weights()
    with pytest.raises(ValueError, match=r"does not call these.*Received: \['.*two'\]"):
        lsuv(net, x)
    assert untouched(net, before)
    net = dense_net("relu", depth=2)
    before = net.get_weights()
    with pytest.raises(ValueError, match=r"not for use in a tf\.function"):
        tf.function(lambda: lsuv(net, x), autograph=False)()
    net = keras.Sequential([net, InGraph(layers.Dense(3, name="inner"))])
    net(x)
    before = net.get_weights()
    with pytest.raises(ValueError, match="'.*inner' is called in a graph"):
        lsuv(net, x)
    assert untouched(net, before)
