# SPDX-License-Identifier: Apache-2.0
"""Rank, cosine and the other measures against NumPy in float64; `Probe` on models."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import DTYPES, samples, tensor

import lbe_ops
from lbe_ops import Dense_LBE, LBEModel, LBERegularizer, add_lbe, measure
from lbe_ops.measure import MEASURES, Probe

# Keras reads a variable into NumPy 2 in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

MODES = {
    "eager": lambda f: f,
    "graph": lambda f: tf.function(f, autograph=False),
    "unknown": lambda f: tf.function(
        f, autograph=False, input_signature=[tf.TensorSpec(None, tf.float32)]
    ),
    "batch": lambda f: tf.function(
        f, autograph=False, input_signature=[tf.TensorSpec((None, None), tf.float32)]
    ),
    "jit": lambda f: tf.function(f, autograph=False, jit_compile=True),
}


def flat(x):
    x = np.asarray(x, np.float64)
    return x.reshape(len(x), -1)


def rank_by_svd(x):
    x = flat(x)
    eigenvalues = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    if eigenvalues.sum() <= 1e-28 * (x**2).sum():
        return 0.0
    return eigenvalues.sum() ** 2 / (eigenvalues**2).sum()


def cosine_by_pairs(x):
    cosines = []
    for a, b in itertools.permutations(flat(x), 2):
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        cosines.append(a @ b / norms if norms else 0.0)
    return np.mean(cosines)


ORACLES = {
    "effective_rank": rank_by_svd,
    "mean_cosine": cosine_by_pairs,
    "rms": lambda x: np.sqrt((flat(x) ** 2).mean()),
    "deviation": lambda x: np.sqrt(flat(x).var(axis=0).mean()),
    "dead_share": lambda x: (np.ptp(flat(x), axis=0) == 0).mean(),
}


def correlated(*shape):
    """Activations with directions of different weight, a mean, and two dead units."""
    x = samples(*shape) * np.linspace(0.1, 2, shape[-1], dtype=np.float32)
    x += 0.5 * samples(shape[0], *[1] * (len(shape) - 1), seed=1) + 0.7
    x[..., :2] = 0.3
    return x


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("shape", [(12, 5), (5, 40), (7, 3, 4, 6), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_for_every_dtype(name, shape, dtype):
    x, rounded = tensor(correlated(*shape), dtype)
    value = MEASURES[name](x)
    assert value.dtype == (tf.float64 if dtype == "float64" else tf.float32)
    tolerance = 1e-12 if dtype == "float64" else 2e-6
    assert float(value) == pytest.approx(ORACLES[name](rounded), rel=tolerance)


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(12, 5), (5, 40)])
def test_values_in_every_mode(name, mode, shape):
    x = correlated(*shape)
    value = MODES[mode](MEASURES[name])(tf.constant(x))
    assert float(value) == pytest.approx(ORACLES[name](x), rel=3e-6)


@pytest.mark.parametrize("name", ["effective_rank", "mean_cosine"])
@pytest.mark.parametrize("mode", ["eager", "graph", "jit"])
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1e-20, "f4"), (1e-30, "f4"), (1e30, "f4"), (1e-200, "f8"), (1e200, "f8")],
)
def test_rank_and_cosine_do_not_depend_on_the_scale(name, mode, scale, dtype):
    x = (correlated(9, 6).astype("f8") * scale).astype(dtype)
    value = float(MODES[mode](MEASURES[name])(tf.constant(x)))
    expected = ORACLES[name](x.astype("f8") / scale)
    assert value == pytest.approx(expected, rel=3e-6)


@pytest.mark.parametrize("name", ["rms", "deviation"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_overflow_nor_vanish(name, scale):
    x = (correlated(9, 6).astype("f8") * scale).astype("f4")
    assert float(MEASURES[name](x)) == pytest.approx(ORACLES[name](x), rel=3e-6)


def test_differences_of_the_largest_numbers():
    x = np.float32([[3e38, 0], [-3e38, 1e38], [0, 2e38]])
    assert float(measure.effective_rank(x)) == pytest.approx(rank_by_svd(x), rel=1e-6)
    assert float(measure.deviation(x)) == pytest.approx(
        ORACLES["deviation"](x), rel=1e-6
    )


def test_a_large_mean_is_not_part_of_the_rank():
    x = 1e4 + np.round(samples(30, 8) * 64) / 64  # exact in float32
    assert float(measure.effective_rank(x)) == pytest.approx(rank_by_svd(x), rel=1e-5)


def test_literals():
    corners = tf.constant([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    assert float(lbe_ops.effective_rank(corners)) == 2
    assert float(lbe_ops.mean_cosine(corners)) == pytest.approx(-1 / 3)
    line = tf.constant([[1.0], [2.0], [-4.0]]) * tf.constant([[3.0, 4.0]])
    assert float(lbe_ops.effective_rank(line)) == pytest.approx(1, abs=1e-6)
    assert float(lbe_ops.mean_cosine(line)) == pytest.approx(-1 / 3)
    with_zero = tf.constant([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    assert float(lbe_ops.mean_cosine(with_zero)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e38])
@pytest.mark.parametrize("mode", ["eager", "graph", "jit"])
def test_where_nothing_varies(value, mode):
    x = tf.fill([7, 3], value)
    assert float(MODES[mode](measure.effective_rank)(x)) == 0
    assert float(MODES[mode](measure.deviation)(x)) == 0
    assert float(MODES[mode](measure.dead_share)(x)) == 1
    cosine = float(MODES[mode](measure.mean_cosine)(x))
    assert cosine == pytest.approx(1.0 if value else 0.0)


@pytest.mark.parametrize("name", ["effective_rank", "mean_cosine", "rms", "deviation"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_what_is_not_finite_is_nan(name, value, rest):
    x = np.full((4, 3), rest, np.float32)
    x[2, 1] = value
    assert np.isnan(float(MEASURES[name](x)))


@pytest.mark.parametrize("name", ORACLES)
def test_bad_input(name):
    function = MEASURES[name]
    few = tf.errors.InvalidArgumentError
    with pytest.raises(few, match=rf"{name} needs .* 2 samples.*\(1, 3\)"):
        function(tf.ones((1, 3)))
    with pytest.raises(few, match=r"\(4, 0\)"):
        function(tf.ones((4, 0)))
    for mode in ("batch", "unknown"):
        with pytest.raises(few, match="2 samples"):
            MODES[mode](function)(tf.ones((1, 3)))
    with pytest.raises(TypeError, match=rf"{name} takes.*int32"):
        function(tf.ones((4, 3), tf.int32))
    with pytest.raises(ValueError, match=rf"{name} takes.*scalar"):
        function(tf.ones(()))


@pytest.mark.parametrize("name", ["effective_rank", "mean_cosine"])
def test_gradient(name):
    x = correlated(5, 4).astype("f8")
    with tf.GradientTape() as tape:
        variable = tf.Variable(x)
        value = MEASURES[name](variable)
    gradient = tape.gradient(value, variable).numpy()
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-5
        difference = (ORACLES[name](x + step) - ORACLES[name](x - step)) / 2e-5
        assert gradient[index] == pytest.approx(difference, abs=1e-7)
    zeros = tf.Variable(tf.zeros((3, 2)))
    with tf.GradientTape() as tape:
        value = MEASURES[name](zeros)
    np.testing.assert_array_equal(tape.gradient(value, zeros), np.zeros((3, 2)))


# Probe

X, Y = samples(16, 5), samples(16, 2, seed=1)


def outputs_by_hand(model, x):
    """Outputs of a chain of layers, with the weights of a model."""
    found = []
    for layer in model.layers:
        if not isinstance(layer, keras.layers.InputLayer):
            x = layer(x)
            found.append(np.asarray(x))
    return found


def chain(*layers, model=keras.Sequential, inputs=(5,)):
    if model is keras.Sequential:
        return model([keras.Input(inputs), *layers])
    start = x = keras.Input(inputs)
    for layer in layers:
        x = layer(x)
    return model(start, x)


def linear_gradients(model, x, y):
    """Norms for Dense layers without activation, and the mean squared error."""
    weights = [[np.float64(w) for w in layer.get_weights()] for layer in model.layers]
    weights = [w[:2] for w in weights if w]
    inputs = [np.float64(x)]
    for kernel, bias in weights:
        inputs.append(inputs[-1] @ kernel + bias)
    delta, norms = 2 * (inputs[-1] - y) / y.size, []
    for (kernel, _), before in zip(weights[::-1], inputs[-2::-1], strict=True):
        squares = ((before.T @ delta) ** 2).sum() + (delta.sum(0) ** 2).sum()
        norms.append(np.sqrt(squares))
        delta = delta @ kernel.T
    return norms[::-1]


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_probe(eagerly, compiled):
    model = chain(*(keras.layers.Dense(n, name=f"d{n}") for n in (4, 3, 2)))
    model.compile("sgd", "mse", run_eagerly=eagerly)
    probe = Probe(model, X, targets=Y, compiled=compiled)
    for _ in range(2):
        measured = probe()
        assert probe.names == [f"{model.name}/d{n}" for n in (4, 3, 2)]
        assert set(measured) == {*MEASURES, "gradient_norm"}
        for name, oracle in ORACLES.items():
            expected = [oracle(x) for x in outputs_by_hand(model, X)]
            np.testing.assert_allclose(measured[name], expected, 5e-6, 1e-6)
        expected = linear_gradients(model, X, Y)
        np.testing.assert_allclose(measured["gradient_norm"], expected, rtol=1e-5)
        model.set_weights([w + 0.1 for w in model.get_weights()])


def lbe_model(regularizer):
    layers = [Dense_LBE(4), keras.layers.Dense(2, kernel_regularizer=regularizer)]
    return chain(*layers, model=LBEModel)


def plain_model(regularizer):
    layers = [
        keras.layers.Dense(4, activity_regularizer=LBERegularizer()),
        keras.layers.ActivityRegularization(l1=10.0),
        keras.layers.Dense(2, kernel_regularizer=regularizer),
    ]
    return chain(*layers)


@pytest.mark.parametrize("make", [lbe_model, plain_model])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_is_that_of_the_compiled_loss_alone(make, training, compiled):
    model = make(keras.regularizers.L2(3.0))
    model.compile("sgd", "mse")
    kernels = [each for each in model.layers if hasattr(each, "kernel")]
    probe = Probe(
        model, X, kernels, targets=Y, training=training, compiled=compiled, measures=()
    )
    measured = probe()
    assert list(measured) == ["gradient_norm"]
    expected = linear_gradients(model, X, Y)
    np.testing.assert_allclose(measured["gradient_norm"], expected, rtol=1e-5)


def test_norms_of_gradients_whose_squares_vanish():
    model = chain(keras.layers.Dense(4), keras.layers.Dense(2))
    for loss_weight in (1e-25, 1e25):
        model.compile("sgd", "mse", loss_weights=[loss_weight])
        norms = Probe(model, X, targets=Y)()["gradient_norm"]
        expected = np.multiply(linear_gradients(model, X, Y), loss_weight)
        np.testing.assert_allclose(norms, expected, rtol=1e-5)


def test_another_compile_is_another_gradient():
    model = chain(keras.layers.Dense(2))
    model.compile("sgd", "mse")
    probe = Probe(model, X, targets=Y)
    once = probe()["gradient_norm"]
    model.compile(
        "sgd", lambda y, y_pred: 3 * keras.losses.mean_squared_error(y, y_pred)
    )
    np.testing.assert_allclose(probe()["gradient_norm"], 3 * once, rtol=1e-6)


def everything(model):
    variables = [*model.variables, *model.metrics_variables]
    return [np.asarray(v) for v in variables]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fitted", [False, True])
def test_nothing_changes(compiled, fitted):
    """Statistics, seeds, states of recurrent layers, and metrics of several losses."""
    inputs = keras.Input(batch_shape=(16, 5))
    x = Dense_LBE(6)(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.5)(x)
    x = keras.layers.Reshape((2, 3))(x)
    x = keras.layers.GRU(3, stateful=True)(x)
    outputs = {"a": keras.layers.Dense(2)(x), "b": keras.layers.Dense(2)(x)}
    model = LBEModel(inputs, outputs)
    model.compile("adam", {"a": "mse", "b": "mae"}, metrics={"a": ["mse"]})
    targets = {"a": Y, "b": Y}
    if fitted:
        model.fit(X, targets, batch_size=16, verbose=0)
    before = everything(model)
    regularizers = [layer.activity_regularizer for layer in model.layers]
    probe = Probe(model, X, targets=targets, training=True, compiled=compiled)
    for _ in range(2):
        assert np.isfinite(probe()["gradient_norm"]).all()
    after = everything(model)[: len(before)]
    for ours, expected in zip(after, before, strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert [layer.activity_regularizer for layer in model.layers] == regularizers
    assert np.isfinite(model.fit(X, targets, 16, verbose=0).history["loss"]).all()


def test_normalization_in_training_takes_the_statistics_of_the_batch():
    model = chain(keras.layers.BatchNormalization(), keras.layers.Dense(2))
    model.compile("sgd", "mse")
    x = 100 * X
    selection = keras.layers.BatchNormalization
    for training, expected in ((True, 1.0), (False, ORACLES["deviation"](x))):
        probe = Probe(model, x, selection, targets=Y, training=training)
        assert probe()["deviation"][0] == pytest.approx(expected, rel=1e-2)


class Tied(keras.Model):
    """A subclassed model that calls a layer twice, and a model of its own."""

    def __init__(self):
        super().__init__()
        self.tied = keras.layers.Dense(5, name="tied")
        self.net = chain(keras.layers.Dense(3, name="inside"))
        self.head = keras.layers.Dense(2, name="head")

    def call(self, x):
        return self.head(self.net(self.tied(self.tied(x))))


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_that_are_called_twice_and_models_in_models(compiled):
    model = Tied()  # not built
    model.compile("sgd", "mse")
    probe = Probe(model, X, targets=Y, compiled=compiled)
    measured = probe()
    assert [name.split("/")[-1] for name in probe.names] == [
        *("tied", "tied (2)", "inside", "head")
    ]
    once = model.tied(X)
    twice = model.tied(once)
    expected = [measure.effective_rank(x).numpy() for x in (once, twice)]
    np.testing.assert_allclose(measured["effective_rank"][:2], expected, rtol=1e-5)
    assert measured["gradient_norm"][0] == measured["gradient_norm"][1] > 0


def test_convolutions_and_layers_without_weights():
    x, y = samples(6, 8, 8, 3), np.arange(6) % 4
    model = chain(
        keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(4, activation="softmax"),
        inputs=(8, 8, 3),
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    probe = Probe(model, x, keras.layers.Layer, targets=y)
    measured = probe()
    hand = outputs_by_hand(model, x)
    for name, oracle in ORACLES.items():
        expected = [oracle(each) for each in hand]
        np.testing.assert_allclose(measured[name], expected, rtol=1e-5)
    assert probe.has_gradient == [True, False, True]
    assert np.isnan(measured["gradient_norm"]).tolist() == [False, True, False]
    delta = hand[-1] - np.eye(4)[y]
    kernel, bias = hand[1].T @ delta / 6, delta.mean(0)
    expected = np.sqrt((kernel**2).sum() + (bias**2).sum())
    assert measured["gradient_norm"][2] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [2.0**15, 2.0**60])
def test_mixed_precision(scale):
    """Gradients that vanish in float16, and a scale of the loss that is too large."""
    plain = chain(keras.layers.Dense(4), keras.layers.Dense(2))
    mixed = chain(*(keras.layers.Dense(n, dtype="mixed_float16") for n in (4, 2)))
    mixed.set_weights(plain.get_weights())
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(), initial_scale=scale
    )
    mixed.compile(optimizer, "mse", loss_weights=[1e-8])
    measured = Probe(mixed, X, targets=Y)()
    assert measured["effective_rank"].dtype == np.float32
    expected = np.multiply(linear_gradients(plain, X, Y), 1e-8)
    np.testing.assert_allclose(measured["gradient_norm"], expected, rtol=1e-2)
    expected = [rank_by_svd(x) for x in outputs_by_hand(mixed, X)]
    np.testing.assert_allclose(measured["effective_rank"], expected, rtol=1e-4)


def test_recurrent_layers_take_the_place_of_their_cells():
    model = chain(
        keras.layers.LSTM(4, return_sequences=True, name="lstm"),
        keras.layers.Bidirectional(keras.layers.GRU(3, name="gru")),
        keras.layers.Dense(2, name="head"),
        inputs=(7, 5),
    )
    model.compile("sgd", "mse")
    probe = Probe(model, samples(16, 7, 5), targets=Y)
    assert np.isfinite(probe()["gradient_norm"]).all()
    assert [name.split("/")[-1] for name in probe.names] == [
        *("lstm", "forward_gru", "backward_gru", "head")
    ]


def test_default_layers_are_those_with_lbe():
    model = add_lbe(chain(keras.layers.Dense(4, name="a"), keras.layers.Dense(2)), "a")
    assert [layer.name for layer in measure.default_layers(model)] == ["a"]
    assert len(measure.weighted_layers(model)) == 2


class InAFunction(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = keras.layers.Dense(2, name="inner")

    @tf.function
    def call(self, x):
        return self.inner(x)


def test_errors():
    model = chain(keras.layers.Dense(2, name="one"))
    with pytest.raises(ValueError, match="Unknown measures.*'ranks'"):
        Probe(model, X, measures=["ranks"])
    with pytest.raises(ValueError, match=r"same samples.*\[16, 3\]"):
        Probe(model, X, targets=Y[:3])
    with pytest.raises(ValueError, match="compiled loss.*compile"):
        Probe(model, X, targets=Y)()
    with pytest.raises(tf.errors.InvalidArgumentError, match="at least 2 samples"):
        Probe(model, X[:1])()
    with pytest.raises(ValueError, match="There is no such layer.*'two'"):
        Probe(model, X, ["two"])()
    with pytest.raises(ValueError, match="calls none of the layers"):
        Probe(model, X, [keras.layers.Dense(3)])()
    inside = InAFunction()
    inside(X[:2])
    with pytest.raises(ValueError, match="inner' is called inside a function"):
        Probe(inside, X, ["inner"])()
