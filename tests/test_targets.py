# SPDX-License-Identifier: Apache-2.0
"""What an activation can reach: bounds, defaults below them, and the warning."""

import re
import warnings

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import samples

import lbe_ops
from lbe_ops import (
    Conv2D_LBE,
    Dense_LBE,
    LBEModel,
    LBERegularizer,
    add_lbe,
    max_entropy,
    targets,
    with_lbe,
)

ACTIVATIONS = [
    getattr(keras.activations, name)
    for name in dir(keras.activations)
    if name not in ("deserialize", "get", "serialize", "threshold", "glu")
    and callable(getattr(keras.activations, name))
]
X, Y = samples(16, 5), samples(16, 2, seed=1)


@pytest.mark.parametrize("function", ACTIVATIONS, ids=lambda f: f.__name__)
def test_every_activation_of_keras_keeps_to_its_bound(function):
    """Half of the samples at either end: bounded ones get there, others beyond."""
    far = 100 if function is keras.activations.exponential else 1e6
    ends = np.repeat([[-far, -far], [far, -far]], 50, axis=0)
    if "max" not in function.__name__:  # that goes over the units
        ends = ends[:, :1]
    y = function(tf.constant(ends, tf.float64))
    reached = oracle.batch_entropy(y)
    bound = max_entropy(function)
    assert bound == max_entropy(function.__name__)
    if np.isinf(bound):
        assert reached > 5
    else:
        x = function(tf.constant(samples(200, 4, dtype=np.float64) * 5))
        assert oracle.batch_entropy(x) < bound
        if len(ends[0]) == 1:
            assert reached == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("units", [2, 3, 10, 100])
def test_units_of_a_softmax_share_what_there_is(units):
    """The best is every unit alone in an equal share of the samples."""
    bound = max_entropy("softmax", units)
    one_hot = np.eye(units)[np.arange(10 * units) % units]
    assert oracle.batch_entropy(one_hot) == pytest.approx(bound, rel=1e-12)
    rng = np.random.default_rng(0)
    for _ in range(20):
        uneven = rng.choice(units, 1000, p=rng.dirichlet(np.ones(units)))
        assert oracle.batch_entropy(np.eye(units)[uneven]) <= bound + 1e-12
    assert max_entropy("softmax", 1) == max_entropy("softmax") == max_entropy("sigmoid")


def test_bounds_of_a_formula_and_of_what_is_unknown():
    two_ends = np.repeat([[-1.0], [1.0]], 4, axis=0)
    formula = {"scale": 2.5, "offset": 0.25}
    expected = oracle.batch_entropy(two_ends, **formula)
    assert max_entropy("tanh", **formula) == pytest.approx(expected, rel=1e-12)
    assert max_entropy("tanh") == pytest.approx(1.128, abs=1e-3)
    assert max_entropy("sigmoid") == pytest.approx(0.571, abs=1e-3)
    assert max_entropy(None) == max_entropy(lambda x: x) == np.inf
    with pytest.raises(ValueError, match="Received: units=0"):
        max_entropy("softmax", 0)
    with pytest.raises(ValueError, match="tanhh"):
        max_entropy("tanhh")
    with pytest.raises(ValueError, match="scale must be from"):
        max_entropy("tanh", scale=0.0)


@pytest.mark.parametrize(
    ("layer", "alpha"),
    [
        (keras.layers.Dense(4, "relu"), 1.0),
        (keras.layers.Dense(4), 1.0),
        (keras.layers.LayerNormalization(), 1.0),
        (keras.layers.Dense(4, "tanh"), 0.5),
        (keras.layers.LSTM(4), 0.5),
        (keras.layers.Conv2D(4, 3, activation="sigmoid"), 0.2),
        (keras.layers.Activation("hard_tanh"), 0.4 * max_entropy("tanh")),
        (keras.layers.Dense(10, "softmax"), 0.4 * max_entropy("softmax", 10)),
        (keras.layers.Dense(1000, "softmax"), 0.4 * max_entropy("softmax", 1000)),
    ],
)
def test_defaults_suit_the_activation(layer, alpha):
    regularizer = with_lbe(layer.from_config(layer.get_config())).activity_regularizer
    assert float(regularizer.lbe_alpha) == pytest.approx(alpha, rel=1e-6)
    expected = min(0.05, alpha / 4)
    assert regularizer.lbe_alpha_min == pytest.approx(expected, rel=1e-6)
    assert regularizer.lbe_beta == 1.0
    named = with_lbe(
        layer.from_config(layer.get_config()), lbe_alpha=0.75, lbe_alpha_min=0.25
    )
    assert float(named.activity_regularizer.lbe_alpha) == 0.75
    assert named.activity_regularizer.lbe_alpha_min == 0.25


def test_defaults_of_another_formula_are_feasible():
    layer = with_lbe(keras.layers.Dense(4, "tanh"), scale=0.1)
    bound = max_entropy("tanh", scale=0.1)
    found = float(layer.activity_regularizer.lbe_alpha)
    assert found == pytest.approx(0.4 * bound, rel=1e-6)


def test_add_lbe_asks_of_every_layer_what_suits_it():
    plain = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(4, "relu"),
            keras.layers.Dense(4, "tanh"),
            keras.layers.Dense(2, "sigmoid"),
            keras.layers.Dense(2),
        ]
    )
    model = add_lbe(plain)
    assert model.LBE_strength == pytest.approx(0.1)
    assert [float(r.lbe_alpha) for r in model.lbe_regularizers] == pytest.approx(
        [1.0, 0.5, 0.2]
    )


class Block(keras.layers.Layer):
    """Nobody knows what its activation is for."""

    activation = staticmethod(keras.activations.tanh)

    def call(self, x):
        return 9 * x


def test_a_layer_of_the_users_has_no_known_bound():
    layer = with_lbe(Block())
    assert float(layer.activity_regularizer.lbe_alpha) == 1.0
    assert layer.activity_regularizer.reach is None


def warnings_of(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    found = [str(w.message) for w in caught if "An entropy to reach" in str(w.message)]
    return result, found


LAYERS = {
    "Dense_LBE": lambda: Dense_LBE(2, "tanh", LBE_alpha=3.0),
    "plain layer": lambda: keras.layers.Dense(
        2, "tanh", activity_regularizer=LBERegularizer(3.0)
    ),
    "with_lbe": lambda: with_lbe(keras.layers.Dense(2, "tanh"), lbe_alpha=3.0),
    "alpha_min": lambda: Dense_LBE(2, "tanh", LBE_alpha=0.5, LBE_alpha_min=3.0),
}


def train(model):
    model.compile("sgd", "mse")
    for _ in range(2):
        model.fit(X, Y, verbose=0)
    return model


class Subclassed(LBEModel):
    def __init__(self, make):
        super().__init__()
        self.several = [make() for _ in range(5)]

    def call(self, x):
        for layer in self.several:
            x = layer(x)
        return x


def functional(make, model=LBEModel):
    inputs = x = keras.Input((5,))
    for _ in range(5):
        x = make()(x)
    return model(inputs, x)


@pytest.mark.parametrize("kind", [functional, Subclassed])
@pytest.mark.parametrize("name", LAYERS)
def test_one_warning_of_a_model_with_unreachable_targets(name, kind):
    for _ in range(2):  # of every model
        _, (text,) = warnings_of(lambda: train(kind(LAYERS[name])))
        assert re.search("3 on tanh, at most 1.13 .'.*dense.*' and 4 more", text)
        assert "lbe_alpha of about half" in text


def test_a_warning_names_every_kind_of_layer_and_models_that_share_say_it_once():
    inputs = keras.Input((6, 6, 1))
    x = Conv2D_LBE(2, 3, activation="sigmoid")(inputs)
    x = keras.layers.Flatten()(x)
    x = LAYERS["Dense_LBE"]()(Dense_LBE(2, "relu")(x))
    model, (text,) = warnings_of(lambda: LBEModel(inputs, x))
    assert "6 on sigmoid, at most 0.571 ('conv2d_lbe" in text
    assert "3 on tanh" in text and "relu" not in text
    _, found = warnings_of(lambda: LBEModel(model.input, model.output))
    assert found == []


def test_add_lbe_warns_of_an_alpha_that_the_user_names():
    plain = functional(lambda: keras.layers.Dense(2, "sigmoid"), keras.Model)
    _, (text,) = warnings_of(lambda: add_lbe(plain, keras.layers.Dense, lbe_alpha=0.75))
    assert re.search("0.75 on sigmoid, at most 0.571 .*and 4 more", text)


@pytest.mark.parametrize("name", ["Dense_LBE", "with_lbe"])
def test_a_plain_model_warns_once_in_training(name):
    targets.warn_once.cache_clear()
    model = functional(LAYERS[name], keras.Model)
    _, found = warnings_of(lambda: model(X))
    assert found == []
    _, (text,) = warnings_of(lambda: train(model))
    assert "3 on tanh, at most 1.13. LBE pushes" in text


@pytest.mark.filterwarnings("error")
def test_what_can_be_reached_is_no_warning():
    for make in (
        lambda: Dense_LBE(2, "tanh", LBE_alpha=1.1),
        lambda: Dense_LBE(2, "relu"),
        lambda: with_lbe(keras.layers.Dense(2, "softmax")),
        lambda: with_lbe(Block(), lbe_alpha=3.0),
        lambda: lbe_ops.LBE(lbe_alpha=6.0),
    ):
        functional(make)
