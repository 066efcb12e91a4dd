# SPDX-License-Identifier: Apache-2.0
"""`LBERegularizer` in plain Keras models: value, gradient, dtypes, saving.

Values are compared with float64 NumPy, gradients with finite differences of it.
"""

import json
import math

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import require_xla, samples

import lbe_ops
from lbe_ops import LBE, Dense_LBE, LBEModel, LBERegularizer, native, with_lbe

# Keras reads a variable into NumPy 2 in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

SETTING = {"lbe_alpha": 0.75, "lbe_alpha_min": 0.25, "lbe_beta": 0.5}


def functional(layer, features=5):
    inputs = keras.Input((features,))
    return keras.Model(inputs, layer(inputs))


def sequential(layer, features=5):
    return keras.Sequential([keras.Input((features,)), layer])


class Subclassed(keras.Model):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x):
        return self.layer(x)


def subclassed(layer, features=5):
    model = Subclassed(layer)
    model(np.zeros((2, features), np.float32))
    return model


KINDS = [functional, sequential, subclassed]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [2, 7, 32])
def test_loss_of_a_plain_model_is_lbe_whatever_the_batch_size(kind, batch):
    layer = keras.layers.Dense(4, activity_regularizer=LBERegularizer(**SETTING))
    model = kind(layer)
    x = samples(batch, 5)
    y = model(x, training=True)
    assert float(tf.add_n(model.losses)) == pytest.approx(
        oracle.lbe(y), rel=1e-5, abs=1e-7
    )


@pytest.mark.parametrize("how", ["eager", "graph", "jit"])
def test_fit_and_evaluate_add_lbe_to_the_compiled_loss(how):
    if how == "jit" and not native.compiles():
        require_xla()
    layer = keras.layers.Conv2D(3, 2, activity_regularizer=LBERegularizer(**SETTING))
    inputs = keras.Input((6, 6, 2))
    model = keras.Model(inputs, layer(inputs))
    model.compile(
        keras.optimizers.SGD(0.0),
        "mse",
        run_eagerly=how == "eager",
        jit_compile=how == "jit",
    )
    x = samples(8, 6, 6, 2)
    y = model.predict(x, verbose=0)
    target = samples(*y.shape, seed=1)
    expected = np.mean((y.astype(np.float64) - target) ** 2) + oracle.lbe(y)
    trained = model.train_on_batch(x, target, return_dict=True)
    evaluated = model.test_on_batch(x, target, return_dict=True)
    assert trained["loss"] == pytest.approx(expected, rel=1e-5)
    assert evaluated["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("function", [False, True])
def test_gradients_of_weights_and_alpha(function):
    regularizer = LBERegularizer(**SETTING)
    layer = keras.layers.Dense(3, activity_regularizer=regularizer, dtype="float64")
    x = samples(6, 4, dtype=np.float64)
    layer.build(x.shape)
    kernel, alpha = layer.kernel.numpy(), 0.75

    def gradients():
        with tf.GradientTape() as tape:
            layer(x, training=True)
            loss = tf.add_n(layer.losses)
        return tape.gradient(loss, [layer.kernel.value, regularizer.lbe_alpha.value])

    by_kernel, by_alpha = (tf.function(gradients) if function else gradients)()
    expected = np.zeros_like(kernel)
    for index in np.ndindex(*kernel.shape):
        step = np.zeros_like(kernel)
        step[index] = 1e-6
        expected[index] = (
            oracle.lbe(x @ (kernel + step), alpha)
            - oracle.lbe(x @ (kernel - step), alpha)
        ) / 2e-6
    np.testing.assert_allclose(by_kernel, expected, rtol=1e-6, atol=1e-9)
    y = x @ kernel
    slope = (oracle.lbe(y, alpha + 1e-6) - oracle.lbe(y, alpha - 1e-6)) / 2e-6
    assert float(by_alpha) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(
    ("alpha", "moves"), [(0.5, True), (0.25, True), (0.2, False), (-0.5, True)]
)
def test_alpha_gets_the_gradient_from_alpha_min_on(alpha, moves):
    regularizer = LBERegularizer(alpha, 0.25, 1.0)
    with tf.GradientTape() as tape:
        loss = regularizer.loss(samples(8, 4))
    gradient = float(tape.gradient(loss, regularizer.lbe_alpha.value))
    assert (gradient != 0) == moves
    assert float(regularizer.target) == max(0.25, abs(alpha))


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("function", [False, True])
def test_a_batch_too_small_adds_nothing(batch, function):
    layer = keras.layers.Dense(4, activity_regularizer=LBERegularizer())
    layer.build((None, 5))

    def step(x):
        with tf.GradientTape() as tape:
            layer(x, training=True)
            loss = tf.add_n(layer.losses)
        variables = [variable.value for variable in layer.trainable_variables]
        return loss, tape.gradient(loss, variables)

    spec = tf.TensorSpec((None, 5))
    step = tf.function(step, input_signature=[spec]) if function else step
    loss, gradients = step(tf.ones((batch, 5)))
    assert float(loss) == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def test_dead_units_have_finite_gradients():
    layer = keras.layers.Dense(
        4,
        activation="relu",
        bias_initializer=keras.initializers.Constant(-100.0),
        activity_regularizer=LBERegularizer(**SETTING),
    )
    x = samples(8, 5)
    with tf.GradientTape() as tape:
        y = layer(x, training=True)
        loss = tf.add_n(layer.losses)
    assert not np.any(y)
    assert float(loss) == pytest.approx(0.5 * 0.75**2)
    kernel, bias, alpha = tape.gradient(
        loss, [variable.value for variable in layer.trainable_variables]
    )
    assert not np.any(kernel) and not np.any(bias)
    assert float(alpha) == pytest.approx(2 * 0.5 * 0.75)


@pytest.mark.parametrize("other", ["l2", keras.regularizers.L1(0.1)])
def test_other_regularizer_counts_as_if_it_stood_alone(other):
    x = samples(6, 5)
    alone = keras.layers.Dense(4, activity_regularizer=other)
    both = keras.layers.Dense(
        4,
        activity_regularizer=LBERegularizer(
            **SETTING, other_activity_regularizer=other
        ),
    )
    alone.build(x.shape)
    both.build(x.shape)
    both.kernel.assign(alone.kernel)
    y = alone(x)
    both(x)
    expected = float(alone.losses[0]) + oracle.lbe(y)
    assert float(both.losses[0]) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_custom_layer_is_not_scaled():
    regularizer = LBERegularizer(**SETTING)

    class Custom(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.regularizer = regularizer

        def call(self, x):
            self.add_loss(self.regularizer.loss(x))
            return x

    layer = Custom()
    x = samples(6, 5)
    inputs = keras.Input((5,))
    model = LBEModel(inputs, layer(inputs))  # makes the loss of what is reported
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = model.train_on_batch(x, x + 1, return_dict=True)
    assert logs["lbe"] / logs["ce"] == pytest.approx(oracle.lbe(x), rel=1e-5)
    assert logs["loss"] == pytest.approx(logs["ce"] + 1.5 * logs["lbe"], rel=1e-6)
    layer(x)
    assert float(layer.losses[0]) == pytest.approx(oracle.lbe(x), rel=1e-5)
    assert float(regularizer.loss(x)) == pytest.approx(oracle.lbe(x), rel=1e-5)


def test_formula_arguments():
    x = samples(6, 5, dtype=np.float64)
    regularizer = LBERegularizer(0.75, 0.25, 0.5, ddof=1, scale=2.0, offset=0.5)
    entropy = oracle.batch_entropy(x, ddof=1, scale=2.0, offset=0.5)
    expected = 0.5 * (entropy - 0.75) ** 2
    assert float(regularizer.loss(x)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"]
)
def test_every_dtype_policy_trains(policy):
    inputs = keras.Input((5,), dtype="float32")
    regularizer = LBERegularizer(**SETTING)
    hidden = keras.layers.Dense(8, activity_regularizer=regularizer, dtype=policy)
    outputs = keras.layers.Dense(1, dtype="float32")(hidden(inputs))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.5), "mse")
    x = samples(16, 5)
    y = samples(16, 1, seed=1)
    hidden(x)
    assert hidden.losses[0].dtype == "float32"
    before = hidden.kernel.numpy().copy()
    activations = x.astype(np.float64) @ before.astype(np.float64)
    y_pred = activations @ model.layers[-1].kernel.numpy().astype(np.float64)
    expected = np.mean((y_pred - y) ** 2) + oracle.lbe(activations)
    logs = model.train_on_batch(x, y, return_dict=True)
    assert logs["loss"] == pytest.approx(expected, rel=0.02)
    assert regularizer.lbe_alpha.dtype == "float32"
    assert float(regularizer.lbe_alpha.value) != 0.75
    assert np.any(hidden.kernel.numpy() != before)


def test_alpha_is_a_trainable_weight_before_the_first_call():
    layer = keras.layers.Dense(4, activity_regularizer=LBERegularizer())
    model = functional(layer)
    assert [v.name for v in model.trainable_variables] == [
        "kernel",
        "bias",
        "lbe_alpha",
    ]
    layer.trainable = False
    assert model.trainable_variables == []


def test_config_round_trip_has_plain_values_and_the_present_alpha():
    regularizer = LBERegularizer(
        **SETTING,
        other_activity_regularizer=keras.regularizers.L1L2(0.1, 0.2),
        ddof=1,
        scale=3.0,
        offset=0.5,
        native=False,
        name="mine",
    )
    regularizer.lbe_alpha.assign(0.1)
    config = json.loads(json.dumps(keras.regularizers.serialize(regularizer)))
    copy = keras.regularizers.get(config)
    assert copy.get_config() == regularizer.get_config()
    assert float(copy.lbe_alpha.value) == np.float32(0.1)
    assert copy.other_activity_regularizer.l2 == np.float32(0.2)
    assert copy.name == "mine"


def perturbed(kind):
    layer = keras.layers.Dense(4, activity_regularizer=LBERegularizer(**SETTING))
    model = kind(layer)
    model.compile("adam", "mse")
    model.fit(samples(8, 5), samples(8, 4), verbose=0)
    layer.activity_regularizer.lbe_alpha.assign(0.123456)
    return model, layer


LAYERS = {
    "Dense_LBE": lambda: Dense_LBE(4, activity_regularizer=LBERegularizer(**SETTING)),
    "LBE": lambda: LBE(**SETTING),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_files_restore_alpha_in_a_plain_model(kind, layer, tmp_path):
    first, second = LAYERS[layer](), LAYERS[layer]()
    model = kind(first)
    first.activity_regularizer.lbe_alpha.assign(0.123456)
    model.save_weights(tmp_path / "model.weights.h5")
    kind(second).load_weights(tmp_path / "model.weights.h5")
    assert float(second.activity_regularizer.lbe_alpha) == np.float32(0.123456)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_restore_alpha_in_a_plain_model(kind, tmp_path):
    model, _ = perturbed(kind)
    path = tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
    layer = keras.layers.Dense(4, activity_regularizer=LBERegularizer(**SETTING))
    status = tf.train.Checkpoint(model=kind(layer)).read(path)
    status.assert_existing_objects_matched().expect_partial()
    assert float(layer.activity_regularizer.lbe_alpha.value) == np.float32(0.123456)


@pytest.mark.parametrize("kind", [functional, sequential])
def test_keras_files_restore_alpha_in_a_plain_model(kind, tmp_path):
    model, _ = perturbed(kind)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for old, new in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(old, new)
    alpha = loaded.layers[-1].activity_regularizer.lbe_alpha
    assert float(alpha.value) == np.float32(0.123456)
    x, y = samples(8, 5), samples(8, 4)
    assert loaded.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)
    loaded.train_on_batch(x, y)  # the optimizer's state fits


def shared_by_two_layers(model=LBEModel):
    regularizer = LBERegularizer(**SETTING)
    inputs = keras.Input((5,))
    x = keras.layers.Dense(4, activity_regularizer=regularizer)(inputs)
    outputs = keras.layers.Dense(4, activity_regularizer=regularizer)(x)
    return model(inputs, outputs), regularizer


def test_a_shared_regularizer_is_restored_into_a_model_made_in_code(tmp_path):
    assert len(shared_by_two_layers(keras.Model)[0].weights) == 5
    model, regularizer = shared_by_two_layers()
    assert len(model.weights) == 5
    regularizer.lbe_alpha.assign(0.5)
    model.save(tmp_path / "model.keras")
    # Keras takes it apart when it makes the layers.
    with pytest.raises(ValueError, match="two layers shared a"):
        keras.models.load_model(tmp_path / "model.keras")
    other, regularizer = shared_by_two_layers()
    other.load_weights(tmp_path / "model.keras")
    assert float(regularizer.lbe_alpha) == 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        {"lbe_alpha": math.nan},
        {"lbe_alpha": math.inf},
        {"lbe_alpha_min": -0.1},
        {"lbe_beta": -1.0},
        {"lbe_beta": math.inf},
        {"lbe_alpha": "1.0"},
        {"lbe_alpha_min": None},
        {"lbe_beta": [1.0]},
        {"lbe_beta": 10**400},
        {"scale": "e"},
        {"offset": None},
    ],
    ids=lambda arguments: str(arguments)[:30],
)
def test_arguments_out_of_range(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError) as error:
        LBERegularizer(**arguments)
    assert str(error.value).endswith(f"Received: {name}={value!r}")


def test_native_is_none_or_a_bool():
    with pytest.raises(TypeError, match="Received: 'yes'"):
        LBERegularizer(native="yes")


def test_an_output_that_is_not_floating_point_is_refused_by_name():
    class Both(keras.layers.Layer):
        def call(self, x):
            return x, tf.argmax(x, axis=-1)

    layer = with_lbe(Both(name="both"))
    with pytest.raises(TypeError, match="'both_lbe'.*Received: dtype='int64'"):
        layer(samples(8, 5), training=True)


def test_weight_decay_of_a_plain_model_can_leave_alpha_alone():
    layer = keras.layers.Dense(4, activity_regularizer=LBERegularizer(2.0, 0.25, 0.0))
    model = functional(layer)
    optimizer = keras.optimizers.AdamW(1e-3, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["lbe_alpha"])
    model.compile(optimizer, "mse")
    model.fit(samples(8, 5), samples(8, 4), verbose=0)
    assert float(layer.activity_regularizer.lbe_alpha.value) == 2.0


def test_lbe_beside_lbe_is_refused():
    with pytest.raises(ValueError, match="Received: other_activity_regularizer="):
        LBERegularizer(other_activity_regularizer=LBERegularizer())


def test_rematerialisation_raises_rather_than_losing_the_gradient():
    layer = keras.layers.Dense(4, activity_regularizer=LBERegularizer())

    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.layer = layer
            layer.build((None, 5))

        def call(self, x):
            return self.layer(x)

    with keras.RematScope(mode="full"):
        block = Block()
    with (
        tf.GradientTape(),
        pytest.raises(RuntimeError, match="'lbe_regularizer.*'.*rematerialised"),
    ):
        block(samples(8, 5), training=True)


def test_lbe_on_a_rematerialised_layer_is_correct():
    def make():
        return keras.layers.ReLU(activity_regularizer=LBERegularizer(**SETTING))

    plain = make()
    with keras.RematScope(mode="full"):
        remat = make()
    x = tf.constant(samples(8, 5))

    @tf.function
    def gradients(layer):
        alpha = layer.activity_regularizer.lbe_alpha.value
        with tf.GradientTape() as tape:
            tape.watch(x)
            layer(x)
            loss = tf.add_n(layer.losses)
        return tape.gradient(loss, [x, alpha])

    for ours, expected in zip(gradients(remat), gradients(plain), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def lbe_operations(function):
    graph = function.get_concrete_function().graph
    return [op.type for op in graph.get_operations() if op.type.startswith("LBE>")]


def test_inference_graphs_of_a_plain_model_have_no_native_op():
    layer = keras.layers.Dense(4, activity_regularizer=LBERegularizer())
    model = functional(layer)
    x = tf.constant(samples(8, 5))
    assert lbe_operations(tf.function(lambda: model(x))) == []
    assert lbe_operations(tf.function(lambda: model(x, training=False))) == []

    native = lbe_ops.native.load().ops is not None
    training = tf.function(lambda: model(x, training=True), autograph=False)
    assert lbe_operations(training) == (["LBE>BatchEntropy"] if native else [])


@pytest.mark.parametrize(
    "argument", [{"ddof": 2}, {"scale": 0.0}, {"offset": -1.0}], ids=str
)
def test_a_bad_formula_is_refused_at_once(argument):
    with pytest.raises(ValueError, match="Received"):
        LBERegularizer(**argument)


def test_required_native_op_is_required_in_inference_too():
    layer = keras.layers.Dense(4, activity_regularizer=LBERegularizer(native=True))
    model = functional(layer)
    x = tf.constant(samples(8, 5))
    function = tf.function(lambda: model(x))
    if lbe_ops.native.load().ops is None:
        with pytest.raises(lbe_ops.NativeUnavailableError):
            function()
    else:
        assert lbe_operations(function) == ["LBE>BatchEntropy"]
