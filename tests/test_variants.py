# SPDX-License-Identifier: Apache-2.0
"""The variants of LBE: one-sided, of every unit, and a hinge on standard deviations.

Values are compared with float64 NumPy, gradients with finite differences of it.
"""

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import (
    left_to_long,
    logs_of_batch,
    require_native,
    require_xla,
    samples,
)

from lbe_ops import LBE, Conv2D_LBE, Dense_LBE, LBEModel, LBERegularizer, native
from lbe_ops.regularizer import ON_UNITS, VARIANTS

# Keras reads a variable into NumPy 2 in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

OTHERS = VARIANTS[1:]
X, Y = samples(12, 5), samples(12, 2, seed=1)
HOW = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "jit": {"jit_compile": True},
}


def expected_lbe(variant, x, alpha, beta=0.5, ddof=0, scale=oracle.SCALE, offset=1.0):
    formula = {"ddof": ddof, "scale": scale, "offset": offset}
    entropies = oracle.unit_entropy(x, **formula)
    if variant == "entropy":
        return beta * (entropies.mean() - alpha) ** 2
    if variant == "one_sided":
        return beta * min(entropies.mean() - alpha, 0) ** 2
    if variant == "units":
        return beta * np.mean((entropies - alpha) ** 2)
    least = np.sqrt(max(np.exp(2 * alpha) - offset, 0) / scale)
    std = np.sqrt(oracle.moments(x, ddof)[1])
    return beta * np.mean(np.maximum(0, least - std))


def slopes(function, x):
    """Central differences of a function of x."""
    result = np.zeros(np.shape(x))
    for index in np.ndindex(*result.shape):
        step = np.zeros_like(result)
        step[index] = 1e-6
        result[index] = (function(x + step) - function(x - step)) / 2e-6
    return result


@pytest.fixture(params=left_to_long(HOW, "jit".__eq__))
def how(request):
    if request.param == "jit" and not native.compiles():
        require_xla()
    return request.param


def loss_and_gradients(regularizer, how):
    """A function of activations: LBE, and its gradients by them and by alpha."""

    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = regularizer.loss(x, training=True)
        return loss, tape.gradient(loss, [x, regularizer.lbe_alpha.value])

    return (
        function if how == "eager" else tf.function(function, jit_compile=how == "jit")
    )


FORMULAS = [{}, {"ddof": 1, "scale": 2.5, "offset": 0.25}, {"scale": 17.0, "offset": 0}]


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
@pytest.mark.parametrize("alpha", [0.3, 0.9])
@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradients(variant, alpha, formula, how):
    if how == "jit" and variant not in ON_UNITS:
        require_xla()
    x = samples(8, 2, 3, dtype=np.float64) * [0.2, 0.7, 1.5]
    regularizer = LBERegularizer(alpha, 0.1, 0.5, variant=variant, **formula)

    loss, (by_x, by_alpha) = loss_and_gradients(regularizer, how)(tf.constant(x))
    alpha = float(regularizer.lbe_alpha)  # as float32 has it
    expected = expected_lbe(variant, x, alpha, **formula)
    assert loss.shape == () and float(loss) == pytest.approx(expected, rel=1e-9)
    expected = slopes(lambda x: expected_lbe(variant, x, alpha, **formula), x)
    np.testing.assert_allclose(by_x, expected, rtol=1e-5, atol=1e-9)
    (expected,) = slopes(
        lambda a: expected_lbe(variant, x, a[0], **formula), np.array([alpha])
    )
    assert float(by_alpha) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def model_of(variants, alpha=0.9, model=LBEModel, **arguments):
    """Every kind of layer with LBE, each with a variant of its own."""

    def regularizer(index, make=LBERegularizer):
        return make(alpha, 0.1, 0.5, variant=variants[index % len(variants)])

    inputs = keras.Input((5,))
    x = Dense_LBE(4, "tanh", activity_regularizer=regularizer(0))(inputs)
    x = keras.layers.Dense(4, "relu", activity_regularizer=regularizer(1))(x)
    x = keras.layers.Dense(4, "sigmoid", activity_regularizer=regularizer(2))(x)
    x = regularizer(3, LBE)(x)
    return model(inputs, keras.layers.Dense(2)(x), **arguments)


@pytest.mark.parametrize("alpha", [0.9, 0.12])
@pytest.mark.parametrize("variants", [*([v] for v in OTHERS), VARIANTS], ids=str)
def test_an_lbe_model_has_them_in_its_loss(variants, alpha, how):
    keras.utils.set_random_seed(1)
    model = model_of(variants, alpha, LBE_strength=0.7)
    model.compile(keras.optimizers.SGD(0.0), "mse", **HOW[how])
    logs = logs_of_batch(model.train_on_batch, X, Y)
    lbe = []
    h = X
    for index, layer in enumerate(model.layers[1:5]):
        h = layer(h).numpy()
        lbe.append(expected_lbe(variants[index % len(variants)], h, alpha))
    assert logs["lbe"] == pytest.approx(np.mean(lbe) * logs["ce"], rel=1e-4, abs=1e-9)
    assert logs["max_lbe"] == pytest.approx(np.max(lbe) * logs["ce"], rel=1e-4)
    assert logs["loss"] == pytest.approx(logs["ce"] + 0.7 * logs["lbe"], rel=1e-6)
    evaluated = logs_of_batch(model.test_on_batch, X, Y)
    assert evaluated["loss"] == pytest.approx(logs["loss"], rel=1e-5)


@pytest.mark.parametrize("variant", OTHERS)
def test_a_model_follows_the_gradient_of_its_loss(variant):
    """The step of an LBEModel against differences of the loss that it evaluates."""
    model = model_of([variant], LBE_strength=0.7, model=LBEModel)
    learned = 0.01
    model.compile(keras.optimizers.SGD(learned), "mse")
    before = model.get_weights()
    kernel = before[0]
    model.train_on_batch(X, Y)
    gradient = (kernel - model.get_weights()[0]) / learned
    direction = gradient / np.linalg.norm(gradient)

    def loss(step):
        model.set_weights([kernel + step * direction, *before[1:]])
        return logs_of_batch(model.test_on_batch, X, Y)["loss"]

    slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
    assert slope == pytest.approx(np.linalg.norm(gradient), rel=0.02)


def test_one_sided_leaves_alone_what_is_above():
    x = tf.constant(samples(8, 4))
    regularizer = LBERegularizer(0.3, 0.1, variant="one_sided")
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = regularizer.loss(x)
    gradients = tape.gradient(loss, [x, regularizer.lbe_alpha.value])
    assert float(loss) == 0
    assert not any(np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_hinge_has_a_gradient_that_does_not_vanish_with_the_variance(variant):
    def largest_gradient(scale):
        x = tf.constant(scale * samples(16, 4))
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = LBERegularizer(1.0, variant=variant).loss(x)
        return np.abs(tape.gradient(loss, x)).max()

    ratio = largest_gradient(1e-8) / largest_gradient(1e-2)
    assert ratio == pytest.approx(1 if variant == "std_hinge" else 1e-6, rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("variant", OTHERS)
def test_what_does_not_vary_and_what_is_too_small_is_finite(variant, dtype, how):
    """Units that are dead, tiny and large; 0 or 1 sample; and a target of 0."""
    dead = np.zeros((8, 3))
    dead[:, 1] = 1e-3
    dead[:, 2] = samples(8) * 100
    for alpha in (0.0, 0.9):
        regularizer = LBERegularizer(alpha, 0.0, variant=variant, native=False)
        function = loss_and_gradients(regularizer, how)
        for values in (dead, dead[:, :1], dead[:1], dead[:0], np.full((1, 2), np.nan)):
            x = tf.cast(values, dtype)
            loss, gradients = function(x)
            for result in (loss, *gradients):
                assert np.isfinite(tf.cast(result, tf.float64)).all()
            if len(values) < 2:
                assert float(loss) == 0 and not np.any(gradients[0])
            else:
                values = tf.cast(x, tf.float64).numpy()
                expected = expected_lbe(variant, values, np.float32(alpha), beta=0.2)
                assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_is_not_hidden(variant):
    x = samples(8, 4)
    x[3, 2] = np.nan
    assert np.isnan(float(LBERegularizer(variant=variant).loss(x)))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("variant", OTHERS)
def test_mixed_precision_trains(variant, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = model_of([variant], LBE_strength=1.0)
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(keras.optimizers.Adam(0.01), "mse")
    history = model.fit(X, Y, batch_size=6, epochs=20, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-1] < history["loss"][0]
    for regularizer in model.lbe_regularizers:
        assert float(regularizer.lbe_alpha) != np.float32(0.9)


@pytest.mark.parametrize("model", [LBEModel, keras.Model])
@pytest.mark.parametrize("variant", OTHERS)
def test_files_keep_the_variant(variant, model, tmp_path):
    model = model_of([variant], model=model)
    model.compile("adam", "mse")
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    regularizer = loaded.layers[1].activity_regularizer
    assert regularizer.variant == variant
    expected = logs_of_batch(model.train_on_batch, X, Y)
    logs = logs_of_batch(loaded.train_on_batch, X, Y)
    assert logs == pytest.approx(expected, rel=1e-5)


def test_a_configuration_of_before_is_that_of_the_paper():
    config = LBERegularizer().get_config()
    assert config.pop("variant") == "entropy"
    assert LBERegularizer.from_config(config).variant == "entropy"
    assert LBE(variant="units").lbe_regularizer.variant == "units"


def operations(variant, layer=Dense_LBE):
    inputs = keras.Input((6, 6, 2) if layer is Conv2D_LBE else (5,))
    regularizer = LBERegularizer(variant=variant)
    arguments = (4, 3) if layer is Conv2D_LBE else (4,)
    hidden = layer(*arguments, activity_regularizer=regularizer)(inputs)
    model = LBEModel(inputs, hidden)
    model.compile("sgd", "mse")
    x, y = (tf.zeros((8, *shape[1:])) for shape in (inputs.shape, hidden.shape))
    step = tf.function(lambda: model.train_step((x, y)), autograph=False)
    graph = step.get_concrete_function().graph
    return {op.type for op in graph.get_operations() if op.type.startswith("LBE>")}


@pytest.mark.parametrize("layer", [Dense_LBE, Conv2D_LBE])
def test_scalars_keep_the_fused_epilogue(layer):
    require_native()
    assert "LBE>Epilogue" in operations("entropy", layer)
    assert operations("one_sided", layer) == operations("entropy", layer)
    for variant in ON_UNITS:
        assert operations(variant, layer) == set()


def test_what_there_is_not():
    with pytest.raises(ValueError, match="must be one of entropy, one_sided, units"):
        LBERegularizer(variant="hinge")
    for variant in ON_UNITS:
        with pytest.raises(ValueError, match=f"native op for the variant '{variant}'"):
            LBERegularizer(variant=variant, native=True)
    assert LBERegularizer(variant="one_sided", native=False).native is False
