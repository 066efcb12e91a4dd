# SPDX-License-Identifier: Apache-2.0
"""`LBEModel`: the loss and its gradient, what it logs, where LBE is and is not.

The compiled loss is computed by hand or by a plain Keras model with the same weights,
the entropies by float64 NumPy.
"""

import os
import subprocess
import sys
import threading

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import require_xla, run_script, samples

from lbe_ops import LBE, Dense_LBE, LBEModel, LBERegularizer, native, with_lbe

# Keras reads a variable into NumPy 2 in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

SETTING = {"LBE_alpha": 0.75, "LBE_alpha_min": 0.25, "LBE_beta": 0.5}


X, Y = samples(12, 5), samples(12, 2, seed=1)


def hidden_layers(count=2, **arguments):
    return [
        Dense_LBE(4, activation="tanh", **{**SETTING, **arguments})
        for _ in range(count)
    ]


def build(layers, strength=1.5, model=LBEModel, outputs=None, **arguments):
    """Inputs through `layers` and a plain Dense."""
    inputs = keras.Input((5,))
    x = inputs
    for layer in layers:
        x = layer(x)
    outputs = keras.layers.Dense(2)(x)
    if model is LBEModel:
        arguments["LBE_strength"] = strength
    return model(inputs, outputs, **arguments)


class Subclassed(LBEModel):
    """No `training` argument in `call`."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        # tf.train.Checkpoint does not look into Keras' lists of layers.
        self.first, self.second = hidden_layers()
        self.out = keras.layers.Dense(2)

    def call(self, x):
        return self.out(self.second(self.first(x)))


def expected_logs(model, layers, x=X, y=Y, strength=1.5):
    """By hand, for a chain of layers and the mean squared error."""
    lbe = []
    activations = x
    for layer in layers:
        activations = layer(activations).numpy()
        lbe.append(oracle.lbe(activations, float(layer.activity_regularizer.target)))
    y_pred = model.predict(x, verbose=0).astype(np.float64)
    ce = np.mean((y_pred - y) ** 2)
    return {
        "ce": ce,
        "lbe": np.mean(lbe) * ce,
        "max_lbe": np.max(lbe) * ce,
        "loss": ce * (1 + strength * np.mean(lbe)),
    }


def assert_logs(logs, expected):
    for name, value in expected.items():
        assert logs[name] == pytest.approx(value, rel=2e-5), name


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
@pytest.mark.parametrize("how", ["eager", "graph", "jit"])
def test_loss_and_logs(kind, how):
    if how == "jit" and not native.compiles():
        require_xla()
    if kind == "functional":
        layers = hidden_layers()
        model = build(layers)
    else:
        model = Subclassed()
        layers = [model.first, model.second]
    model.compile(
        keras.optimizers.SGD(0.0),
        "mse",
        metrics=["mae"],
        run_eagerly=how == "eager",
        jit_compile=how == "jit",
    )
    logs = model.fit(
        X, Y, batch_size=12, validation_data=(X[:6], Y[:6]), verbose=0
    ).history
    logs = {name: value for name, (value,) in logs.items()}
    assert_logs(logs, expected_logs(model, layers))
    expected = expected_logs(model, layers, X[:6], Y[:6])
    assert_logs(logs, {f"val_{name}": value for name, value in expected.items()})
    mae = np.abs(model.predict(X, verbose=0) - Y).mean()
    assert logs["mae"] == pytest.approx(mae, rel=1e-5)


def test_gradient_against_finite_differences():
    layers = hidden_layers(dtype="float64")
    inputs = keras.Input((5,), dtype="float64")
    outputs = keras.layers.Dense(2, dtype="float64")(layers[1](layers[0](inputs)))
    model = LBEModel(inputs, outputs, LBE_strength=0.7)
    loss = keras.losses.MeanSquaredError(dtype="float64")
    model.compile(keras.optimizers.SGD(0.1), loss)
    x, y = X.astype(np.float64), Y.astype(np.float64)

    def by_hand(weights):
        (k1, b1), (k2, b2), (k3, b3), alphas = weights
        h1 = np.tanh(x @ k1 + b1)
        h2 = np.tanh(h1 @ k2 + b2)
        ce = np.mean((h2 @ k3 + b3 - y) ** 2)
        lbe = np.mean([oracle.lbe(h, a) for h, a in zip((h1, h2), alphas, strict=True)])
        return ce * (1 + 0.7 * lbe)

    def weights():
        pairs = [[w.numpy() for w in layer.weights[:2]] for layer in model.layers[1:]]
        alphas = np.array([r.lbe_alpha.numpy() for r in model.lbe_regularizers])
        return [*pairs, alphas.astype(np.float64)]

    before = weights()
    model.train_on_batch(x, y)
    after = weights()
    for group in range(3):
        for which in range(2):
            expected = np.zeros_like(before[group][which])
            for index in np.ndindex(*expected.shape):
                shifted = []
                for step in (1e-6, -1e-6):
                    changed = [[w.copy() for w in pair] for pair in before[:3]]
                    changed[group][which][index] += step
                    shifted.append(by_hand([*changed, before[3]]))
                expected[index] = (shifted[0] - shifted[1]) / 2e-6
            gradient = (before[group][which] - after[group][which]) / 0.1
            np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)
    for layer in range(2):
        step = np.eye(2)[layer] * 1e-6
        slope = (
            by_hand([*before[:3], before[3] + step])
            - by_hand([*before[:3], before[3] - step])
        ) / 2e-6
        gradient = (before[3] - after[3])[layer] / 0.1
        assert gradient == pytest.approx(slope, abs=2e-6)  # alpha is float32
        assert gradient != 0


def test_several_outputs_weights_sample_weights_and_other_losses():
    inputs = keras.Input((5,))
    regularized = keras.layers.Dense(
        6,
        kernel_regularizer=keras.regularizers.L2(0.1),
        activity_regularizer=LBERegularizer(0.75, 0.25, 0.5, "l1"),
    )
    x = regularized(inputs)
    outputs = {
        "a": keras.layers.Dense(2, name="a")(x),
        "b": keras.layers.Dense(3, activation="softmax", name="b")(x),
    }
    model = LBEModel(inputs, outputs, LBE_strength=0.7)
    plain = keras.Model(inputs, outputs)
    compiled = {
        "loss": {"a": "mse", "b": "sparse_categorical_crossentropy"},
        "loss_weights": {"a": 0.3, "b": 2.0},
        "metrics": {"b": ["accuracy"]},
    }
    model.compile(keras.optimizers.SGD(0.0), **compiled)
    y = {"a": Y, "b": np.arange(12) % 3}
    weights = {"a": np.linspace(0, 1, 12), "b": np.linspace(2, 1, 12)}
    logs = model.train_on_batch(X, y, sample_weight=weights, return_dict=True)

    hidden = regularized(X)
    lbe = oracle.lbe(hidden)
    l1 = 0.01 * np.abs(hidden).sum(dtype=np.float64)
    if tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 14):
        l1 /= len(X)
    others = l1 + 0.1 * np.square(regularized.kernel.numpy(), dtype=np.float64).sum()
    regularized.activity_regularizer = None
    regularized.kernel.regularizer = None
    plain.compile(keras.optimizers.SGD(0.0), **compiled)
    ce = plain.test_on_batch(X, y, sample_weight=weights, return_dict=True)["loss"]
    assert logs["ce"] == pytest.approx(ce, rel=1e-5)
    assert logs["lbe"] == pytest.approx(ce * lbe, rel=1e-5)
    assert logs["loss"] == pytest.approx(ce * (1 + 0.7 * lbe) + others, rel=1e-5)
    assert "b_accuracy" in logs


def test_several_steps_per_execution():
    layers = hidden_layers()
    model = build(layers)
    model.compile(keras.optimizers.SGD(0.0), "mse", steps_per_execution=3)
    logs = model.fit(X, Y, batch_size=4, shuffle=False, verbose=0).history
    batches = [
        expected_logs(model, layers, X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)
    ]
    for name in batches[0]:
        mean = np.mean([batch[name] for batch in batches])
        assert logs[name][0] == pytest.approx(mean, rel=2e-5), name


def test_a_last_batch_of_one_sample_adds_no_lbe():
    layers = hidden_layers()
    model = build(layers)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = model.fit(X[:9], Y[:9], batch_size=8, shuffle=False, verbose=0).history
    full = expected_logs(model, layers, X[:8], Y[:8])
    last = np.mean((model.predict(X[8:9], verbose=0) - Y[8:9]) ** 2)
    assert logs["loss"][0] == pytest.approx((8 * full["loss"] + last) / 9, rel=2e-5)
    assert logs["lbe"][0] == pytest.approx(8 * full["lbe"] / 9, rel=2e-5)
    logs = model.evaluate(X[:9], Y[:9], batch_size=8, return_dict=True, verbose=0)
    assert logs["loss"] == pytest.approx((8 * full["loss"] + last) / 9, rel=2e-5)
    assert logs["ce"] == pytest.approx((8 * full["ce"] + last) / 9, rel=2e-5)
    assert logs["lbe"] == pytest.approx(8 * full["lbe"] / 9, rel=2e-5)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(X[:1], Y[:1])
    assert all(np.isfinite(weight.numpy()).all() for weight in model.weights)


@pytest.mark.parametrize("inner", [LBEModel, keras.Model])
def test_nested_models_count_every_layer_once(inner):
    layers = hidden_layers(3)
    nested_inputs = keras.Input((4,))
    arguments = {"LBE_strength": 100.0} if inner is LBEModel else {}
    nested = inner(nested_inputs, layers[1](nested_inputs), **arguments)
    model = build([layers[0], nested, layers[2]])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = model.train_on_batch(X, Y, return_dict=True)
    assert_logs(logs, expected_logs(model, layers))
    assert len(model.lbe_regularizers) == 3


def test_an_lbe_model_inside_a_plain_model_adds_its_lbe():
    layers = hidden_layers(1)
    inputs = keras.Input((5,))
    nested = LBEModel(inputs, layers[0](inputs))
    model = build([nested], model=keras.Model)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = model.train_on_batch(X, Y, return_dict=True)
    expected = expected_logs(model, layers)["ce"] + oracle.lbe(layers[0](X))
    assert logs == {"loss": pytest.approx(expected, rel=1e-5)}


def test_a_layer_called_twice_counts_twice():
    first, twice = hidden_layers()
    model = build([first, twice, twice])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = model.train_on_batch(X, Y, return_dict=True)
    assert_logs(logs, expected_logs(model, [first, twice, twice]))
    assert len(model.lbe_regularizers) == 2


def test_without_lbe_layers_it_is_plain_training():
    model = build([keras.layers.Dense(4)])
    with pytest.warns(UserWarning, match="No layer of .* has LBE"):
        model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = model.train_on_batch(X, Y, return_dict=True)
    ce = np.mean((model.predict(X, verbose=0) - Y) ** 2)
    expected = {"loss": ce, "ce": ce, "lbe": 0, "max_lbe": 0}
    assert logs == {name: pytest.approx(v, rel=1e-5) for name, v in expected.items()}


@pytest.mark.parametrize("function", [False, True])
def test_custom_loop(function):
    layers = hidden_layers()
    model = build(layers)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    variables = model.trainable_variables

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        model.optimizer.apply(gradients, variables)
        return loss

    step = tf.function(step) if function else step
    for _ in range(3):
        expected = expected_logs(model, layers)["loss"]
        before = [float(r.lbe_alpha.value) for r in model.lbe_regularizers]
        assert float(step(X, Y)) == pytest.approx(expected, rel=2e-5)
    after = [float(r.lbe_alpha.value) for r in model.lbe_regularizers]
    assert all(a != b for a, b in zip(after, before, strict=True))


def test_each_output_brings_the_entropies_of_its_own_forward_pass():
    layers = hidden_layers()
    model = build(layers)
    model.compile("sgd", "mse")
    batches = [(X, Y), (X[:5], Y[:5])]
    outputs = [model(x, training=True) for x, _ in batches]
    for (x, y), y_pred in zip(batches, outputs, strict=True):
        expected = expected_logs(model, layers, x, y)["loss"]
        loss = model.compute_loss(x, y, y_pred)
        assert float(loss) == pytest.approx(expected, rel=2e-5)


def test_an_output_that_was_changed_is_an_error_and_not_a_stale_record():
    model = build(hidden_layers())
    model.compile("sgd", "mse")
    y_pred = model(X, training=True)
    with pytest.raises(ValueError, match="y_pred as the model returned it"):
        model.compute_loss(X, Y, y_pred + 0.0)


def test_the_output_of_another_model_is_an_error():
    model, other = build(hidden_layers()), build(hidden_layers())
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="y_pred as the model returned it"):
        model.compute_loss(X, Y, other(X, training=True))


def test_an_input_that_is_an_output_carries_no_record():
    inputs = keras.Input((5,))
    (layer,) = hidden_layers(1)
    model = LBEModel(inputs, [inputs, layer(inputs)])
    model.compile("sgd", ["mse", "mse"])
    x = tf.constant(X)
    outputs = model(x, training=True)
    assert not hasattr(x, "_lbe_recording")
    assert float(model.compute_loss(x, [x, tf.zeros((12, 4))], outputs)) > 0
    with pytest.raises(ValueError, match="y_pred as the model returned it"):
        model.compute_loss(x, [x, x], [x, x])


def test_inference_has_no_lbe():
    model = build(hidden_layers())
    model.compile("sgd", "mse")
    ce = np.mean((model.predict(X, verbose=0) - Y) ** 2)
    for arguments in ({}, {"training": False}):
        y_pred = model(X, **arguments)
        assert model.losses == []
        loss = model.compute_loss(X, Y, y_pred, training=False)
        assert float(loss) == pytest.approx(ce, rel=1e-5)
    graph = tf.function(lambda x: model(x)).get_concrete_function(tf.constant(X)).graph
    operations = {op.type for op in graph.get_operations()}
    assert not operations & {"LBE>BatchEntropy", "Log1p", "Square"}


def test_threads_do_not_see_each_others_records():
    layers = hidden_layers()
    model = build(layers)
    model.compile("sgd", "mse")
    expected = expected_logs(model, layers)["loss"]
    losses = []

    def loop():
        for _ in range(5):
            y_pred = model(X, training=True)
            losses.append(float(model.compute_loss(X, Y, y_pred)))

    threads = [threading.Thread(target=loop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert losses == [pytest.approx(expected, rel=2e-5)] * 15


def test_lbe_in_a_loop_inside_the_forward_pass_is_an_error():
    class Mapped(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            (self.hidden,) = hidden_layers(1)
            self.hidden.build((None, 5))

        def call(self, x):
            return tf.map_fn(self.hidden, x, fn_output_signature=tf.float32)

    inputs = keras.Input((3, 5))
    model = LBEModel(inputs, Mapped()(inputs))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"'.*dense_lbe.*'.*LBE\(\)\(outer"):
        model.train_on_batch(samples(4, 3, 5), samples(4, 3, 4))


def test_lbe_in_a_function_traced_before_is_an_error():
    class Inner(LBEModel):
        def __init__(self):
            super().__init__()
            (self.hidden,) = hidden_layers(1)
            self.out = keras.layers.Dense(2)

        @tf.function  # traced when Keras builds the model, and not again
        def inner(self, x):
            return self.hidden(x)

        def call(self, x):
            return self.out(self.inner(x))

    model = Inner()
    model.compile("sgd", "mse")
    with pytest.raises(
        ValueError, match=r"'.*dense_lbe.*' is called inside.*tf.function"
    ):
        model.fit(X, Y, verbose=0)


def test_a_training_step_that_forgets_to_say_so_is_an_error():
    class Forgetful(Subclassed):
        def train_step(self, data):
            x, y = data
            return {"loss": self.compute_loss(x, y, self(x))}

    model = Forgetful()
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match="No LBE layer reported.*training=True"):
        model.fit(X, Y, verbose=0)


def test_a_wrapper_that_takes_only_the_call_of_its_layer():
    """A layer that ends with the epilogue reports; others must be called by Keras."""

    def wrapped(layer, model):
        inputs = keras.Input((3, 5))
        model = model(inputs, keras.layers.TimeDistributed(layer)(inputs))
        model.compile(keras.optimizers.SGD(0.0), "mse")
        return model

    x, y = samples(8, 3, 5), samples(8, 3, 4, seed=1)
    (layer,) = hidden_layers(1)
    logs = wrapped(layer, LBEModel).train_on_batch(x, y, return_dict=True)
    steps = np.moveaxis(layer(x), 1, 0)
    expected = np.mean([oracle.lbe(step) for step in steps])
    assert logs["lbe"] / logs["ce"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"not called.*LBE\(\)\(wrapper"):
        wrapped(Dense_LBE(4), keras.Model).train_on_batch(x, y)
    x, y = samples(8, 3, 2, 5), samples(8, 3, 2, 4, seed=1)

    def convolutions(*first):
        inputs = keras.Input((3, 2, 5))
        h = inputs
        for each in first:
            h = each(h)
        wrapped = with_lbe(keras.layers.Conv1D(4, 1))
        model = LBEModel(inputs, keras.layers.TimeDistributed(wrapped)(h))
        model.compile("sgd", "mse")
        return model

    with pytest.raises(ValueError, match=r"TimeDistributed.*LBE\(\)\(wrapper"):
        convolutions().train_on_batch(x, y)
    some = convolutions(Dense_LBE(5))
    with pytest.warns(UserWarning, match="Gradients do not exist.*conv1d"):
        logs = some.train_on_batch(x, y, return_dict=True)
    assert logs["lbe"] > 0


def test_frozen_layers_report_too():
    layers = hidden_layers()
    model = build(layers)
    for layer in layers:
        layer.trainable = False
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = model.train_on_batch(X, Y, return_dict=True)
    assert_logs(logs, expected_logs(model, layers))


def test_lbe_needs_a_compiled_loss():
    model = build(hidden_layers())
    model.compile("sgd")
    with pytest.raises(ValueError, match="Provide a `loss`"):
        model.train_on_batch(X, Y)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf"), "1", None])
def test_strength_out_of_range(strength):
    with pytest.raises(ValueError, match="Received: LBE_strength="):
        build(hidden_layers(), strength=strength)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = build(hidden_layers())
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile("adam", "mse")
    history = model.fit(X, Y, batch_size=6, epochs=20, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    for regularizer in model.lbe_regularizers:
        assert float(regularizer.lbe_alpha.value) != 0.75


def test_weight_decay_leaves_alpha_and_what_else_was_excluded_alone():
    def weights_after_a_step(model_class):
        layers = hidden_layers(LBE_beta=0.0)
        layers.append(keras.layers.Dense(4, kernel_initializer="ones", name="free"))
        model = build(layers, model=model_class)
        optimizer = keras.optimizers.AdamW(1e-3, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        model.compile(optimizer, lambda y, y_pred: 0.0 * keras.ops.mean(y_pred))
        layers[0].bias.assign(tf.ones(4))
        model.fit(X, Y, epochs=3, batch_size=12, verbose=0)
        np.testing.assert_array_equal(layers[0].bias, np.ones(4))
        return layers

    first, second, free = weights_after_a_step(LBEModel)
    assert float(first.activity_regularizer.lbe_alpha.value) == 0.75
    assert float(second.activity_regularizer.lbe_alpha.value) == 0.75
    np.testing.assert_array_less(free.kernel.numpy(), 1.0)
    plain, *_ = weights_after_a_step(keras.Model)
    assert float(plain.activity_regularizer.lbe_alpha.value) < 0.75


@keras.saving.register_keras_serializable("test_model")
class Saved(Subclassed):
    def __init__(self, extra=1, **arguments):
        super().__init__(**arguments)
        self.extra = extra

    def get_config(self):
        return {"extra": self.extra, "LBE_strength": self.LBE_strength}


@keras.saving.register_keras_serializable("test_model")
class Graph(LBEModel):
    """Called with inputs and outputs, as `LBEModel` itself."""


@keras.saving.register_keras_serializable("test_model")
class NoConstructor(LBEModel):
    def build(self, shape):
        self.first, self.out = *hidden_layers(1), keras.layers.Dense(2)
        self.first.build(shape)
        self.out.build((None, 4))

    def call(self, x):
        return self.out(self.first(x))


@keras.saving.register_keras_serializable("test_model")
class PassesOn(NoConstructor):
    def __init__(self, units=4, **arguments):
        super().__init__(**arguments)


@keras.saving.register_keras_serializable("test_model")
class GivesTheStrength(NoConstructor):
    def __init__(self, **arguments):
        super().__init__(LBE_strength=0.25, **arguments)


@keras.saving.register_keras_serializable("test_model")
class NeedsTheStrength(NoConstructor):
    def __init__(self, LBE_strength, **arguments):
        super().__init__(LBE_strength=LBE_strength, **arguments)

    def get_config(self):
        return {**super().get_config(), "LBE_strength": self.LBE_strength}


KINDS = {
    "functional": lambda: build(hidden_layers(), strength=0.25),
    "functional subclass": lambda: as_graph(build(hidden_layers())),
    "subclassed": lambda: Saved(extra=2, LBE_strength=0.25),
    "no constructor": lambda: NoConstructor(LBE_strength=0.25),
    "passes on": lambda: PassesOn(LBE_strength=0.25),
    "gives the strength": GivesTheStrength,
    "needs the strength": lambda: NeedsTheStrength(0.25),
}


def as_graph(model):
    return Graph(model.inputs, model.outputs, LBE_strength=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_the_model(kind, tmp_path):
    model = KINDS[kind]()
    model.compile("adam", "mse")
    model.fit(X, Y, verbose=0, epochs=3)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    assert isinstance(loaded, LBEModel)
    assert loaded.LBE_strength == 0.25
    for old, new in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(old, new)
    assert float(loaded.lbe_regularizers[0].lbe_alpha.value) != 0.75
    assert loaded.evaluate(X, Y, verbose=0) == model.evaluate(X, Y, verbose=0)
    for each in (model, loaded):  # the same state of the optimizer
        each.train_on_batch(X, Y)
    for old, new in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_allclose(old, new, rtol=1e-6)


def test_a_strength_changed_later_is_saved():
    model = PassesOn()
    model.LBE_strength = 0.5
    assert PassesOn.from_config(model.get_config()).LBE_strength == 0.5


LOAD = """
import sys
import lbe_ops
import keras, numpy as np
x, y = np.load("x.npy"), np.load("y.npy")
model = keras.models.load_model("model.keras")
assert isinstance(model, lbe_ops.LBEModel) and model.LBE_strength == 0.25
logs = model.evaluate(x, y, return_dict=True, verbose=0)
np.save("logs.npy", [logs[name] for name in sys.argv[1:]])
assert model.train_on_batch(x, y, return_dict=True)["lbe"] > 0
"""


def test_another_process_loads_the_model(tmp_path):
    model = build(hidden_layers(), strength=0.25)
    model.compile("adam", "mse")
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    logs = model.evaluate(X, Y, return_dict=True, verbose=0)
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    run(LOAD, *logs, folder=tmp_path)
    expected = list(logs.values())
    np.testing.assert_allclose(np.load(tmp_path / "logs.npy"), expected, rtol=1e-5)


@pytest.mark.parametrize("how", ["h5", "checkpoint"])
def test_saving_the_weights(how, tmp_path):
    model = Subclassed()
    model.compile("adam", "mse")
    model.fit(X, Y, verbose=0, epochs=3)
    other = Subclassed()
    other(X)
    if how == "h5":
        model.save_weights(tmp_path / "model.weights.h5")
        other.load_weights(tmp_path / "model.weights.h5")
    else:
        path = tf.train.Checkpoint(model).write(str(tmp_path / "checkpoint"))
        tf.train.Checkpoint(other).read(path).expect_partial()
    for old, new in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(old, new)


def test_config_round_trip():
    model = build(hidden_layers(), strength=0.25)
    copy = type(model).from_config(model.get_config())
    assert isinstance(copy, LBEModel)
    assert copy.LBE_strength == 0.25
    assert copy.get_config() == model.get_config()
    assert not set(map(id, copy.weights)) & set(map(id, model.weights))
    copy.compile("sgd", "mse")
    assert copy.train_on_batch(X, Y, return_dict=True)["lbe"] > 0


def test_functional_and_subclassed_side_by_side():
    class Built(LBEModel):
        def __init__(self):
            inputs = keras.Input((5,))
            (layer,) = hidden_layers(1)
            super().__init__(inputs, keras.layers.Dense(2)(layer(inputs)))

    for model in (build(hidden_layers()), Subclassed(), Built(), Subclassed()):
        model.compile("sgd", "mse")
        assert model.train_on_batch(X, Y, return_dict=True)["lbe"] > 0
        assert len(model.layers) >= 3


def run(code, *arguments, folder):
    """Python code in a process of its own, started in `folder`."""
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        check=True,
    )


def test_names_that_collide_with_ours_are_errors():
    for name in ("ce", "lbe", "max_lbe"):
        with pytest.raises(ValueError, match=f"another name.*named '{name}'"):
            build(hidden_layers()).compile(
                "sgd", "mse", metrics=[keras.metrics.MeanSquaredError(name=name)]
            )
    with pytest.raises(ValueError, match="crossentropy"):
        build(hidden_layers()).compile("sgd", "mse", weighted_metrics={"a": ["ce"]})

    class Attribute(LBEModel):
        def __init__(self):
            super().__init__()
            self.lbe_loss = keras.metrics.Mean()

    class Method(LBEModel):
        def lbe_net(self):
            pass

    for model in (Attribute, Method):
        with pytest.raises(AttributeError, match="give yours another name"):
            model()


def test_a_metric_that_is_a_function_with_a_name_of_ours():
    def lbe(y, y_pred):
        return keras.ops.mean(y_pred)

    with pytest.raises(ValueError, match="another name.*'lbe'"):
        build(hidden_layers()).compile("sgd", "mse", metrics=[lbe])


def test_a_functional_subclass_with_a_constructor_of_its_own(tmp_path):
    @keras.saving.register_keras_serializable("test_model")
    class Tracking(LBEModel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.tracker = keras.metrics.Mean(name="mine")

    base = build(hidden_layers())
    model = Tracking(base.inputs, base.outputs, LBE_strength=0.5)
    model.compile("sgd", "mse")
    assert "mine" in model.fit(X, Y, verbose=0).history
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is Tracking and loaded.LBE_strength == 0.5
    np.testing.assert_array_equal(loaded(X), model(X))
    assert len(loaded.lbe_regularizers) == 2


def test_a_second_call_in_a_branch_keeps_the_first():
    model = build(hidden_layers())
    model.compile("sgd", "mse")

    @tf.function(autograph=False)
    def step(x, flag):
        y_pred = model(x, training=True)
        tf.cond(flag, lambda: model(x), lambda: 2 * model(x))
        return model.compute_loss(x, Y, y_pred)

    expected = float(model.compute_loss(X, Y, model(X, training=True)))
    loss = step(tf.constant(X), tf.constant(True))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_compute_loss_before_compile_says_what_to_do():
    model = build(hidden_layers())
    with pytest.raises(ValueError, match="Provide a `loss`"):
        model.compute_loss(X, Y, model(X, training=True))


def test_an_alpha_is_printed_in_a_function_that_is_traced():
    model = build(hidden_layers())
    texts = []

    @tf.function(autograph=False)
    def step():
        texts.append(repr(model.lbe_regularizers[1].lbe_alpha))

    step()
    assert texts == [f"<Alpha {model.name}_lbe_loss/lbe_alpha[1]=0.75>"]


def test_names_of_a_users_own():
    class Users(LBEModel):
        def __init__(self):
            super().__init__()
            self.net = keras.Sequential(hidden_layers())
            self.lbe = LBE()
            self.ce = keras.metrics.Mean(name="mine")
            self.alphas = self.fuse = self.regularizers = None
            self.outputs = [keras.layers.Dense(2)]
            self.input_shape = (5,)

        def call(self, x):
            return self.outputs[0](self.lbe(self.net(x)))

    model = Users()
    model.compile("sgd", "mse")
    logs = model.fit(X, Y, verbose=0).history
    assert set(logs) == {"loss", "ce", "lbe", "max_lbe", "mine"}


def test_a_training_step_as_in_the_guide_of_keras():
    class Guide(LBEModel):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss)
                else:
                    metric.update_state(y, y_pred)
            return {m.name: m.result() for m in self.metrics}

    layers = hidden_layers()
    base = build(layers)
    model = Guide(base.input, base.output)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = model.fit(X, Y, batch_size=12, verbose=0).history
    logs = {name: values[0] for name, values in logs.items()}
    assert_logs(logs, expected_logs(model, layers))


def test_a_base_that_is_called_for_inference():
    """As for transfer: its layers count in `fit`, and in a loop of one's own."""

    class Transfer(LBEModel):
        def __init__(self, base):
            super().__init__()
            self.base = base
            (self.head,) = hidden_layers(1)
            self.out = keras.layers.Dense(2)

        def call(self, x):
            return self.out(self.head(self.base(x, training=False)))

    inputs = keras.Input((5,))
    (layer,) = hidden_layers(1)
    base = keras.Model(inputs, layer(inputs))
    base.trainable = False
    model = Transfer(base)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = model.train_on_batch(X, Y, return_dict=True)
    assert_logs(logs, expected_logs(model, [layer, model.head]))
    loss = model.compute_loss(X, Y, model(tf.constant(X), training=True))
    assert float(loss) == pytest.approx(logs["loss"], rel=1e-6)
    model.compile(keras.optimizers.SGD(0.2), "mse")
    before = [w.numpy() for w in layer.weights] + [layer.activity_regularizer.target]
    model.fit(X, Y, epochs=3, verbose=0)
    after = [w.numpy() for w in layer.weights] + [layer.activity_regularizer.target]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    assert float(model.head.activity_regularizer.lbe_alpha) != 0.75


def test_a_functional_model_to_its_user():
    layers = hidden_layers()
    model = build(layers)
    assert type(model) is LBEModel
    assert model.layers[1:3] == layers and len(model.layers) == 4
    assert model.get_layer(layers[0].name) is layers[0]
    assert model.get_layer(index=2) is layers[1]
    assert model.input_shape == (None, 5) and model.output_shape == (None, 2)
    assert model.input is model.inputs[0] and model.output is model.outputs[0]
    features = keras.Model(model.input, model.layers[2].output)
    h = layers[1](layers[0](X))
    np.testing.assert_allclose(features.predict(X, verbose=0), h, rtol=1e-5, atol=1e-6)
    copy = keras.models.clone_model(model)
    assert isinstance(copy, LBEModel) and copy.LBE_strength == model.LBE_strength
    copy.set_weights(model.get_weights())
    np.testing.assert_array_equal(copy(X), model(X))
    with pytest.raises(AttributeError, match="not made of inputs and outputs"):
        Subclassed().input  # noqa: B018


REIMPORT = """
import importlib, json, sys
import keras, numpy as np
import lbe_ops
importlib.reload(lbe_ops)
for name in [name for name in sys.modules if name.startswith("lbe_ops")]:
    del sys.modules[name]
import lbe_ops
inputs = keras.Input((5,))
model = lbe_ops.LBEModel(inputs, lbe_ops.Dense_LBE(2, activation="relu")(inputs))
model.compile("sgd", "mse")
logs = model.fit(np.eye(5), np.ones((5, 2)), verbose=0).history
model.save(sys.argv[1])
loaded = keras.models.load_model(sys.argv[1])
print(json.dumps([logs["lbe"][0], isinstance(loaded, lbe_ops.LBEModel)]))
"""


def test_the_package_is_imported_anew_in_a_notebook(tmp_path):
    lbe, same = run_script(REIMPORT, tmp_path / "model.keras")
    assert lbe > 0 and same
