# SPDX-License-Identifier: Apache-2.0
"""Every `lbe_alpha` is a scalar, and an element of one vector: nobody can tell.

Expected values come from a training loop written out here, over the scalars.
"""

import collections
import os
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import require_xla, samples

from lbe_ops import (
    Dense_LBE,
    LBEModel,
    LBERegularizer,
    add_lbe,
    batch_entropy,
    native,
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


def functional(layers, model=LBEModel):
    inputs = keras.Input((5,))
    x = inputs
    for layer in layers:
        x = layer(x)
    return model(inputs, x)


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


def lbe_layers(layers):
    return [layer for layer in layers if layer.activity_regularizer]


def scalars(layers):
    return [layer.activity_regularizer.lbe_alpha for layer in lbe_layers(layers)]


def alphas(layers):
    return np.array([scalar.numpy() for scalar in scalars(layers)])


def weights(layers):
    return [w.numpy() for layer in layers for w in layer.weights]


def lbe_model_loss(ce, lbe):
    return ce + 1.5 * tf.reduce_mean(lbe) * ce


def train_by_hand(layers, optimizer, steps, x=X, loss=lbe_model_loss):
    """`fit` with the mean squared error, spelled out over the scalars."""
    build_all(layers, x)
    listed = [v for layer in layers for v in layer.trainable_variables]
    variables = list({id(variable): variable for variable in listed}.values())
    for _ in range(steps):
        with tf.GradientTape() as tape:
            activations, lbe = x, []
            for layer in layers:
                activations = layer(activations)
                regularizer = layer.activity_regularizer
                if regularizer:
                    target = tf.maximum(tf.abs(regularizer.lbe_alpha.value), 0.25)
                    entropy = batch_entropy(activations)
                    lbe.append(0.5 * tf.square(entropy - target))
            total = loss(tf.reduce_mean(tf.square(activations - Y)), lbe)
        optimizer.apply(tape.gradient(total, variables), variables)
    optimizer.finalize_variable_values(variables)


def build_all(layers, x):
    for layer in layers:
        x = layer(x)


def adamw():
    optimizer = keras.optimizers.AdamW(0.05, weight_decay=0.3)
    optimizer.exclude_from_weight_decay(var_names=["lbe_alpha"])
    return optimizer


OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "Adam": lambda: keras.optimizers.Adam(0.05),
    "global_clipnorm": lambda: keras.optimizers.Adam(0.05, global_clipnorm=0.05),
    "clipvalue": lambda: keras.optimizers.SGD(0.5, clipvalue=0.01),
    "AdamW": adamw,
    "RMSprop": lambda: keras.optimizers.RMSprop(0.05),
    "accumulation": lambda: keras.optimizers.Adam(0.1, gradient_accumulation_steps=2),
    "average": lambda: keras.optimizers.SGD(0.3, use_ema=True, ema_momentum=0.5),
    "overwrite": lambda: keras.optimizers.SGD(
        0.3, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
}


def assert_same(ours, expected, rtol=1e-5):
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-6)


def moved(layers):
    return np.abs(alphas(layers) - ALPHAS) > 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_scalars(name):
    layers, expected = chain(), chain()
    model = functional(layers)
    model.compile(OPTIMIZERS[name](), "mse")
    model.fit(X, Y, batch_size=12, epochs=6, verbose=0)
    train_by_hand(expected, OPTIMIZERS[name](), 6)
    assert_same(weights(layers), weights(expected), rtol=1e-4)
    assert moved(layers).all()


@pytest.mark.parametrize("how", ["eager", "jit", "several steps", "late", "own loop"])
def test_every_way_of_training_is_that_of_scalars(how):
    if how == "jit" and not native.compiles():
        require_xla()
    layers, expected = chain(), chain()
    model = Late(lambda: layers) if how == "late" else functional(layers)
    model.compile(
        keras.optimizers.Adam(0.05),
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
        train_by_hand(expected, keras.optimizers.SGD(0.05), 6)
    else:  # one batch
        model.fit(np.tile(X, (6, 1)), np.tile(Y, (6, 1)), 12, verbose=0, shuffle=False)
        train_by_hand(expected, keras.optimizers.Adam(0.05), 6)
    assert_same(weights(layers), weights(expected), rtol=1e-4)
    assert moved(layers).all()


def test_one_variable_for_the_optimizer_and_the_scalars_for_everyone_else():
    layers = chain()
    model = functional(layers)
    *others, vector = model.trainable_variables
    assert vector.shape == (3,)
    assert len(others) == 8
    assert model.trainable_weights == model.trainable_variables
    model.compile("adam", "mse")
    model.fit(X, Y, verbose=0)
    assert len(model.optimizer.variables) == 2 + 2 * 9
    assert vector is model.trainable_variables[-1]
    np.testing.assert_array_equal(vector, alphas(layers))
    shapes = [[(5, 4), (4,), ()], [(4, 4), (4,), ()], [(4, 4), (4,), ()]]
    assert [w.shape for w in model.get_weights()] == [*sum(shapes, []), (4, 2), (2,)]
    assert not any(variable is vector for variable in model.variables)
    assert [r.get_config()["lbe_alpha"] for r in model.lbe_regularizers] == [
        float(scalar.numpy()) for scalar in scalars(layers)
    ]


def test_the_training_graph_does_not_grow_with_lbe_layers():
    def operations(count, model, layer):
        inputs = keras.Input((5,))
        x = inputs
        for _ in range(count):
            x = layer(5, activation="relu")(x)
        net = model(inputs, x)
        net.compile("adam", "mse")
        step = tf.function(lambda x, y: net.train_step((x, y)), autograph=False)
        graph = step.get_concrete_function(tf.ones((6, 5)), tf.ones((6, 5))).graph
        return collections.Counter(op.type for op in graph.get_operations())

    def per_layer(*arguments):
        difference = operations(6, *arguments)
        difference.subtract(operations(2, *arguments))
        return {name: number / 4 for name, number in difference.items()}

    def dense_with_lbe(*args, **kwargs):
        return with_lbe(keras.layers.Dense(*args, **kwargs))

    without = per_layer(keras.Model, keras.layers.Dense)
    # Keras divides the loss that such a layer reports by the size of the batch.
    for layer, more in ((Dense_LBE, 0), (dense_with_lbe, 4)):
        lbe = per_layer(LBEModel, layer)
        for name in ("Sqrt", "AssignSubVariableOp", "AssignAddVariableOp", "Mul"):
            assert lbe[name] == without[name], name
        if native.load().ops is not None:
            assert sum(lbe.values()) <= sum(without.values()) + more


def test_assigned_values_are_used_in_the_next_step():
    layers, expected = chain(), chain()
    model = functional(layers)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    optimizer = keras.optimizers.Adam(0.05)
    for value in (0.9, 0.4):
        model.train_on_batch(X, Y)
        train_by_hand(expected, optimizer, 1)
        for each in (layers, expected):
            scalars(each)[1].assign(value)
    model.train_on_batch(X, Y)
    train_by_hand(expected, optimizer, 1)
    assert_same(weights(layers), weights(expected))


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_frozen_alpha_does_not_move_and_has_no_part_in_the_norm(eagerly, clip):
    layers, expected = chain(), chain()
    model = functional(layers)
    ours = keras.optimizers.Adam(0.05, global_clipnorm=clip)
    theirs = keras.optimizers.Adam(0.05, global_clipnorm=clip)
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


def test_a_model_with_all_alphas_frozen_has_no_vector():
    layers = chain([LBERegularizer(trainable=False) for _ in range(2)])
    model = functional(layers)
    assert len(model.trainable_variables) == 6
    model.compile("adam", "mse")
    before = alphas(layers)
    model.fit(X, Y, verbose=0)
    np.testing.assert_array_equal(alphas(layers), before)
    model.trainable = False
    assert model.trainable_variables == []


def test_models_that_share_layers_train_in_turn():
    """Two LBE models with different layers in common, and one without LBE's loss."""
    ours, theirs = chain(), chain()
    inputs = keras.Input((4,))
    short = LBEModel(inputs, ours[3](ours[2](ours[1](inputs))))
    models = [functional(ours), short, functional(ours, keras.Model)]
    optimizers = [keras.optimizers.Adam(0.05) for _ in models]
    for model in models:
        model.compile(keras.optimizers.Adam(0.05), "mse")
    h = samples(12, 4, seed=2)
    for _ in range(3):
        models[0].train_on_batch(X, Y)
        train_by_hand(theirs, optimizers[0], 1)
        assert_same(weights(ours), weights(theirs))
        first = scalars(ours)[0].numpy()
        models[1].train_on_batch(h, Y)
        train_by_hand(theirs[1:], optimizers[1], 1, x=h)
        assert_same(weights(ours), weights(theirs))
        assert scalars(ours)[0].numpy() == first
        models[2].train_on_batch(X, Y)
        train_by_hand(theirs, optimizers[2], 1, loss=lambda ce, lbe: ce + sum(lbe))
        assert_same(weights(ours), weights(theirs))


@pytest.mark.parametrize("inner", [LBEModel, keras.Model])
def test_nested_models_and_a_layer_called_twice(inner):
    layers, expected = chain(), chain()
    inputs = keras.Input((4,))
    nested = inner(inputs, layers[2](layers[1](inputs)))
    assert nested.trainable_variables  # its own vector is not the outer model's
    model = functional([layers[0], layers[1], nested, layers[3]])
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(X, Y, batch_size=12, epochs=4, verbose=0)
    called = [expected[i] for i in (0, 1, 1, 2, 3)]
    train_by_hand(called, keras.optimizers.Adam(0.05), 4)
    assert_same(weights(layers), weights(expected))
    assert len(model.trainable_variables) == 9


def test_a_regularizer_shared_by_layers_and_models():
    def build():
        return chain([LBERegularizer(0.75, 0.25, 0.5)] * 3)

    layers, expected = build(), build()
    inputs = keras.Input((4,))
    models = [functional(layers), LBEModel(inputs, layers[3](layers[2](inputs)))]
    optimizers = [keras.optimizers.Adam(0.05) for _ in models]
    for model in models:
        model.compile(keras.optimizers.Adam(0.05), "mse")
    h = samples(12, 4, seed=2)
    for _ in range(2):
        models[0].train_on_batch(X, Y)
        models[1].train_on_batch(h, Y)
        train_by_hand(expected, optimizers[0], 1)
        train_by_hand(expected[2:], optimizers[1], 1, x=h)
    assert_same(weights(layers), weights(expected))
    assert models[0].trainable_variables[-1].shape == (1,)


def test_lbe_put_on_a_layer_after_a_look_at_the_variables():
    layers, expected = chain(), chain()
    model = functional(layers)
    assert model.trainable_variables[-1].shape == (3,)
    for each in (layers, expected):
        with_lbe(each[3], lbe_alpha=1.0, lbe_alpha_min=0.25, lbe_beta=0.5)
    assert model.trainable_variables[-1].shape == (4,)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(X, Y, batch_size=12, epochs=2, verbose=0)
    train_by_hand(expected, keras.optimizers.Adam(0.05), 2)
    assert_same(weights(layers), weights(expected))


def test_a_model_made_by_add_lbe_and_its_original_train_in_turn():
    dense = keras.layers.Dense(4, activation="tanh")
    plain = functional([dense, keras.layers.Dense(2)], keras.Model)
    model = add_lbe(plain, [dense.name], lbe_alpha=2.0)
    alpha = dense.activity_regularizer.lbe_alpha
    values = [alpha.numpy()]
    for each in (model, plain):
        each.compile("adam", "mse")
    for _ in range(2):
        for each in (model, plain):
            each.fit(X, Y, verbose=0)
            values.append(alpha.numpy())
    assert len(set(map(float, values))) == 5


# Scalars that have moved into the vector ------------------------------------------


def captured_scalars(model):
    """How many scalars a training step of the model reads or writes."""
    step = tf.function(lambda x, y: model.train_step((x, y)), autograph=False)
    graph = step.get_concrete_function(tf.constant(X), tf.constant(Y)).graph
    captured = {id(tensor) for tensor, _ in graph.captures}
    return sum(id(r.lbe_alpha.value.handle) in captured for r in model.lbe_regularizers)


def test_a_training_step_does_not_touch_the_scalars():
    model = functional(chain())
    model.compile("adam", "mse")
    assert captured_scalars(model) == 0
    model.evaluate(X, Y, verbose=0)
    assert captured_scalars(model) == 0


def stepping(model, jit=False):
    """A step in a graph of its own, with nothing of Keras' around it."""

    @tf.function(autograph=False, jit_compile=jit)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        variables = model.trainable_variables
        model.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.optimizer.build(model.trainable_variables)
    return lambda: step(tf.constant(X), tf.constant(Y))


WRITES = {
    "keras": lambda v: v.assign(0.9),
    "assign": lambda v: v.value.assign(0.9),
    "assign_add": lambda v: v.value.assign_add(0.9 - v.value),
    "assign_sub": lambda v: v.value.assign_sub(v.value - 0.9),
    "chained": lambda v: v.value.assign(0.5).assign_add(0.4),
    "in a graph": lambda v: tf.function(lambda: v.assign(0.9), autograph=False)(),
}


@pytest.mark.parametrize("how", [*WRITES, "restored"])
def test_every_way_to_write_a_scalar_reaches_the_next_step(how, tmp_path):
    layers, expected = chain(), chain()
    step = stepping(functional(layers))
    optimizer = keras.optimizers.Adam(0.05)
    step()
    train_by_hand(expected, optimizer, 1)
    scalar = scalars(layers)[1]
    if how == "restored":
        value = scalar.numpy()
        scalar.assign(0.9)
        file = tf.train.Checkpoint(v=scalar).write(str(tmp_path / "alpha"))
        scalar.assign(value)
        tf.train.Checkpoint(v=scalar).read(file).assert_consumed()
    else:
        WRITES[how](scalar)
    assert scalar.numpy() == np.float32(0.9)
    scalars(expected)[1].assign(0.9)
    step()
    train_by_hand(expected, optimizer, 1)
    assert_same(weights(layers), weights(expected))


def test_every_way_to_read_a_scalar_sees_the_last_step(tmp_path):
    layers = chain()
    model = functional(layers)
    step = stepping(model)
    scalar = scalars(layers)[1]
    inner = scalar.value  # a tf.Variable that somebody has kept

    @tf.function(autograph=False)
    def read():
        return scalar + 0.0

    seen = [scalar.numpy()]
    step()
    for read_it in (
        lambda: model.trainable_variables[-1].numpy()[1],
        scalar.numpy,
        inner.numpy,
        lambda: inner.read_value().numpy(),
        lambda: tf.convert_to_tensor(scalar).numpy(),
        lambda: float(scalar + 0.0),
        lambda: read().numpy(),
        lambda: model.get_weights()[5],
        lambda: layers[1].activity_regularizer.get_config()["lbe_alpha"],
        lambda: tf.raw_ops.ReadVariableOp(resource=inner.handle, dtype=tf.float32),
        lambda: tf.train.load_variable(
            tf.train.Checkpoint(v=scalar).write(str(tmp_path / "alpha")),
            "v/.ATTRIBUTES/VARIABLE_VALUE",
        ),
    ):
        step()
        ours = np.float32(read_it())
        assert ours == np.float32(model.trainable_variables[-1].numpy()[1])
        seen.append(ours)
    assert len(set(map(float, seen))) == len(seen)


@pytest.mark.parametrize("before", [False, True])
def test_a_graph_that_reads_and_writes_a_scalar_around_a_step(before):
    """Before the scalar has moved, so that it never does, or afterwards."""
    layers, expected = chain(), chain()
    model = functional(layers)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    scalar = scalars(layers)[1]
    if not before:
        model.train_on_batch(X, Y)

    @tf.function(autograph=False)
    def around(x, y):
        scalar.assign(scalar + 0.25)
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        at_first = scalar + 0.0
        variables = model.trainable_variables
        model.optimizer.apply(tape.gradient(loss, variables), variables)
        return at_first, scalar + 0.0

    model.optimizer.build(model.trainable_variables)
    ours = around(tf.constant(X), tf.constant(Y))
    optimizer = keras.optimizers.Adam(0.05)
    if not before:
        train_by_hand(expected, optimizer, 1)
    other = scalars(expected)[1]
    other.assign(other + 0.25)
    value = other.numpy()
    train_by_hand(expected, optimizer, 1)
    np.testing.assert_allclose(ours, [value, other.numpy()], rtol=1e-5)
    assert_same(weights(layers), weights(expected))
    assert captured_scalars(model) == int(before)


def test_the_vector_is_read_and_written_before_the_first_step():
    layers = chain()
    model = functional(layers)
    vector = model.trainable_variables[-1]
    np.testing.assert_array_equal(vector.numpy(), np.float32(ALPHAS))
    vector.assign([0.25, 0.5, 1.0])
    np.testing.assert_array_equal(alphas(layers), [0.25, 0.5, 1.0])
    scalars(layers)[1].assign(2.0)
    vector = model.trainable_variables[-1]
    np.testing.assert_array_equal(vector.numpy(), [0.25, 2.0, 1.0])


def test_a_snapshot_of_the_trainable_variables_restores_frozen_alphas_too():
    layers = chain()
    model = functional(layers)
    step = stepping(model)
    step()
    snapshot = [variable.numpy() for variable in model.trainable_variables]
    step()
    layers[0].activity_regularizer.trainable = False
    for variable, value in zip(model.trainable_variables, snapshot, strict=True):
        variable.assign(value)
    np.testing.assert_array_equal(alphas(layers), snapshot[-1])


def test_alphas_of_layers_that_the_model_does_not_track_stay_as_they_are():
    untracked = Dense_LBE(4, LBE_alpha=2.0)

    class Model(LBEModel):
        def __init__(self):
            super().__init__()
            self.tracked = Dense_LBE(4, LBE_alpha=1.0)

        def call(self, x):
            return self.tracked(untracked(x))[:, :2]

    model = Model()
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.evaluate(X, Y, verbose=0)
    model.fit(X, Y, verbose=0)
    assert untracked.activity_regularizer.lbe_alpha.numpy() == 2.0
    assert model.tracked.activity_regularizer.lbe_alpha.numpy() != 1.0


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("first", [LBEModel, keras.Model])
def test_graphs_of_two_models_that_share_layers(first, jit):
    """The plain one has scalars in its graph, traced before or after they moved."""
    layers, expected = chain(), chain()
    lbe, plain = functional(layers), functional(layers, keras.Model)
    order = [lbe, plain] if first is LBEModel else [plain, lbe]
    if jit and not native.compiles():
        require_xla()
    steps = [stepping(model, jit) for model in order]
    optimizers = [keras.optimizers.Adam(0.05) for _ in order]
    for _ in range(3):
        for model, step, optimizer in zip(order, steps, optimizers, strict=True):
            step()
            loss = lbe_model_loss if model is lbe else (lambda ce, lbe: ce + sum(lbe))
            train_by_hand(expected, optimizer, 1, loss=loss)
            assert_same(weights(layers), weights(expected))


# Files ---------------------------------------------------------------------------


def trained(epochs=3, model=LBEModel):
    net = functional(chain(), model)
    net.compile(keras.optimizers.Adam(0.05), "mse")
    net.fit(X, Y, batch_size=12, epochs=epochs, verbose=0)
    return net


def datasets(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item.shape})
                if isinstance(item, h5py.Dataset) and "optimizer" not in name
                else None
            )
        )
    return found


@pytest.mark.parametrize("how", ["keras", "h5", "checkpoint"])
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
        else:
            path = tf.train.Checkpoint(model).write(str(tmp_path / "checkpoint"))
            tf.train.Checkpoint(loaded).read(path).assert_existing_objects_matched()
    assert_same(loaded.get_weights(), model.get_weights(), rtol=0)
    for each in (model, loaded):
        each.fit(X, Y, batch_size=12, epochs=3, verbose=0)
    assert_same(loaded.get_weights(), model.get_weights(), rtol=1e-6)


@pytest.mark.parametrize("how", ["h5", "checkpoint", "arrays", "state tree"])
@pytest.mark.parametrize("written_by", [LBEModel, keras.Model])
def test_plain_models_and_lbe_models_write_the_same_weights(how, written_by, tmp_path):
    """A plain model knows of scalars only."""
    read_by = keras.Model if written_by is LBEModel else LBEModel
    source, target = trained(model=written_by), functional(chain(), read_by)
    path = str(tmp_path / "model.weights.h5")
    if how == "h5":
        source.save_weights(path)
        target.load_weights(path)
        target.save_weights(str(tmp_path / "again.weights.h5"))
        assert datasets(path) == datasets(str(tmp_path / "again.weights.h5"))
    elif how == "checkpoint":
        path = tf.train.Checkpoint(source).write(path)
        status = tf.train.Checkpoint(target).read(path)
        status.assert_existing_objects_matched().expect_partial()
    elif how == "arrays":
        target.set_weights(source.get_weights())
    else:
        target.compile("adam", "mse")
        trees = [each.get_state_tree("numpy_array") for each in (source, target)]
        assert all(
            "lbe_alphas" not in str(tree["trainable_variables"]) for tree in trees
        )
        values = [keras.tree.flatten(tree["trainable_variables"]) for tree in trees]
        assert [v.shape for v in values[0]] == [v.shape for v in values[1]]
        np.testing.assert_equal(source.get_state_tree("numpy_array"), trees[0])
        return
    assert_same(target.get_weights(), source.get_weights(), rtol=0)


def test_a_state_tree_is_restored():
    model = trained()
    tree = model.get_state_tree("numpy_array")
    expected = model.get_weights()
    model.fit(X, Y, verbose=0)
    model.set_state_tree(tree)
    assert_same(model.get_weights(), expected, rtol=0)


def test_a_checkpoint_from_before_the_first_step_restores_alphas(tmp_path):
    layers = chain()
    model = functional(layers)
    step = stepping(model)  # with an optimizer, which knows the vector already
    path = tf.train.Checkpoint(model).write(str(tmp_path / "checkpoint"))
    step()
    assert moved(layers).all()
    tf.train.Checkpoint(model).read(path).assert_existing_objects_matched()
    np.testing.assert_array_equal(alphas(layers), np.float32(ALPHAS))


def test_files_hold_nothing_of_the_vector(tmp_path):
    model = trained()
    path = str(tmp_path / "model.weights.h5")
    model.save_weights(path)
    shapes = [shape for name, shape in datasets(path).items() if "regularizer" in name]
    assert shapes == [()] * 3


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
        model.compile(keras.optimizers.Adam(0.05), "mse")
        model.fit(X, Y, batch_size=12, epochs=6, verbose=0)
        results.append(alphas(layers))
        assert model.trainable_variables[-1].dtype == "float32"
    np.testing.assert_allclose(*results, rtol=0.02)


REPLICAS = """
import sys
import keras, numpy as np, tensorflow as tf
from test_alphas import X, Y, Late, alphas, chain, functional, optimizer_of, weights
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
    model.fit(x, y, batch_size=12 * count, epochs=4, verbose=0, shuffle=False)
for regularizer, alpha in zip(model.lbe_regularizers, alphas(layers)):
    values = strategy.experimental_local_results(regularizer.lbe_alpha.value)
    assert [float(value) for value in values] == [alpha] * count
np.savez("weights.npz", *weights(layers))
"""


def optimizer_of(kind):
    if kind == "loop":  # Keras cannot make variables of optimizers in replicas
        return keras.optimizers.SGD(0.1)
    if kind == "average":
        return OPTIMIZERS[kind]()
    return keras.optimizers.Adam(0.05)


@pytest.mark.parametrize(
    ("count", "kind", "precision"),
    [
        (1, "functional", "float32"),
        (2, "functional", "float32"),
        (2, "late", "float32"),
        (2, "loop", "float32"),
        (2, "average", "float32"),
        (2, "functional", "mixed_float16"),
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
    train_by_hand(expected, optimizer_of(kind), 4)
    ours = list(np.load(tmp_path / "weights.npz").values())
    tolerance = 1e-4 if precision == "float32" else 0.05
    for one, other in zip(ours, weights(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
