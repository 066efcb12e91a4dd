# SPDX-License-Identifier: Apache-2.0
"""The epilogue y = activation(z + bias) with LBE, and the layers that end with it."""

import copy
import functools
import math
from unittest import mock

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import TOLERANCES, require_native, require_xla, tensor

import lbe_ops
from lbe_ops import (
    LBE,
    Conv2D_LBE,
    Dense_LBE,
    LBEModel,
    LBERegularizer,
    native,
    ops,
    with_lbe,
)
from lbe_ops import reference as reference_formulas

ALPHA, ORACLES = oracle.SLOPE, oracle.ACTIVATIONS
# Shapes, with and without a bias.
CASES = [((9, 5), True), ((70, 33), False), ((33, 3, 5, 6), True)]


def away_from_zero(rng, shape, dtype, bias):
    """z with |z + bias| >= 1/4: where rounding does not decide about a kink."""
    z, _ = tensor(rng.normal(0, 2, shape), dtype)
    b, exact_bias = tensor(rng.normal(0, 1, shape[-1]) if bias else [], dtype)
    total = tf.cast(z, tf.float64) + (exact_bias if bias else 0)
    z = tf.cast(z + tf.cast(tf.where(tf.abs(total) < 0.25, 0.75, 0.0), z.dtype), dtype)
    return z, (b if bias else None)


def assert_close(found, expected, relative):
    found = tf.cast(found, tf.float64).numpy()
    scale = np.abs(expected).max() + 1e-3
    assert np.abs(found - expected).max() <= relative * scale


@pytest.mark.parametrize("shape, bias", CASES, ids=str)
@pytest.mark.parametrize("activation", ORACLES)
def test_values_and_gradients(path, dtype, activation, shape, bias, rng):
    z, b = away_from_zero(rng, shape, dtype, bias)
    dy, exact_dy = tensor(rng.normal(size=shape), dtype)
    formula = {"ddof": 1, "scale": 3.0, "offset": 0.25}

    def function(z, *b):
        with tf.GradientTape() as tape:
            tape.watch([z, *b])
            y, entropy, valid = ops.epilogue(
                z, *b, activation=activation, slope=ALPHA, **formula
            )
            loss = tf.reduce_sum(tf.cast(y * dy, entropy.dtype)) + 50 * entropy
        return y, entropy, valid, *tape.gradient(loss, [z, *b])

    arguments = [z] if b is None else [z, b]
    y, entropy, valid, dz, *dbias = path.run(function, *arguments)
    assert (y.dtype, dz.dtype) == (z.dtype, z.dtype)
    value, derivative = ORACLES[activation]
    total = sum(tf.cast(a, tf.float64).numpy() for a in arguments)
    # Plain TensorFlow rounds every step in half precision.
    rounding = (4 if path.native else 16) * TOLERANCES[dtype].grad
    assert_close(y, value(total), rounding)
    # Statistics of y as it is stored.
    stored = tf.cast(y, tf.float64).numpy()
    expected = oracle.batch_entropy(stored, **formula)
    assert abs(float(entropy) - expected) <= 10 * TOLERANCES[dtype].statistics
    assert float(valid) == 1
    share = 50 * oracle.batch_entropy_grad(stored, **formula).reshape(shape)
    expected_dz = derivative(total) * (exact_dy + share)
    assert_close(dz, expected_dz, 2 * rounding)
    if bias:
        expected = expected_dz.reshape(-1, shape[-1])
        # Relative to what is added up, which may cancel.
        allowed = 2 * rounding * (np.abs(expected).sum(axis=0).max() + 1e-3)
        found = tf.cast(dbias[0], tf.float64).numpy()
        assert np.abs(found - expected.sum(axis=0)).max() <= allowed


@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_too_small_has_an_output_and_no_entropy(path, rows, rng):
    z, _ = tensor(rng.normal(size=(rows, 3)), "float32")
    b, _ = tensor(rng.normal(size=3), "float32")

    def function(z, b):
        with tf.GradientTape() as tape:
            tape.watch([z, b])
            y, entropy, valid = ops.epilogue(z, b, activation="relu", ddof=1)
            loss = tf.reduce_sum(y) + entropy
        return y, entropy, valid, *tape.gradient(loss, [z, b])

    y, entropy, valid, dz, dbias = path.run(function, z, b)
    total = z.numpy() + b.numpy()
    np.testing.assert_array_equal(y, np.maximum(total, 0))
    assert (float(entropy), float(valid)) == (0, 0)
    np.testing.assert_array_equal(dz, total > 0)
    np.testing.assert_array_equal(dbias, (total > 0).sum(axis=0))


@pytest.mark.parametrize("activation", ["tanh", "elu", "relu"])
def test_second_derivative(activation, rng):
    require_native()
    z, b = away_from_zero(rng, (12, 4), "float64", bias=True)
    weights = tf.constant(rng.normal(size=z.shape))

    def of_z(z, use_native):
        with tf.GradientTape() as outer:
            outer.watch([z, b])
            with tf.GradientTape() as inner:
                inner.watch([z, b])
                y, entropy, _ = ops.epilogue(
                    z, b, activation=activation, slope=ALPHA, native=use_native
                )
                loss = tf.reduce_sum(y * y * weights) + 20 * tf.square(entropy)
            dz, db = inner.gradient(loss, [z, b])
            total = tf.reduce_sum(dz * weights) + tf.reduce_sum(tf.square(db))
        return outer.gradient(total, [z, b])

    for found, expected in zip(of_z(z, True), of_z(z, False), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("graph", [False, True])
def test_forward_mode(graph, rng):
    """The directional derivative, and that of the gradient."""
    require_native()
    z, _ = away_from_zero(rng, (12, 4), "float64", bias=False)
    direction = rng.normal(size=z.shape)

    def along(function, z):
        with tf.autodiff.ForwardAccumulator(z, tf.constant(direction)) as forward:
            with tf.GradientTape() as tape:
                tape.watch(z)
                value = function(z)
            grad = tape.gradient(value, z)
        return forward.jvp(value), grad, forward.jvp(grad)

    def alone(z):
        return lbe_ops.batch_entropy(z, native=True)

    def in_epilogue(z, use_native=True):
        y, entropy, _ = ops.epilogue(z, activation="tanh", native=use_native)
        return tf.reduce_sum(y * y) + 20 * tf.square(entropy)

    run = tf.function(along) if graph else along
    exact = oracle.batch_entropy_grad(z.numpy()).reshape(z.shape)
    derivative, grad, _ = run(alone, z)
    np.testing.assert_allclose(derivative, np.sum(exact * direction), rtol=1e-9)
    np.testing.assert_allclose(grad, exact, rtol=1e-9, atol=1e-12)

    derivative, grad, curvature = run(in_epilogue, z)
    np.testing.assert_allclose(derivative, np.sum(grad * direction), rtol=1e-9)
    step = 1e-5 * direction
    ahead, behind = (
        along(functools.partial(in_epilogue, use_native=False), z + sign * step)[1]
        for sign in (1, -1)
    )
    np.testing.assert_allclose(curvature, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-6)


def test_nan_stays_and_infinity_ends(rng):
    require_native()
    for activation in ORACLES:
        z = tf.constant([[np.nan, 1.0, 800.0], [0.5, -800.0, 1.0]], tf.float32)
        y, entropy, _ = ops.epilogue(z, activation=activation, slope=ALPHA)
        value, _ = ORACLES[activation]
        with np.errstate(over="ignore", invalid="ignore"):
            expected = value(z.numpy().astype(np.float64))
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-30)
        assert math.isnan(entropy)


def test_the_same_bits_for_any_number_of_rows_at_a_time(rng):
    """y and dz do not depend on their neighbours, dbias not on threads."""
    require_native()
    z, b = away_from_zero(rng, (3000, 700), "float32", bias=True)
    results = []
    for _ in range(3):
        with tf.GradientTape() as tape:
            tape.watch([z, b])
            y, entropy, _ = ops.epilogue(z, b, activation="tanh", native=True)
            loss = tf.reduce_sum(y[:, 0]) + 1e6 * entropy
        results.append([t.numpy() for t in (y, *tape.gradient(loss, [z, b]))])
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(first, other)
    part = ops.epilogue(z[5:99], b, activation="tanh", native=True).y
    np.testing.assert_array_equal(part, results[0][0][5:99])


def test_without_activation_and_bias_y_is_z(rng):
    """No copy: the tap of activations that no epilogue serves."""
    require_native()
    z, _ = tensor(rng.normal(size=(8, 4)), "float32")
    y = ops.epilogue(z, native=True).y
    addresses = [np.asarray(memoryview(tensor)).ctypes.data for tensor in (y, z)]
    assert addresses[0] == addresses[1]


def test_the_two_lists_of_activations_are_one():
    assert set(reference_formulas.ACTIVATIONS) == set(ORACLES)
    assert set(reference_formulas.DERIVATIVES) == set(ORACLES)
    require_native()
    for activation in ORACLES:
        ops.epilogue(tf.ones((2, 2)), activation=activation, native=True)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"activation": "gelu"}, "activation must be one of .* Received: 'gelu'"),
        ({"slope": -1.0}, "slope must be a number >= 0. Received: -1.0"),
        ({"slope": math.nan}, "slope must be a number >= 0. Received: nan"),
        ({"bias": tf.zeros(3)}, r"bias must have one entry .* \(3,\)"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        ops.epilogue(tf.ones((4, 2)), **arguments)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("native", [False, True], ids=["reference", "native"])
def test_a_batch_of_numbers_has_no_channels(native, jit_compile):
    """Neither where that is known before the call nor where only the call knows."""
    if native:
        require_native()
        if jit_compile:
            require_xla()
    bias = tf.constant([1.0, 2.0, 3.0])
    words = r"must have shape \[batch, ..., channels\]"
    with pytest.raises(ValueError, match=words):
        ops.epilogue(bias, bias, native=native)

    @tf.function(jit_compile=jit_compile, input_signature=[tf.TensorSpec(None)])
    def function(z):
        return ops.epilogue(z, bias, native=native).y

    np.testing.assert_array_equal(function(tf.ones((2, 3))), [[2.0, 3.0, 4.0]] * 2)
    words += "|must be at least 2D"  # TensorFlow's own
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        function(bias)


def test_the_op_itself_refuses_what_does_not_fit():
    require_native()
    op = native.load().ops
    z = tf.ones((4, 2))
    for bias in ([tf.ones(3)], [tf.ones((1, 2))], [tf.ones(2), tf.ones(2)]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="bias must"):
            op.lbe_epilogue(z, bias, activation="relu")
    with pytest.raises(tf.errors.InvalidArgumentError, match="no epilogue with"):
        op.lbe_epilogue(z, [], activation="gelu")


def test_the_gradient_of_a_bias_needs_channels():
    require_native()
    y, number = tf.ones(4), tf.ones(())
    with pytest.raises(tf.errors.InvalidArgumentError, match="batch, ..., channels"):
        native.load().ops.lbe_epilogue_grad(y, y, *[number] * 3, [], biases=1)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["eager", "xla"])
def test_its_gradient_refuses_what_does_not_fit(jit_compile):
    require_native()
    op = native.load().ops.lbe_epilogue_grad

    def grad(*inputs):
        return op(*inputs, [], biases=0)

    if jit_compile:
        require_xla()
        unknown = [tf.TensorSpec(None) for _ in range(5)]
        grad = tf.function(grad, jit_compile=True, input_signature=unknown)
    y, unit, scalar = tf.ones((4, 2)), tf.ones(2), tf.ones(())
    for inputs in (
        (tf.ones((3, 2)), y, unit, unit, scalar),
        (y, y, tf.ones(3), unit, scalar),
        (y, y, unit, tf.ones((1, 2)), scalar),
        (y, y, unit, unit, unit),
        (scalar, scalar, scalar, scalar, scalar),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match="Received"):
            grad(*inputs)
    for index, vector in ((2, unit), (0, scalar), (0, tf.ones((1, 2)))):
        with pytest.raises(tf.errors.InvalidArgumentError, match="vector|rank"):
            op(y, y, unit, unit, vector, [], biases=0, index=index)
    grads = [op(y, y, unit, unit, tf.constant([1.0, 3.0]), [], biases=0, index=1)]
    grads.append(op(y, y, unit, unit, tf.constant(3.0), [], biases=0))
    np.testing.assert_array_equal(*(grad.dz for grad in grads))


def gradients_of_many(stacked, z, weights):
    """Of the loss of several entropies, each a scalar or all in one vector."""
    with tf.GradientTape() as outer:
        outer.watch(z)
        with tf.GradientTape() as inner:
            inner.watch(z)
            entropies = [
                ops.epilogue(k * z, activation="tanh", native=True).entropy
                for k in (1.0, 2.0, 3.0)
            ]
            if stacked:
                loss = tf.reduce_sum(weights * tf.stack(entropies) ** 2)
            else:
                loss = sum(w * h**2 for w, h in zip(weights, entropies, strict=True))
        dz = inner.gradient(loss, z)
        total = tf.reduce_sum(tf.sin(z) * dz)
    return dz, outer.gradient(total, z)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_entropies_in_a_vector_have_the_same_gradients(mode, rng):
    """The op takes the gradient of an entropy where it is in the vector of all."""
    require_native()
    if mode == "xla":
        require_xla()
    z = tf.constant(rng.normal(size=(12, 4)))
    weights = [0.5, -2.0, 3.0]
    expected = gradients_of_many(False, z, weights)
    function = functools.partial(gradients_of_many, True, weights=weights)
    if mode != "eager":
        function = tf.function(function, jit_compile=mode == "xla", autograph=False)
        graph = function.get_concrete_function(z).graph
        grads = [op for op in graph.get_operations() if op.type == "LBE>EpilogueGrad"]
        assert {op.get_attr("index") for op in grads} == {0, 1, 2}
    for found, wanted in zip(function(z), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


# Layers: whatever the path, the same numbers.

LOWER = {"lbe_alpha": 0.8, "lbe_alpha_min": 0.2, "lbe_beta": 1.0}
UPPER = {name.replace("lbe", "LBE"): value for name, value in LOWER.items()}


def swish(z):
    return keras.ops.silu(z)


def dense(ours, activation):
    if ours:
        return Dense_LBE(6, activation=activation, **UPPER)
    return keras.layers.Dense(
        6, activation=activation, activity_regularizer=LBERegularizer(**LOWER)
    )


def conv(ours, activation):
    if ours:
        return Conv2D_LBE(4, 3, activation=activation, **UPPER)
    return keras.layers.Conv2D(
        4, 3, activation=activation, activity_regularizer=LBERegularizer(**LOWER)
    )


def other(layer):
    return [with_lbe(layer, **LOWER), keras.layers.Flatten()]


NETS = {
    "dense": ((5,), lambda ours: [dense(ours, "relu") for _ in range(3)]),
    "tanh": ((5,), lambda ours: [dense(ours, "tanh")]),
    "3d": ((4, 5), lambda ours: [dense(ours, "selu"), keras.layers.Flatten()]),
    "custom": ((5,), lambda ours: [dense(ours, swish)]),
    "none": ((5,), lambda ours: [dense(ours, None)]),
    "conv": ((8, 8, 3), lambda ours: [conv(ours, "elu"), keras.layers.Flatten()]),
    "conv 1d": ((8, 3), lambda _: other(keras.layers.Conv1D(4, 3))),
    "conv 3d": ((4, 4, 4, 3), lambda _: other(keras.layers.Conv3D(2, 3))),
    "lstm": ((8, 3), lambda _: other(keras.layers.LSTM(4))),
    "batch norm": ((5,), lambda _: other(keras.layers.BatchNormalization())),
    "max": ((8, 3), lambda _: other(keras.layers.MaxPooling1D(2))),
    "nested": (
        (5,),
        lambda ours: [
            keras.Sequential([dense(ours, "relu"), dense(ours, "softplus")]),
        ],
    ),
}


def trained(net, ours=True, plain=False, dtype="float32", jit=False, change=None):
    """Losses, weights and predictions of a small net after a few steps.

    `ours`: Dense_LBE and Conv2D_LBE, or the layers of Keras with a regularizer.
    `plain`: without any epilogue, as Keras itself calls layers and regularizers.
    """
    keras.utils.set_random_seed(1)
    shape, layers = NETS[net]
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(keras.dtype_policies.DTypePolicy(dtype))
    try:
        inputs = x = keras.Input(shape)
        for layer in layers(ours):
            x = layer(x)
        outputs = keras.layers.Dense(3, dtype="float32")(x)
        model = LBEModel(inputs, outputs, LBE_strength=0.7, fuse=not plain)
    finally:
        keras.config.set_dtype_policy(before)
    if change:
        change(model)
    model.compile(
        keras.optimizers.SGD(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit,
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, *shape)).astype("float32")
    y = rng.integers(0, 3, 40)
    history = model.fit(x, y, batch_size=16, epochs=2, verbose=0, shuffle=False)
    logs = model.evaluate(x, y, batch_size=16, verbose=0, return_dict=True)
    return (
        {**history.history, **logs},
        model.get_weights(),
        model.predict(x, verbose=0),
        [w.path.rsplit("/", 1)[1] for w in model.weights],
    )


def assert_same_training(one, other, tolerance):
    for name, values in one[0].items():
        np.testing.assert_allclose(values, other[0][name], rtol=tolerance)
    for weights, others in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(weights, others, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(one[2], other[2], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("net", NETS)
def test_layers_train_as_with_a_plain_activity_regularizer(net):
    require_native()
    fused, plain = trained(net), trained(net, ours=False, plain=True)
    assert_same_training(fused, plain, 2e-5)
    assert fused[3] == plain[3]


@pytest.mark.parametrize("net", ["dense", "custom", "conv", "batch norm"])
def test_layers_of_keras_train_so_under_xla(net):
    require_native()
    require_xla()
    fused = trained(net, ours=False, jit=True)
    plain = trained(net, ours=False, plain=True, jit=True)
    assert_same_training(fused, plain, 2e-5)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_layers_in_other_precisions(dtype):
    require_native()
    tolerance = 1e-10 if dtype == "float64" else 2e-2
    fused = trained("dense", dtype=dtype)
    plain = trained("dense", ours=False, plain=True, dtype=dtype)
    assert_same_training(fused, plain, tolerance)


def test_a_second_regularizer_makes_an_entropy_of_its_own():
    """Of the same tensor, which a linear layer hands on as it is."""
    require_native()
    inputs = keras.Input((5,))
    x = Dense_LBE(6, activation="relu", **UPPER)(inputs)
    second = LBERegularizer(**LOWER, scale=3.0, offset=0.5)
    x = keras.layers.Activation("linear", activity_regularizer=second)(x)
    model = LBEModel(inputs, x)
    data = tf.constant(np.random.default_rng(0).normal(size=(16, 5)), tf.float32)
    y = model(data, training=True)
    first_entry, second_entry = y._lbe_recording.entries
    exact = tf.cast(y, tf.float64).numpy()
    assert float(first_entry.entropy) == pytest.approx(oracle.batch_entropy(exact))
    assert float(second_entry.entropy) == pytest.approx(
        oracle.batch_entropy(exact, scale=3.0, offset=0.5)
    )


def test_a_layer_called_twice_in_a_row_reports_twice():
    require_native()
    layer = Dense_LBE(5, activation="relu", **UPPER)
    inputs = keras.Input((5,))
    model = LBEModel(inputs, layer(layer(inputs)))
    data = tf.constant(np.random.default_rng(0).normal(size=(16, 5)), tf.float32)
    y = model(data, training=True)
    entropies = [float(entry.entropy) for entry in y._lbe_recording.entries]
    once = layer(data)
    for entropy, outputs in zip(entropies, (once, layer(once)), strict=True):
        exact = tf.cast(outputs, tf.float64).numpy()
        assert entropy == pytest.approx(oracle.batch_entropy(exact))


def test_activity_regularizers_stay_those_of_their_layers():
    """Keras does not see them while it ends a call, and everybody else does."""
    require_native()
    first, last = (Dense_LBE(5, activation="relu", **UPPER) for _ in range(2))
    seen = []

    class Between(keras.layers.Layer):
        def call(self, inputs):
            seen.append([layer.activity_regularizer for layer in (first, last)])
            return inputs

    inputs = keras.Input((5,))
    model = LBEModel(inputs, last(Between()(first(inputs))))
    regularizers = model.lbe_regularizers
    assert len(regularizers) == 2
    with mock.patch.object(LBERegularizer, "__call__") as called:
        y = model(tf.ones((4, 5)), training=True)
    assert not called.called
    assert [entry.regularizer for entry in y._lbe_recording.entries] == regularizers
    assert len(model.losses) == 1  # of the whole model, for loops without compute_loss
    assert seen[-1] == regularizers
    for layer, regularizer in zip((first, last), regularizers, strict=True):
        assert layer.activity_regularizer is regularizer
        assert layer.get_config()["activity_regularizer"] is not None
    last.activity_regularizer = None
    y = model(tf.ones((4, 5)), training=True)
    assert [entry.regularizer for entry in y._lbe_recording.entries] == regularizers[:1]


def test_lora():
    """The kernel that LoRA adds to is the one that is multiplied with."""
    require_native()

    def enable(model):
        for layer in model.layers:
            if isinstance(layer, keras.layers.Dense) and layer.units == 6:
                layer.enable_lora(2)

    fused = trained("dense", change=enable)
    plain = trained("dense", ours=False, plain=True, change=enable)
    assert_same_training(fused, plain, 2e-5)


def op_types(layer, shape=(5,), training=True, **arguments):
    inputs = keras.Input(shape)
    model = LBEModel(inputs, layer(inputs), **arguments)
    function = tf.function(lambda x: model(x, training=training))
    graph = function.get_concrete_function(tf.zeros((4, *shape))).graph
    return {op.type for op in graph.get_operations()}


@pytest.mark.parametrize("ours", [False, True])
def test_where_the_epilogue_is(ours):
    """In training only: what is exported runs without the library."""
    require_native()
    in_training = op_types(dense(ours, "relu"))
    assert "LBE>Epilogue" in in_training
    assert not in_training & {"LBE>BatchEntropy", "Relu", "BiasAdd", "AddV2"}
    in_training = op_types(conv(ours, "relu"), (8, 8, 3))
    assert not in_training & {"LBE>BatchEntropy", "Relu", "BiasAdd", "AddV2"}
    assert not any(
        t.startswith("LBE") for t in op_types(dense(ours, None), (5,), False)
    )


def test_where_the_tap_is():
    class Unhashable:
        __hash__ = None

        def __call__(self, x):
            return keras.ops.relu(x)

    require_native()
    shape = (3, 8, 8)
    for layer in (
        Dense_LBE(6, activation=swish),
        Dense_LBE(6, activation=Unhashable()),
        Conv2D_LBE(4, 3, data_format="channels_first"),
        lambda x: LBE()(keras.layers.LayerNormalization()(x)),
    ):
        types = op_types(layer, shape)
        assert "LBE>Epilogue" in types
        assert "LBE>BatchEntropy" not in types
        assert types & {"BiasAdd", "AddV2", "Mul"}  # by the layer itself


def test_which_layers_are_never_touched():
    """Theirs is a pass of its own: `fuse_layers` serves two classes, and can be off."""

    class Twice(keras.layers.Dense):
        def call(self, inputs):
            return 2 * super().call(inputs)

    require_native()
    for layer, arguments in (
        (with_lbe(Twice(6)), {}),
        (with_lbe(keras.layers.LayerNormalization()), {}),
        (dense(False, "relu"), {"fuse": False}),
    ):
        types = op_types(layer, (3, 8, 8), **arguments)
        assert "call" not in vars(layer)
        assert "LBE>BatchEntropy" in types and "LBE>Epilogue" not in types


def test_a_call_that_somebody_else_replaced_is_left_alone():
    require_native()
    layer = dense(False, "relu")
    call, calls = layer.call, []

    def counted(*args, **kwargs):
        calls.append(args)
        return call(*args, **kwargs)

    layer.call = counted
    types = op_types(layer)
    assert calls
    assert "LBE>BatchEntropy" in types and "LBE>Epilogue" not in types


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras' own
def test_copies_of_a_layer_have_an_epilogue_of_their_own():
    require_native()
    layer = dense(False, "relu")
    op_types(layer)
    twin, anew = copy.deepcopy(layer), type(layer).from_config(layer.get_config())
    for weights in (twin.kernel, twin.bias):
        weights.assign(keras.ops.ones(weights.shape))
    for clone in (twin, anew):
        inputs = keras.Input((5,))
        model = LBEModel(inputs, clone(inputs))
        y = model(tf.ones((4, 5)), training=True)
        (entry,) = y._lbe_recording.entries
        assert entry.regularizer is clone.activity_regularizer
        products = tf.matmul(tf.ones((4, 5)), clone.kernel.value)
        expected = tf.nn.relu(products + clone.bias.value)
        np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "activation, loss",
    [("sigmoid", "binary_crossentropy"), ("softmax", "categorical_crossentropy")],
)
def test_losses_find_the_logits(activation, loss):
    """Keras takes them in place of probabilities that have saturated."""
    require_native()
    x = 200 * np.random.default_rng(0).normal(size=(16, 5)).astype("float32")
    y = np.eye(3, dtype="float32")[np.arange(16) % 3]
    results = []
    for plain in (False, True):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((5,))
        if plain:
            layer = keras.layers.Dense(
                3, activation=activation, activity_regularizer=LBERegularizer(**LOWER)
            )
        else:
            layer = Dense_LBE(3, activation=activation, **UPPER)
        model = LBEModel(inputs, layer(inputs), fuse=False)
        model.compile(keras.optimizers.SGD(0.1), loss)
        logs = model.train_on_batch(x, y, return_dict=True)
        results.append([logs["loss"], *model.get_weights()])
    assert results[0][0] > 20  # clipped probabilities would give 16 at most
    for fused, plain in zip(*results, strict=True):
        np.testing.assert_allclose(fused, plain, rtol=1e-5, atol=1e-7)


def test_masks_stay():
    class Masked(keras.layers.Layer):
        def call(self, x):
            y = 1.0 * x
            y._keras_mask = mask
            return y

    class Net(LBEModel):
        def __init__(self):
            super().__init__()
            self.masked = with_lbe(Masked())

        def call(self, x):
            y = self.masked(x)
            assert y._keras_mask is mask
            return y

    require_native()
    mask = tf.constant([[True, False]])
    x = tf.constant(np.random.default_rng(0).normal(size=(4, 2, 3)), tf.float32)
    y = Net()(x, training=True)
    np.testing.assert_array_equal(y, x)
    assert len(y._lbe_recording.entries) == 1
