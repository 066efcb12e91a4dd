# SPDX-License-Identifier: Apache-2.0
"""`LBEModel.LBE_strength` changes: numbers without a new trace, and schedules.

What a step is to have is computed from its logs: `loss = ce + strength * lbe`.
"""

import copy
import math
import pickle

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import logs_of_batch, require_xla, samples

from lbe_ops import Dense_LBE, LBEModel, LBERegularizer, add_lbe, native

# Keras reads a variable into NumPy 2 in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

X, Y = samples(24, 5), samples(24, 2, seed=1)
schedules = keras.optimizers.schedules
SCHEDULES = {
    "warm-up": schedules.PolynomialDecay(0.0, 4, 2.0),
    "cosine to zero": schedules.CosineDecay(1.5, 5),
    "off after three steps": schedules.PiecewiseConstantDecay([2], [0.5, 0.0]),
}


@pytest.fixture(autouse=True)
def same_weights():
    keras.utils.set_random_seed(1)


def build(strength=1.5, model=LBEModel):
    inputs = keras.Input((5,))
    x = Dense_LBE(4, activation="tanh", LBE_alpha=0.75)(inputs)
    regularizer = LBERegularizer(0.75)
    x = keras.layers.Dense(4, "relu", activity_regularizer=regularizer)(x)
    arguments = {"LBE_strength": strength} if model is LBEModel else {}
    return model(inputs, keras.layers.Dense(2)(x), **arguments)


class Counted(keras.losses.MeanSquaredError):
    """Counts how often it is traced."""

    traces = 0

    def call(self, y, y_pred):
        self.traces += 1
        return super().call(y, y_pred)


def strength_in(logs, prefix=""):
    loss, ce, lbe = (logs[f"{prefix}{name}"] for name in ("loss", "ce", "lbe"))
    assert lbe > 0.01
    return (loss - ce) / lbe


def by_hand(schedule, step):
    """Of the three above, in NumPy."""
    if schedule is SCHEDULES["warm-up"]:
        return 2.0 * min(step, 4) / 4
    if schedule is SCHEDULES["cosine to zero"]:
        return 1.5 * (1 + math.cos(math.pi * min(step, 5) / 5)) / 2
    return 0.5 if step <= 2 else 0.0


HOW = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "jit": {"jit_compile": True},
}


@pytest.fixture(params=HOW)
def how(request):
    if request.param == "jit" and not native.compiles():
        require_xla()
    return HOW[request.param]


def test_the_next_step_has_another_number_and_no_other_trace(how):
    model, loss = build(0.25), Counted()
    model.compile("sgd", loss, **how)
    for step in (model.train_on_batch, model.test_on_batch):
        assert strength_in(logs_of_batch(step, X, Y)) == pytest.approx(0.25, 1e-4)
    before = loss.traces
    for strength in (0.1, 0, np.float32(0.75), 2):
        model.LBE_strength = strength
        assert type(model.LBE_strength) is float
        assert model.LBE_strength == strength
        for step in (model.train_on_batch, model.test_on_batch):
            found = strength_in(logs_of_batch(step, X, Y))
            assert found == pytest.approx(float(strength), 1e-4, abs=1e-6)
    assert loss.traces == (before if "run_eagerly" not in how else before + 8)


class EachEpoch(keras.callbacks.Callback):
    def __init__(self, strengths):
        super().__init__()
        self.strengths = strengths

    def on_epoch_begin(self, epoch, logs=None):
        self.model.LBE_strength = self.strengths[epoch]


@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_a_callback_sets_it_in_each_epoch(steps_per_execution):
    strengths = [0.5, 0.0, 2.0, 0.1]
    model, loss = build(), Counted()
    model.compile("adam", loss, steps_per_execution=steps_per_execution)
    model.fit(X, Y, batch_size=8, validation_data=(X, Y), verbose=0)
    before = loss.traces
    logs = model.fit(
        *(X, Y),
        batch_size=8,
        epochs=4,
        validation_data=(X, Y),
        callbacks=[EachEpoch(strengths)],
        verbose=0,
    ).history
    assert loss.traces == before
    logs = {name: np.array(values) for name, values in logs.items()}
    for prefix in ("", "val_"):
        found = (logs[f"{prefix}loss"] - logs[f"{prefix}ce"]) / logs[f"{prefix}lbe"]
        np.testing.assert_allclose(found, strengths, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_the_iterations(name, how):
    schedule = SCHEDULES[name]
    model, loss = build(schedule), Counted()
    assert model.LBE_strength is schedule
    model.compile("sgd", loss, **how)
    traces = []
    for step in range(7):
        expected = pytest.approx(by_hand(schedule, step), 1e-4, abs=1e-5)
        for function in (model.test_on_batch, model.train_on_batch):
            assert strength_in(logs_of_batch(function, X, Y)) == expected
        traces.append(loss.traces)
    assert "run_eagerly" in how or len(set(traces[1:])) == 1


@pytest.mark.parametrize("accumulated", [None, 2])
def test_a_schedule_in_steps_of_one_execution(accumulated):
    """With gradients accumulated it counts updates, as `optimizer.iterations`."""
    model = build(SCHEDULES["warm-up"])
    sgd = keras.optimizers.SGD(0.0, gradient_accumulation_steps=accumulated)
    model.compile(sgd, "mse", steps_per_execution=3)
    logs = model.fit(X, Y, batch_size=4, shuffle=False, verbose=0).history
    logs = {name: value for name, (value,) in logs.items()}
    of_batches = [
        logs_of_batch(model.test_on_batch, X[i : i + 4], Y[i : i + 4])["lbe"]
        for i in range(0, 24, 4)
    ]
    strengths = [
        by_hand(SCHEDULES["warm-up"], step // (accumulated or 1)) for step in range(6)
    ]
    expected = np.mean(np.multiply(strengths, of_batches))
    assert logs["loss"] - logs["ce"] == pytest.approx(expected, rel=1e-4)


def test_numbers_and_schedules_after_one_another_in_one_training():
    chosen = [0.25, SCHEDULES["cosine to zero"], SCHEDULES["warm-up"], 0.125]
    model = build()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = model.fit(
        *(X, Y),
        batch_size=24,
        epochs=4,
        validation_data=(X, Y),
        callbacks=[EachEpoch(chosen)],
        verbose=0,
    ).history
    for prefix, later in (("", 0), ("val_", 1)):
        for epoch, strength in enumerate(chosen):
            of_epoch = {name: values[epoch] for name, values in logs.items()}
            if not isinstance(strength, float):
                strength = by_hand(strength, epoch + later)
            assert strength_in(of_epoch, prefix) == pytest.approx(strength, 1e-4)


def test_a_loop_of_ones_own():
    model = build(0.5)
    optimizer = keras.optimizers.Adam()
    model.compile(optimizer, "mse")
    traces = []

    @tf.function
    def step(x, y):
        traces.append(1)
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return {**model.get_metrics_result(), "loss": loss}

    optimizer.build(model.trainable_variables)
    for strength in (0.5, 0.0, 1.25):
        model.LBE_strength = strength
        model.reset_metrics()
        logs = {name: float(value) for name, value in step(X, Y).items()}
        assert strength_in(logs) == pytest.approx(strength, 1e-4, abs=1e-6)
    assert len(traces) == 1


def test_a_schedule_with_a_loss_scale():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = build(SCHEDULES["off after three steps"])
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(), initial_scale=8.0
    )
    model.compile(optimizer, "mse")
    found = [strength_in(logs_of_batch(model.train_on_batch, X, Y)) for _ in "12345"]
    assert found == pytest.approx([0.5, 0.5, 0.5, 0, 0], abs=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("strength", [0, schedules.PiecewiseConstantDecay([9], [0, 1])])
def test_strength_0_trains_to_the_numbers_of_a_plain_model(optimizer, strength):
    def trained(model_class):
        keras.utils.set_random_seed(3)
        inputs = keras.Input((5,))
        lbe = {"activity_regularizer": LBERegularizer()}
        x = inputs
        for _ in range(3):
            layer = keras.layers.Dense(
                8, "tanh", **lbe if model_class is LBEModel else {}
            )
            x = layer(x)
        arguments = {"LBE_strength": strength} if model_class is LBEModel else {}
        model = model_class(inputs, keras.layers.Dense(2)(x), **arguments)
        model.compile(optimizer, "mse")
        history = model.fit(X, Y, batch_size=8, epochs=3, shuffle=False, verbose=0)
        return model, history.history["loss"]

    (plain, expected), (model, found) = trained(keras.Model), trained(LBEModel)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    *weights, alphas = model.trainable_variables
    assert np.all(alphas.numpy() == 0.5)
    for one, other in zip(weights, plain.trainable_variables, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


class Own(schedules.LearningRateSchedule):
    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return self.value

    def __repr__(self):
        return f"Own({self.value})"


@pytest.mark.parametrize(
    ("value", "received"),
    [
        (-1.0, "-1.0"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ("1", "'1'"),
        (None, "None"),
        (abs, "<built-in function abs>"),
        (Own(-0.5), "Own(-0.5), which begins with -0.5"),
        (Own(math.nan), "Own(nan), which begins with nan"),
    ],
)
def test_what_is_no_strength_is_refused_and_changes_nothing(value, received):
    model = build(0.5)
    plain = build(model=keras.Model)
    for call in (
        lambda: setattr(model, "LBE_strength", value),
        lambda: build(value),
        lambda: add_lbe(plain, LBE_strength=value),
    ):
        with pytest.raises(ValueError, match="LearningRateSchedule") as error:
            call()
        assert str(error.value).endswith(f"Received: LBE_strength={received}")
    model.compile("sgd", "mse")
    assert model.LBE_strength == 0.5
    logs = logs_of_batch(model.train_on_batch, X, Y)
    assert strength_in(logs) == pytest.approx(0.5, 1e-4)
    assert plain.layers[-1].activity_regularizer is None


def test_a_schedule_needs_an_optimizer():
    model = build(SCHEDULES["warm-up"])
    model.compile(None, "mse")
    with pytest.raises(ValueError, match="no optimizer. Compile"):
        model.evaluate(X, Y, verbose=0)
    model.LBE_strength = 0.5
    logs = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert strength_in(logs) == pytest.approx(0.5, 1e-4)


def test_add_lbe_passes_a_schedule_on():
    plain = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    layers = keras.layers.Dense
    model = add_lbe(plain, layers, LBE_strength=SCHEDULES["warm-up"])
    assert model.LBE_strength is SCHEDULES["warm-up"]


@keras.saving.register_keras_serializable("test_strength")
class Subclassed(LBEModel):
    """Has a constructor, whose arguments Keras keeps by itself."""

    def __init__(self, units=4, **arguments):
        super().__init__(**arguments)
        self.hidden = Dense_LBE(units, activation="relu", LBE_alpha=0.75)
        self.out = keras.layers.Dense(2)

    def call(self, x):
        return self.out(self.hidden(x))


def subclassed(strength):
    model = Subclassed()
    model.LBE_strength = strength
    return model


COPIES = {
    "file": lambda model: None,  # see below
    "configuration": lambda model: type(model).from_config(model.get_config()),
    "clone": keras.models.clone_model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", [build, subclassed])
@pytest.mark.parametrize("strength", [0.3, SCHEDULES["cosine to zero"]])
def test_copies_and_files_have_the_present_strength(strength, kind, how, tmp_path):
    model = kind(0.7)
    model.compile("adam", "mse")
    model.fit(X, Y, verbose=0)
    model.LBE_strength = strength
    if how == "file":
        model.save(tmp_path / "first.keras")
        again = keras.models.load_model(tmp_path / "first.keras")
        again.save(tmp_path / "model.keras")  # what was loaded can be saved
        found = keras.models.load_model(tmp_path / "model.keras")
    else:
        found = COPIES[how](model)
    if isinstance(strength, float):
        assert found.LBE_strength == strength
    else:
        assert found.LBE_strength.get_config() == strength.get_config()
    if how in ("configuration", "clone"):
        found.compile("adam", "mse")
    else:  # it goes on where the other stopped
        expected = logs_of_batch(model.train_on_batch, X, Y)
        logs = logs_of_batch(found.train_on_batch, X, Y)
        assert logs == pytest.approx(expected, rel=1e-5)
    model.LBE_strength = 0.9  # of this one alone
    found.LBE_strength = 0.2
    logs = logs_of_batch(found.train_on_batch, X, Y)
    assert strength_in(logs) == pytest.approx(0.2, 1e-4)


def test_it_is_no_weight_and_in_no_file_of_weights(tmp_path):
    paths = []
    for strength in (0.5, SCHEDULES["warm-up"]):
        model = build(strength)
        model.compile("sgd", "mse")
        model.fit(X, Y, verbose=0)
        assert len(model.weights) == len(model.variables) == 7
        model.save_weights(tmp_path / "model.weights.h5")
        with h5py.File(tmp_path / "model.weights.h5") as file:
            file.visit(paths.append)
        checkpoint = tf.train.Checkpoint(model).write(str(tmp_path / "checkpoint"))
        paths += [name for name, _ in tf.train.list_variables(checkpoint)]
    assert paths and not [name for name in paths if "strength" in name.lower()]
    assert not [name for name in paths if "factor" in name.lower()]
