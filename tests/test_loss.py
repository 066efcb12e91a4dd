# SPDX-License-Identifier: Apache-2.0
"""`LBELoss`: the alphas of a model are one weight, and train as scalars would.

Expected values come from a training loop written out here, with a scalar for each alpha
and the same optimizer; for optimizers that take a variable as a whole, with a vector.
"""

import gc
import inspect
import os
import subprocess
import sys
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import require_xla, samples

from lbe_ops import (
    Dense_LBE,
    LBEModel,
    LBERegularizer,
    add_lbe,
    batch_entropy,
    native,
    recording,
    with_lbe,
)

# Keras reads a variable into NumPy 2 in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

X, Y = samples(12, 5), samples(12, 2, seed=1)
ALPHAS = (0.75, 0.5, 1.5)


def chain(regularizers=None):
    """LBE layers and a plain one; the same weights every time."""
    regularizers = regularizers or [LBERegularizer(a, 0.25, 0.5) for a in ALPHAS]
    units = [4] * len(regularizers) + [2]
    return [
        keras.layers.Dense(
            units[i],
            activation="tanh" if regularizer else None,
            kernel_initializer=keras.initializers.GlorotUniform(i),
            activity_regularizer=regularizer,
        )
        for i, regularizer in enumerate([*regularizers, None])
    ]


def functional(layers, model=LBEModel, **arguments):
    inputs = keras.Input((5,))
    x = inputs
    for layer in layers:
        x = layer(x)
    return model(inputs, x, **arguments)


class Late(LBEModel):
    """Its layers are there when it is first called, and not before."""

    def __init__(self, layers):
        super().__init__()
        self.make = layers

    def build(self, shape):
        self.all = self.make()

    def call(self, x):
        for layer in self.all:
            x = layer(x)
        return x


def regularizers_of(layers):
    found = [layer.activity_regularizer for layer in layers]
    return [regularizer for regularizer in found if regularizer is not None]


def alphas(layers):
    return np.array([float(each.lbe_alpha) for each in regularizers_of(layers)])


def weights(layers):
    """Kernels and biases, then the alphas."""
    return [
        *weights_of_layers(layers),
        alphas(layers),
    ]


def lbe_model_loss(ce, lbe):
    return ce + 1.5 * tf.reduce_mean(lbe) * ce


def train_by_hand(
    layers, optimizer, steps, x=X, loss=lbe_model_loss, vector=None, alphas_too=True
):
    """`fit` with the mean squared error, spelled out over the scalars (or a vector)."""
    h = x
    for layer in layers:
        h = layer(h)
    found = [v for layer in layers for v in layer.trainable_variables]
    variables = list({id(variable): variable for variable in found}.values())
    if vector is not None or not alphas_too:
        variables = [v for v in variables if v.name != "lbe_alpha"]
    if vector is not None:
        variables.append(vector)
    if not optimizer.built:
        optimizer.build(variables)
    for _ in range(steps):
        with tf.GradientTape() as tape:
            activations, lbe = x, []
            for layer in layers:
                activations = layer(activations)
                regularizer = layer.activity_regularizer
                if regularizer:
                    alpha = regularizer.lbe_alpha.value
                    if vector is not None:
                        alpha = vector.value[len(lbe)]
                    target = tf.maximum(tf.abs(alpha), 0.25)
                    entropy = batch_entropy(activations)
                    lbe.append(0.5 * tf.square(entropy - target))
            total = loss(tf.reduce_mean(tf.square(activations - Y)), lbe)
            scaled = optimizer.scale_loss(total)
        optimizer.apply(tape.gradient(scaled, variables), variables)
    optimizer.finalize_variable_values(variables)


optimizers = keras.optimizers


def decaying(make, **arguments):
    optimizer = make(0.05, weight_decay=0.3, **arguments)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def by_map(inner):
    return optimizers.MultiOptimizer(
        optimizers.OptimizerMap(inner, {".*kernel": optimizers.SGD(0.1)})
    )


def by_function(inner):
    sgd = optimizers.SGD(0.1)
    return optimizers.MultiOptimizer(
        lambda v: sgd if v.path.endswith("kernel") else inner
    )


OPTIMIZERS = {
    "SGD": lambda: optimizers.SGD(0.1),
    "momentum": lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "Adam": lambda: optimizers.Adam(0.05),
    "amsgrad": lambda: optimizers.Adam(0.05, amsgrad=True),
    "Adadelta": lambda: optimizers.Adadelta(5.0),
    "Adagrad": lambda: optimizers.Adagrad(0.1),
    "Adamax": lambda: optimizers.Adamax(0.05),
    "Ftrl": lambda: optimizers.Ftrl(0.1),
    "Lion": lambda: optimizers.Lion(0.01),
    "Nadam": lambda: optimizers.Nadam(0.05),
    "RMSprop": lambda: optimizers.RMSprop(0.05),
    "global_clipnorm": lambda: optimizers.Adam(0.05, global_clipnorm=0.05),
    "clipvalue": lambda: optimizers.SGD(0.5, clipvalue=0.01),
    "AdamW": lambda: decaying(optimizers.AdamW),
    "SGD with decay": lambda: decaying(optimizers.SGD, momentum=0.5),
    "accumulation": lambda: optimizers.Adam(0.1, gradient_accumulation_steps=2),
    "average": lambda: optimizers.SGD(0.3, use_ema=True, ema_momentum=0.5),
    "overwrite": lambda: optimizers.SGD(
        0.3, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
    "loss scale": lambda: optimizers.LossScaleOptimizer(
        decaying(optimizers.AdamW), initial_scale=64.0
    ),
}
# These take the norm of each variable, or its shape.
WHOLE = {
    "Adafactor": lambda: optimizers.Adafactor(0.05),
    "Lamb": lambda: optimizers.Lamb(0.05),
    "clipnorm": lambda: optimizers.Adam(0.05, clipnorm=0.01),
}
if hasattr(optimizers, "MultiOptimizer"):
    OPTIMIZERS["MultiOptimizer"] = lambda: by_map(decaying(optimizers.AdamW))
    OPTIMIZERS["MultiOptimizer by a function"] = lambda: by_function(
        decaying(optimizers.AdamW)
    )
KERAS = tuple(int(part) for part in keras.__version__.split(".")[:2])
if hasattr(optimizers, "Muon") and KERAS >= (3, 13):  # before, it fails on TensorFlow
    # It orthogonalizes matrices, and takes AdamW for the rest.
    both = "adam_weight_decay" in inspect.signature(optimizers.Muon).parameters
    muon = {"adam_weight_decay": 0.3} if both else {}
    OPTIMIZERS["Muon"] = lambda: decaying(optimizers.Muon, **muon)
if hasattr(optimizers, "ScheduleFreeAdamW"):
    OPTIMIZERS["ScheduleFreeAdamW"] = lambda: decaying(optimizers.ScheduleFreeAdamW)


def test_every_optimizer_of_keras_is_here():
    ours = "".join([*OPTIMIZERS, *WHOLE, "LossScaleOptimizer"])
    missing = {
        name
        for name, value in vars(optimizers).items()
        if inspect.isclass(value)
        and issubclass(value, optimizers.Optimizer)
        and value is not optimizers.Optimizer
        and name not in ours
        and not (name == "Muon" and KERAS < (3, 13))
    }
    assert not missing


def without_decay_of_alpha(optimizer):
    """The same for the loop by hand, where nobody else says so."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    for each in [inner, *getattr(inner, "optimizers", [])]:
        if getattr(each, "weight_decay", None):
            each.exclude_from_weight_decay(var_names=["bias", "lbe_alpha"])
    return optimizer


def assert_same(ours, expected, rtol=1e-5):
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-6)


def moved(layers):
    return np.abs(alphas(layers) - ALPHAS) > 1e-3


@pytest.mark.parametrize("name", [*OPTIMIZERS, *WHOLE])
def test_training_is_that_of_scalars(name):
    make = {**OPTIMIZERS, **WHOLE}[name]
    layers, expected = chain(), chain()
    model = functional(layers)
    model.compile(make(), "mse")
    if name == "ScheduleFreeAdamW":  # Keras makes another one of it in the first step
        model.optimizer.build(model.trainable_variables)
    model.fit(X, Y, batch_size=12, epochs=6, verbose=0)
    optimizer = without_decay_of_alpha(make())
    if name == "MultiOptimizer by a function":
        inner = without_decay_of_alpha(decaying(optimizers.AdamW))
        optimizer = by_function(inner)
    vector = None
    if name in WHOLE:
        vector = keras.Variable(ALPHAS, dtype="float32", name="lbe_alpha")
    train_by_hand(expected, optimizer, 6, vector=vector)
    theirs = weights(expected)
    if vector is not None:
        theirs[-1] = vector.numpy()
    assert_same(weights(layers), theirs, rtol=1e-4)
    assert moved(layers).all()


@pytest.mark.parametrize("how", ["eager", "jit", "several steps", "late", "own loop"])
def test_every_way_of_training_is_that_of_scalars(how):
    if how == "jit" and not native.compiles():
        require_xla()
    layers, expected = chain(), chain()
    model = Late(lambda: layers) if how == "late" else functional(layers)
    model.compile(
        optimizers.Adam(0.05),
        "mse",
        run_eagerly=how == "eager",
        jit_compile=how == "jit",
        steps_per_execution=3 if how == "several steps" else 1,
    )
    if how == "own loop":  # without the optimizer's `apply`
        variables = model.trainable_variables
        for _ in range(6):
            with tf.GradientTape() as tape:
                loss = model.compute_loss(X, Y, model(X, training=True))
            gradients = tape.gradient(loss, variables)
            for variable, gradient in zip(variables, gradients, strict=True):
                variable.assign_sub(0.05 * gradient)
        train_by_hand(expected, optimizers.SGD(0.05), 6)
    else:  # one batch
        model.fit(np.tile(X, (6, 1)), np.tile(Y, (6, 1)), 12, verbose=0, shuffle=False)
        train_by_hand(expected, optimizers.Adam(0.05), 6)
    assert_same(weights(layers), weights(expected), rtol=1e-4)
    assert moved(layers).all()


def test_the_alphas_are_one_weight_of_the_model():
    layers = chain()
    model = functional(layers)
    *others, vector = model.trainable_variables
    assert vector is model.lbe_loss.alphas
    assert vector.shape == (3,) and vector.path == f"{model.name}_lbe_loss/lbe_alpha"
    np.testing.assert_array_equal(vector, np.float32(ALPHAS))  # from the beginning
    assert len(others) == 8
    assert len(model.weights) == len(model.trainable_weights) == 9
    assert model.count_params() == sum(w.numpy().size for w in weights_of(model))
    model.compile("adam", "mse")
    model.fit(X, Y, verbose=0)
    assert len(model.optimizer.variables) == 2 + 2 * 9
    np.testing.assert_array_equal(vector, alphas(layers))
    for regularizer, alpha in zip(model.lbe_regularizers, vector.numpy(), strict=True):
        assert regularizer.get_config()["lbe_alpha"] == float(alpha)


def weights_of(model):
    return list(
        {id(w): w for layer in model.layers for w in layer.weights}.values()
    ) + [model.lbe_loss.alphas]


def test_summary_shows_the_layers_and_counts_the_alphas():
    model = functional(chain())
    lines = []
    model.summary(print_fn=lines.append)
    text = "\n".join(lines)
    for layer in model.layers:
        assert layer.name in text
    assert f"Total params: {24 + 20 + 20 + 10 + 3}" in text
    assert "LBE alphas: 3" in text


def test_reads_and_writes_reach_the_weight():
    layers, expected = chain(), chain()
    model = functional(layers)
    kept = layers[1].activity_regularizer.lbe_alpha
    model.compile(optimizers.Adam(0.05), "mse")
    optimizer = optimizers.Adam(0.05)
    for value in (0.9, 0.4):
        model.train_on_batch(X, Y)
        train_by_hand(expected, optimizer, 1)
        assert float(kept) == model.lbe_loss.alphas.numpy()[1]
        kept.assign(value)
        regularizers_of(expected)[1].lbe_alpha.assign(value)
        assert float(layers[1].activity_regularizer.target) == np.float32(value)
    model.train_on_batch(X, Y)
    train_by_hand(expected, optimizer, 1)
    assert_same(weights(layers), weights(expected))
    model.lbe_loss.alphas.assign([0.25, 0.5, 1.0])
    np.testing.assert_array_equal(alphas(layers), [0.25, 0.5, 1.0])


def test_an_alpha_that_was_kept_before_the_model_took_it_in():
    layers = chain()
    kept = layers[1].activity_regularizer.lbe_alpha
    kept.assign(0.9)
    model = functional(layers)
    np.testing.assert_array_equal(
        model.lbe_loss.alphas, np.float32([ALPHAS[0], 0.9, ALPHAS[2]])
    )
    kept.assign(0.8)
    assert model.lbe_loss.alphas.numpy()[1] == np.float32(0.8)
    assert kept.dtype == "float32" and kept.shape == ()
    np.testing.assert_array_equal(tf.convert_to_tensor(kept), np.float32(0.8))
    np.testing.assert_array_equal(np.asarray(kept), np.float32(0.8))
    with pytest.raises(AttributeError):
        layers[1].activity_regularizer.lbe_alpha = 0.5

    @tf.function
    def write_and_read():
        kept.assign(kept.value + 0.25)
        return kept.value + 0.0

    assert float(write_and_read()) == pytest.approx(1.05)
    assert float(kept) == pytest.approx(1.05)


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_frozen_alpha_does_not_move_and_has_no_part_in_the_norm(eagerly, clip):
    layers, expected = chain(), chain()
    model = functional(layers)
    ours = optimizers.Adam(0.05, global_clipnorm=clip)
    theirs = optimizers.Adam(0.05, global_clipnorm=clip)
    model.compile(ours, "mse", run_eagerly=eagerly)
    model.fit(X, Y, batch_size=12, epochs=3, verbose=0)
    train_by_hand(expected, theirs, 3)
    layers[0].trainable = expected[0].trainable = False  # with momentum by now
    layers[2].activity_regularizer.trainable = False
    expected[2].activity_regularizer.trainable = False
    before = alphas(layers)
    model.compile(ours, "mse", run_eagerly=eagerly)
    model.fit(X, Y, batch_size=12, epochs=3, verbose=0)
    train_by_hand(expected, theirs, 3)
    assert_same(weights(layers), weights(expected), rtol=1e-4)
    np.testing.assert_array_equal((alphas(layers) != before), [False, True, False])

    layers[0].trainable = True  # thaws
    model.compile(ours, "mse", run_eagerly=eagerly)
    model.train_on_batch(X, Y)
    np.testing.assert_array_equal((alphas(layers) != before), [True, True, False])


def test_all_alphas_frozen():
    layers = chain([LBERegularizer(trainable=False) for _ in range(2)])
    model = functional(layers)
    assert len(model.trainable_variables) == 6
    model.compile("adam", "mse")
    before = alphas(layers)
    model.fit(X, Y, verbose=0)
    np.testing.assert_array_equal(alphas(layers), before)
    layers[0].activity_regularizer.trainable = True  # thaws
    model.compile("adam", "mse")
    assert len(model.trainable_variables) == 7
    model.fit(X, Y, verbose=0)
    np.testing.assert_array_equal(alphas(layers) != before, [True, False])
    model.trainable = False
    assert model.trainable_variables == []


def test_a_frozen_alpha_is_not_averaged_away():
    layers = chain()
    model = functional(layers)
    optimizer = optimizers.SGD(0.3, momentum=0.9, use_ema=True, ema_momentum=0.5)
    model.compile(optimizer, "mse")
    model.fit(X, Y, batch_size=12, epochs=3, verbose=0)
    layers[0].activity_regularizer.trainable = False
    before = alphas(layers)
    model.compile(optimizer, "mse")
    model.fit(X, Y, batch_size=12, epochs=3, verbose=0)
    np.testing.assert_array_equal(alphas(layers) != before, [False, True, True])


def test_a_base_that_is_thawed_trains_in_another_model():
    base_layers = chain()
    base = functional(base_layers)
    for layer in base_layers[:3]:
        layer.trainable = False
    base.compile("sgd", "mse")
    for layer in base_layers[:3]:
        layer.trainable = True
    model = LBEModel(base.input, keras.layers.Dense(2)(base.layers[-2].output))
    model.compile(optimizers.Adam(0.05), "mse")
    model.fit(X, Y, verbose=0)
    assert moved(base_layers).all()


def test_an_optimizer_that_was_built_before_does_not_decay_alphas():
    layers = chain([LBERegularizer(a, 0.25, 0.0) for a in ALPHAS])
    model = functional(layers)
    optimizer = optimizers.AdamW(1e-3, weight_decay=0.5)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, "mse")
    kernel = np.abs(layers[0].kernel.numpy()).sum()
    model.fit(X, Y, epochs=3, verbose=0)
    np.testing.assert_array_equal(alphas(layers), np.float32(ALPHAS))
    assert np.abs(layers[0].kernel.numpy()).sum() < kernel


def test_lbe_put_on_a_layer_of_a_model_that_is_there():
    layers, expected = chain(), chain()
    model = functional(layers)
    for each in (layers, expected):
        with_lbe(each[3], lbe_alpha=1.0, lbe_alpha_min=0.25, lbe_beta=0.5)
    model.compile(optimizers.Adam(0.05), "mse")
    assert len(model.trainable_variables) == 10
    model.fit(X, Y, batch_size=12, epochs=2, verbose=0)
    train_by_hand(expected, optimizers.Adam(0.05), 2)
    assert_same(weights(layers), weights(expected))


def test_a_graph_that_reads_an_alpha_keeps_it():
    layers = chain()
    plain = functional(layers, keras.Model)
    plain.compile("sgd", "mse")
    before = plain.evaluate(X, Y, verbose=0)
    kept = layers[0].activity_regularizer.lbe_alpha
    with pytest.warns(UserWarning, match="3 of 3 LBE layers are in the graph"):
        functional(layers)
    kept.assign(5.0)
    assert plain.evaluate(X, Y, verbose=0) > before + 1


def test_the_weight_is_one_after_a_block_was_built_symbolically():
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            regularizer = LBERegularizer()
            self.one = Dense_LBE(4)
            self.two = keras.layers.Dense(4, activity_regularizer=regularizer)

        def call(self, x, training=None):
            return self.two(self.one(x))

    inputs = keras.Input((5,))
    model = LBEModel(inputs, Block()(inputs, training=True))
    assert model.lbe_loss.alphas.shape == (2,)


def test_paths_of_weights_are_unique():
    inputs = keras.Input((4,))
    layers = chain()
    inner = LBEModel(inputs, layers[1](inputs))
    for model in (
        functional([layers[0], inner, layers[3]]),
        functional(chain(), keras.Model),
    ):
        paths = [v.path for v in model.trainable_variables]
        assert len(set(paths)) == len(paths)
        model.compile("sgd", "mse")
        assert model.get_state_tree()


def test_the_weight_is_frozen_as_any_weight():
    layers = chain()
    model = functional(layers)
    model.lbe_loss.trainable = False
    model.compile("adam", "mse")
    assert len(model.trainable_variables) == 8
    before = alphas(layers)
    model.fit(X, Y, verbose=0)
    np.testing.assert_array_equal(alphas(layers), before)

    model = functional(chain())
    model.lbe_loss.alphas.trainable = False
    model.compile("adam", "mse")
    assert len(model.trainable_variables) == 8


def test_models_that_share_layers_train_in_turn():
    """Two LBE models with different layers in common, and one without LBE's loss."""
    ours, theirs = chain(), chain()
    inputs = keras.Input((4,))
    models = [functional(ours)]
    models.append(LBEModel(inputs, ours[3](ours[2](ours[1](inputs)))))
    models.append(functional(ours, keras.Model))
    assert models[1].trainable_variables[-1] is models[0].lbe_loss.alphas
    states = [optimizers.Adam(0.05) for _ in models]
    for model in models:
        model.compile(optimizers.Adam(0.05), "mse")
    h = samples(12, 4, seed=2)
    for _ in range(3):
        models[0].train_on_batch(X, Y)
        train_by_hand(theirs, states[0], 1)
        assert_same(weights(ours), weights(theirs))
        first = alphas(ours)[0]
        models[1].train_on_batch(h, Y)
        train_by_hand(theirs[1:], states[1], 1, x=h)
        assert_same(weights(ours), weights(theirs))
        assert alphas(ours)[0] == first
        models[2].train_on_batch(X, Y)  # takes the alphas as they are
        plain = {"loss": lambda ce, lbe: ce + sum(lbe), "alphas_too": False}
        train_by_hand(theirs, states[2], 1, **plain)
        assert_same(weights(ours), weights(theirs))


def test_layers_that_a_plain_model_has_trained_keep_their_alphas():
    layers, expected = chain(), chain()
    plain = functional(layers, keras.Model)
    plain.compile(optimizers.Adam(0.05), "mse")
    plain.train_on_batch(X, Y)
    with pytest.warns(UserWarning, match="3 of 3 LBE layers are in the graph"):
        model = functional(layers)
    assert model.lbe_loss.alphas is None
    assert len(model.trainable_variables) == 8 + 3
    model.compile(optimizers.Adam(0.05), "mse")
    states = [optimizers.Adam(0.05), optimizers.Adam(0.05)]
    added = {"loss": lambda ce, lbe: ce + sum(lbe)}
    train_by_hand(expected, states[0], 1, **added)
    for _ in range(2):
        model.train_on_batch(X, Y)
        train_by_hand(expected, states[1], 1)
        plain.train_on_batch(X, Y)
        train_by_hand(expected, states[0], 1, **added)
        assert_same(weights(layers), weights(expected))


@pytest.mark.parametrize("inner", [LBEModel, keras.Model])
def test_nested_models_and_a_layer_called_twice(inner):
    layers, expected = chain(), chain()
    inputs = keras.Input((4,))
    nested = inner(inputs, layers[2](layers[1](inputs)))
    model = functional([layers[0], layers[1], nested, layers[3]])
    model.compile(optimizers.Adam(0.05), "mse")
    model.fit(X, Y, batch_size=12, epochs=4, verbose=0)
    called = [expected[i] for i in (0, 1, 1, 2, 3)]
    train_by_hand(called, optimizers.Adam(0.05), 4)
    assert_same(weights(layers), weights(expected))
    # An inner LBEModel keeps its alphas, and the outer one has the others.
    assert len(model.trainable_variables) == (10 if inner is LBEModel else 9)


def test_a_regularizer_shared_by_layers_and_models():
    def build():
        return chain([LBERegularizer(0.75, 0.25, 0.5)] * 3)

    layers, expected = build(), build()
    inputs = keras.Input((4,))
    models = [functional(layers), LBEModel(inputs, layers[3](layers[2](inputs)))]
    states = [optimizers.Adam(0.05) for _ in models]
    for model in models:
        model.compile(optimizers.Adam(0.05), "mse")
    h = samples(12, 4, seed=2)
    for _ in range(2):
        models[0].train_on_batch(X, Y)
        models[1].train_on_batch(h, Y)
        train_by_hand(expected, states[0], 1)
        train_by_hand(expected[2:], states[1], 1, x=h)
    assert_same(weights(layers), weights(expected))
    assert models[0].trainable_variables[-1].shape == (1,)


def test_a_layer_that_joins_later_keeps_its_alpha():
    layers, expected = chain(), chain()
    model = functional(layers[:3])
    model(X)
    assert model.lbe_loss.alphas.shape == (3,)
    for each in (layers, expected):
        with_lbe(each[3], lbe_alpha=1.0, lbe_alpha_min=0.25, lbe_beta=0.5)

    class Longer(LBEModel):
        def __init__(self):
            super().__init__()
            self.base = model

        def call(self, x):
            return self.more(self.base(x))

    longer = Longer()
    longer.lbe_loss.adopt()  # as if the model had been called before
    longer.more = layers[3]
    longer.compile(optimizers.Adam(0.05), "mse")
    longer.fit(X, Y, batch_size=12, epochs=2, verbose=0)
    train_by_hand(expected, optimizers.Adam(0.05), 2)
    assert_same(weights(layers), weights(expected))
    assert len(longer.trainable_variables) == 8 + 2


def test_a_model_made_by_add_lbe_and_its_original():
    dense = keras.layers.Dense(4, activation="tanh")
    plain = functional([dense, keras.layers.Dense(2)], keras.Model)
    model = add_lbe(plain, [dense.name], lbe_alpha=2.0)
    alpha = dense.activity_regularizer.lbe_alpha
    for each in (model, plain):
        each.compile("adam", "mse")
    for _ in range(2):
        before = float(alpha)
        model.fit(X, Y, verbose=0)
        assert float(alpha) != before
        before = float(alpha)
        with_its_lbe = plain.fit(X, Y, verbose=0).history["loss"][0]
        assert float(alpha) == before
        assert with_its_lbe > plain_loss(plain)


def plain_loss(model):
    return float(np.mean((model.predict(X, verbose=0) - Y) ** 2))


def test_lbe_on_a_built_layer_is_for_an_lbe_model():
    dense = keras.layers.Dense(4)
    plain = functional([dense, keras.layers.Dense(2)], keras.Model)
    with_lbe(dense)
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="was built before.*add_lbe"):
        plain.fit(X, Y, verbose=0)
    model = LBEModel(plain.input, plain.output)
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0)
    assert float(dense.activity_regularizer.lbe_alpha) != 1.0
    dense.trainable = False  # and its alpha
    model.compile("sgd", "mse")
    before = float(dense.activity_regularizer.lbe_alpha)
    model.fit(X, Y, verbose=0)
    assert float(dense.activity_regularizer.lbe_alpha) == before


def test_alphas_of_layers_that_the_model_does_not_track_stay_as_they_are():
    untracked = Dense_LBE(4, LBE_alpha=2.0)

    class Model(LBEModel):
        def __init__(self):
            super().__init__()
            self.tracked = Dense_LBE(4, LBE_alpha=1.0)

        def call(self, x):
            return self.tracked(untracked(x))[:, :2]

    model = Model()
    model.compile(optimizers.Adam(0.05), "mse")
    model.evaluate(X, Y, verbose=0)
    model.fit(X, Y, verbose=0)
    assert float(untracked.activity_regularizer.lbe_alpha) == 2.0
    assert float(model.tracked.activity_regularizer.lbe_alpha) != 1.0


def test_outputs_that_were_changed_in_a_recording():
    layers = chain()
    model = functional(layers)
    model.compile("sgd", "mse")
    expected = float(model.compute_loss(X, Y, model(X, training=True)))
    with recording():
        y_pred = model(X) + 0.0
        assert float(model.compute_loss(X, Y, y_pred)) == pytest.approx(expected)
        other = functional(chain())  # whose entropies are not this model's
        other(X)
        assert float(model.compute_loss(X, Y, y_pred)) == pytest.approx(expected)


def test_models_leave_nothing_behind():
    def make_and_train():
        model = functional(chain())
        model.compile("adam", "mse")
        model.fit(X, Y, verbose=0)
        y = model(X, training=True)
        return weakref.ref(model), weakref.ref(model.lbe_loss.alphas), y

    *references, y = make_and_train()
    assert y.shape == (12, 2)  # whose entropies keep the alphas, and not the model
    gc.collect()
    assert references[0]() is None
    del y
    gc.collect()
    assert references[1]() is None


# Files ---------------------------------------------------------------------------


def trained(epochs=3, model=LBEModel):
    net = functional(chain(), model)
    net.compile(optimizers.Adam(0.05), "mse")
    net.fit(X, Y, batch_size=12, epochs=epochs, verbose=0)
    return net


@pytest.mark.parametrize("how", ["keras", "h5", "checkpoint", "backup"])
def test_interrupted_training_goes_on_as_if_it_had_not_been(how, tmp_path):
    model = trained()
    if how == "keras":  # and the optimizer is built before the first step
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    else:
        loaded = trained(epochs=1)
        if how == "h5":
            model.save_weights(tmp_path / "model.weights.h5")
            loaded.load_weights(tmp_path / "model.weights.h5")
        elif how == "checkpoint":
            path = tf.train.Checkpoint(model).write(str(tmp_path / "checkpoint"))
            tf.train.Checkpoint(loaded).read(path).assert_existing_objects_matched()
        else:

            class Stop(keras.callbacks.Callback):
                def on_epoch_end(self, epoch, logs=None):
                    if epoch == 2:
                        raise KeyboardInterrupt

            def backup():
                return keras.callbacks.BackupAndRestore(tmp_path / "backup")

            model, loaded = trained(epochs=0), trained(epochs=0)
            with pytest.raises(KeyboardInterrupt):
                loaded.fit(X, Y, 12, 4, verbose=0, callbacks=[backup(), Stop()])
            loaded = trained(epochs=0)
            loaded.fit(X, Y, 12, 4, verbose=0, callbacks=[backup()])
            model.fit(X, Y, 12, 4, verbose=0)
            assert_same(loaded.get_weights(), model.get_weights(), rtol=1e-6)
            return
    assert_same(loaded.get_weights(), model.get_weights(), rtol=0)
    for each in (model, loaded):
        each.fit(X, Y, batch_size=12, epochs=3, verbose=0)
    assert_same(loaded.get_weights(), model.get_weights(), rtol=1e-6)


@pytest.mark.parametrize("how", ["arrays", "state tree"])
def test_weights_are_taken_out_and_put_back(how):
    model = trained()
    expected = model.get_weights()
    tree = model.get_state_tree("numpy_array")
    model.fit(X, Y, verbose=0)
    assert np.any(model.get_weights()[-1] != expected[-1])
    if how == "arrays":
        model.set_weights(expected)
    else:
        model.set_state_tree(tree)
    assert_same(model.get_weights(), expected, rtol=0)


def test_a_model_of_layers_of_another_one_is_saved_and_loaded(tmp_path):
    """Its alphas are kept in two weights, and in one when it is loaded."""
    base = trained()
    head = Dense_LBE(3, activation="tanh", LBE_alpha=0.5)
    x = head(base.layers[-2].output)
    model = LBEModel(base.input, keras.layers.Dense(2)(x))
    assert len(model.trainable_variables) == 2 * 5 + 2
    model.compile(optimizers.Adam(0.05), "mse")
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    with pytest.warns(
        UserWarning, match="for optimizer 'adam"
    ):  # whose state is of two
        keras.models.load_model(tmp_path / "model.keras")
    model.compile(optimizers.SGD(0.05), "mse")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    expected = [float(r.lbe_alpha) for r in model.lbe_regularizers]
    assert [float(r.lbe_alpha) for r in loaded.lbe_regularizers] == expected
    assert loaded.lbe_loss.alphas.shape == (4,)
    loaded.lbe_loss.alphas.assign(tf.zeros(4))
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert [float(r.lbe_alpha) for r in loaded.lbe_regularizers] == expected
    for each in (model, loaded):
        each.train_on_batch(X, Y)
    np.testing.assert_allclose(
        [float(r.lbe_alpha) for r in loaded.lbe_regularizers],
        [float(r.lbe_alpha) for r in model.lbe_regularizers],
        rtol=1e-6,
    )


@pytest.mark.parametrize("source", [LBEModel, keras.Model])
def test_plain_models_and_lbe_models_read_files_of_each_other(source, tmp_path):
    def net(model):
        layers = [Dense_LBE(4, name="hidden"), keras.layers.Dense(2, name="out")]
        return functional(layers, model), layers

    target = keras.Model if source is LBEModel else LBEModel
    (writer, layers), (reader, other) = net(source), net(target)
    layers[0].activity_regularizer.lbe_alpha.assign(2.0)
    writer.save_weights(tmp_path / "model.weights.h5")
    reader.load_weights(tmp_path / "model.weights.h5")
    assert_same(weights_of_layers(other), weights_of_layers(layers), rtol=0)
    assert float(other[0].activity_regularizer.lbe_alpha) == 2.0


def weights_of_layers(layers):
    return [w.numpy() for layer in layers for w in (layer.kernel, layer.bias)]


def test_a_file_without_alphas_is_an_error(tmp_path):
    """Keras leaves those of plain layers out of the weights files of a plain model."""
    functional(chain(), keras.Model).save_weights(tmp_path / "model.weights.h5")
    model = functional(chain())
    with pytest.raises(ValueError, match="No lbe_alpha for this"):
        model.load_weights(tmp_path / "model.weights.h5")
    model.lbe_net.load_weights(tmp_path / "model.weights.h5")  # has no LBE's loss


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("model", [LBEModel, keras.Model])
def test_a_model_that_diverged_is_saved_and_loaded_with_a_warning(
    model, value, tmp_path
):
    layers = chain()
    net = functional(layers, model)
    layers[1].activity_regularizer.lbe_alpha.assign(value)
    net.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="diverged"):
        loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(alphas(loaded.layers[1:]), alphas(layers))
    assert "NaN" not in net.to_json() and "Infinity" not in net.to_json()


# Devices and precision -------------------------------------------------------------


def test_mixed_float16_trains_alphas_as_float32_does():
    results = []
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        try:
            layers = chain()
            model = functional(layers)
        finally:
            keras.config.set_dtype_policy("float32")
        model.compile(optimizers.Adam(0.05), "mse")
        model.fit(X, Y, batch_size=12, epochs=6, verbose=0)
        results.append(alphas(layers))
        assert model.lbe_loss.alphas.dtype == "float32"
    np.testing.assert_allclose(*results, rtol=0.02)


REPLICAS = """
import sys
import keras, numpy as np, tensorflow as tf
from test_loss import X, Y, Late, alphas, chain, functional, optimizer_of, weights
count, kind, precision = int(sys.argv[1]), sys.argv[2], sys.argv[3]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * count
)
keras.config.set_dtype_policy(precision)
strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])
with strategy.scope():
    layers = chain()
    model = Late(lambda: layers) if kind == "late" else functional(layers)
    optimizer = optimizer_of(kind)
    if kind == "other losses":
        layers[0].kernel.regularizer = keras.regularizers.L2(0.1)
    model.compile(optimizer, "mse")
# Every replica gets the same samples, and so the same entropies as a single one.
x, y = np.tile(X, (count, 1)), np.tile(Y, (count, 1))
if kind == "loop":
    @tf.function
    def step(x, y):
        def one(x, y):
            with tf.GradientTape() as tape:
                loss = model.compute_loss(x, y, model(x, training=True))
            variables = model.trainable_variables
            model.optimizer.apply(tape.gradient(loss, variables), variables)
        strategy.run(one, args=(x, y))
    for _ in range(4):
        step(tf.constant(X), tf.constant(Y))
else:
    if kind == "frozen":
        layers[0].trainable = False
        model.compile(optimizer, "mse")
    model.fit(x, y, batch_size=12 * count, epochs=4, verbose=0, shuffle=False)
values = strategy.experimental_local_results(model.lbe_loss.alphas.value)
for value in values:
    np.testing.assert_array_equal(value, alphas(layers))
np.savez("weights.npz", *weights(layers))
"""


def optimizer_of(kind):
    if kind == "loop":  # Keras cannot make variables of optimizers in replicas
        return optimizers.SGD(0.1)
    if kind == "average":
        return OPTIMIZERS[kind]()
    return optimizers.Adam(0.05)


@pytest.mark.parametrize(
    ("count", "kind", "precision"),
    [
        (2, "functional", "float32"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (1, "functional", "float32"),
                (2, "late", "float32"),
                (2, "loop", "float32"),
                (2, "average", "float32"),
                (2, "frozen", "float32"),
                (2, "other losses", "float32"),
                (2, "functional", "mixed_float16"),
            )
        ),
    ],
)
def test_mirrored_replicas_train_as_one(count, kind, precision, tmp_path):
    folder = os.path.dirname(os.path.abspath(__file__))
    subprocess.run(
        [sys.executable, "-c", REPLICAS, str(count), kind, precision],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([folder, *(p for p in sys.path if p)]),
        },
        check=True,
    )
    expected = chain()
    if kind == "frozen":
        expected[0].trainable = False
    loss = lbe_model_loss
    if kind == "other losses":

        def loss(ce, lbe):
            l2 = 0.1 * tf.reduce_sum(tf.square(expected[0].kernel))
            return lbe_model_loss(ce, lbe) + l2

    train_by_hand(expected, optimizer_of(kind), 4, loss=loss)
    ours = list(np.load(tmp_path / "weights.npz").values())
    tolerance = 1e-4 if precision == "float32" else 0.05
    for one, other in zip(ours, weights(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
