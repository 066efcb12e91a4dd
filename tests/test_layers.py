# SPDX-License-Identifier: Apache-2.0
"""`Dense_LBE`, `Conv2D_LBE`, and LBE on any other layer and on existing models."""

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import samples

from lbe_ops import (
    LBE,
    Conv2D_LBE,
    Dense_LBE,
    LBEModel,
    LBERegularizer,
    add_lbe,
    with_lbe,
)
from lbe_ops.keras_internals import flatten_layers

# Keras reads a variable into NumPy 2 in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")


@pytest.mark.parametrize(
    ("layer_class", "plain_class", "arguments", "shape"),
    [
        (Dense_LBE, keras.layers.Dense, (4, "relu"), (8, 5)),
        (Conv2D_LBE, keras.layers.Conv2D, (4, 3), (8, 6, 6, 2)),
    ],
)
def test_layers_of_the_port(layer_class, plain_class, arguments, shape):
    layer = layer_class(
        *arguments,
        LBE_alpha=2.0,
        LBE_alpha_min=0.25,
        LBE_beta=0.5,
        kernel_regularizer="l2",
        activity_regularizer="l1",
    )
    regularizer = layer.activity_regularizer
    assert float(regularizer.lbe_alpha.value) == 2.0
    assert regularizer.lbe_alpha_min == 0.25
    assert regularizer.lbe_beta == 0.5
    assert isinstance(regularizer.other_activity_regularizer, keras.regularizers.L1)
    plain = plain_class(*arguments)
    plain.build(shape)
    x = samples(*shape)
    y = layer(x)
    plain.set_weights(layer.get_weights()[:2])
    np.testing.assert_array_equal(y, plain(x))
    assert len(layer.losses) == 2  # activity and kernel

    regularizer.lbe_alpha.assign(1.25)
    copy = layer_class.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    assert float(copy.activity_regularizer.lbe_alpha.value) == 1.25


def test_defaults_of_the_port():
    for layer in (Dense_LBE(4), Conv2D_LBE(4, 3)):
        config = layer.activity_regularizer.get_config()
        assert config["lbe_alpha"] == 6.0
        assert config["lbe_alpha_min"] == 0.5
        assert config["lbe_beta"] == 1.0


def test_an_lbe_regularizer_is_used_as_it_is():
    regularizer = LBERegularizer(ddof=1)
    assert Dense_LBE(4, activity_regularizer=regularizer).activity_regularizer is (
        regularizer
    )


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (keras.layers.Conv1D(4, 3), (8, 7, 2)),
        (keras.layers.LSTM(4), (8, 7, 2)),
        (keras.layers.ReLU(), (8, 5)),
        (keras.layers.BatchNormalization(), (8, 5)),
        (keras.layers.Flatten(), (8, 3, 2)),
    ],
)
@pytest.mark.parametrize("built", [False, True])
def test_with_lbe_serves_any_layer(layer, shape, built):
    layer = layer.from_config(layer.get_config())
    if built:
        layer.build(shape)
    assert with_lbe(layer, lbe_alpha=2.0) is layer
    inputs = keras.Input(shape[1:])
    model = LBEModel(inputs, keras.layers.Flatten()(layer(inputs)))
    model.compile("sgd", "mse")
    x = samples(*shape)
    logs = model.train_on_batch(x, model.predict(x, verbose=0) + 1, return_dict=True)
    assert logs["lbe"] > 0
    assert float(layer.activity_regularizer.lbe_alpha.value) != 2.0


def test_every_output_of_a_layer_counts_as_a_layer():
    class Twice(keras.layers.Layer):
        def call(self, x):
            return x, 2.0 * x

    layer = with_lbe(Twice(), lbe_alpha=1.0)
    x = samples(8, 5)
    layer(x)
    one, two = (float(layer.activity_regularizer.loss(y)) for y in (x, 2 * x))
    assert [float(loss) for loss in layer.losses] == pytest.approx([one, two])


def test_with_lbe_on_a_wrapper_that_calls_its_layer_by_itself():
    inputs = keras.Input((3, 5))
    wrapper = with_lbe(keras.layers.TimeDistributed(keras.layers.Dense(2)))
    model = LBEModel(inputs, wrapper(inputs))
    model.compile("sgd", "mse")
    logs = model.train_on_batch(samples(8, 3, 5), samples(8, 3, 2), return_dict=True)
    assert logs["lbe"] > 0


def test_lbe_is_not_for_a_whole_model():
    inputs = keras.Input((5,))
    block = keras.Sequential([keras.layers.Dense(3)], name="block")
    first = keras.layers.Dense(5)
    model = keras.Model(inputs, block(first(inputs)))
    for call in (
        lambda: with_lbe(block),
        lambda: with_lbe(model),
        lambda: add_lbe(model, [first.name, "block"]),
    ):
        with pytest.raises(ValueError, match="Put it on the last layer"):
            call()
    assert first.activity_regularizer is block.activity_regularizer is None


def test_with_lbe_keeps_what_is_there():
    layer = keras.layers.Dense(4, activity_regularizer=keras.regularizers.L2(0.5))
    with_lbe(layer)
    regularizer = layer.activity_regularizer
    assert regularizer.other_activity_regularizer.l2 == 0.5
    assert with_lbe(layer).activity_regularizer is regularizer


def network():
    block = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="nested")])
    inputs = keras.Input((5,), name="x")
    x = keras.layers.Dense(4, name="first")(inputs)
    x = keras.layers.ReLU(name="relu")(block(x))
    return keras.Model({"x": inputs}, {"y": keras.layers.Dense(2, name="last")(x)})


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, {"first", "nested"}),
        (keras.layers.Dense, {"first", "nested", "last"}),
        ((keras.layers.ReLU, keras.layers.LSTM), {"relu"}),
        (lambda layer: layer.name.startswith("n"), {"nested"}),
        (["first", "relu"], {"first", "relu"}),
        ("last", {"last"}),
    ],
)
def test_add_lbe_to_chosen_layers(selection, expected):
    plain = network()
    model = add_lbe(plain, selection, LBE_strength=0.5, lbe_alpha=2.0)
    assert isinstance(model, LBEModel)
    assert model.LBE_strength == 0.5
    found = {
        layer.name
        for layer in flatten_layers(model)
        if isinstance(layer.activity_regularizer, LBERegularizer)
    }
    assert found == expected
    assert len(model.lbe_regularizers) == len(expected)
    assert set(map(id, plain.weights)) <= set(map(id, model.weights))
    model.compile("adam", {"y": "mse"})
    x = {"x": samples(8, 5)}
    logs = model.train_on_batch(x, {"y": samples(8, 2)}, return_dict=True)
    assert logs["lbe"] > 0
    for regularizer in model.lbe_regularizers:
        assert float(regularizer.lbe_alpha.value) != 2.0


def test_add_lbe_to_a_sequential_model():
    plain = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="no hidden layer"):
        add_lbe(plain)
    model = add_lbe(add_lbe(plain, keras.layers.Dense), lambda layer: True)
    assert len(model.lbe_regularizers) == 1
    assert model.output.shape == plain.output_shape
    model.compile("sgd", "mse")
    logs = model.train_on_batch(samples(8, 5), samples(8, 2), return_dict=True)
    assert logs["lbe"] > 0


def test_add_lbe_to_every_convolution_of_resnet50():
    resnet = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3))
    convolutions = [
        layer for layer in resnet.layers if isinstance(layer, keras.layers.Conv2D)
    ]
    before = len(resnet.trainable_variables)
    model = add_lbe(resnet)
    assert len(model.lbe_regularizers) == len(convolutions) == 53
    *others, alphas = model.trainable_variables
    assert (len(others), alphas.shape) == (before, (53,))
    # A forward pass alone: compiling the step of the whole network takes minutes.
    y_pred = model(samples(4, 32, 32, 3), training=True)
    model.compile("sgd", "sparse_categorical_crossentropy")
    loss = model.compute_loss(None, np.arange(4), y_pred)
    results = model.get_metrics_result()
    assert float(loss) == pytest.approx(
        float(results["ce"] + 0.1 * results["lbe"]), rel=1e-5
    )
    assert results["lbe"] > 0


def test_arguments_are_looked_at_where_there_is_lbe_already():
    plain = keras.Sequential([keras.Input((5,)), Dense_LBE(3), keras.layers.Dense(2)])
    with pytest.raises(TypeError, match="lbe_alfa"):
        add_lbe(plain, lbe_alfa=1)
    add_lbe(plain, lbe_alpha=1)
    assert float(plain.layers[0].activity_regularizer.lbe_alpha) == 6.0


@pytest.mark.parametrize(
    "arguments",
    [{"LBE_strength": -1.0}, {"lbe_alpha": float("nan")}, {"unknown": 1}],
    ids=str,
)
def test_add_lbe_changes_nothing_when_it_fails(arguments):
    model = network()
    with pytest.raises((ValueError, TypeError)):
        add_lbe(model, **arguments)
    assert all(layer.activity_regularizer is None for layer in flatten_layers(model))


def test_add_lbe_keeps_the_lbe_that_a_layer_has():
    model = network()
    first = with_lbe(model.get_layer("first"), lbe_alpha=2.0)
    regularizer = first.activity_regularizer
    add_lbe(model, ["first", "last"], lbe_alpha=1.0)
    assert first.activity_regularizer is regularizer
    assert float(regularizer.lbe_alpha.value) == 2.0


def test_add_lbe_says_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"no such layer.*\['missing'\]"):
        add_lbe(network(), ["first", "missing"])
    with pytest.raises(ValueError, match="No layer matches"):
        add_lbe(network(), keras.layers.LSTM)
    with pytest.raises(TypeError, match="Functional"):
        add_lbe(keras.Sequential([keras.layers.Dense(2)]))


SEQUENCE = (6, 8)
# Every layer class of Keras that takes a sequence; those with arguments need them.
MAKERS = {
    "Activation": lambda: keras.layers.Activation("tanh"),
    "AlphaDropout": lambda: keras.layers.AlphaDropout(0.1),
    "AveragePooling1D": lambda: keras.layers.AveragePooling1D(2),
    "BatchNormalization": keras.layers.BatchNormalization,
    "Bidirectional": lambda: keras.layers.Bidirectional(keras.layers.LSTM(4)),
    "Conv1D": lambda: keras.layers.Conv1D(4, 3),
    "Conv1DTranspose": lambda: keras.layers.Conv1DTranspose(4, 3),
    "Cropping1D": keras.layers.Cropping1D,
    "Dense": lambda: keras.layers.Dense(4),
    "DepthwiseConv1D": lambda: keras.layers.DepthwiseConv1D(3),
    "Dropout": lambda: keras.layers.Dropout(0.1),
    "ELU": keras.layers.ELU,
    "EinsumDense": lambda: keras.layers.EinsumDense("abc,cd->abd", (6, 4)),
    "Flatten": keras.layers.Flatten,
    "GRU": lambda: keras.layers.GRU(4),
    "GaussianDropout": lambda: keras.layers.GaussianDropout(0.1),
    "GaussianNoise": lambda: keras.layers.GaussianNoise(0.1),
    "GlobalAveragePooling1D": keras.layers.GlobalAveragePooling1D,
    "GlobalMaxPooling1D": keras.layers.GlobalMaxPooling1D,
    "GroupNormalization": lambda: keras.layers.GroupNormalization(4),
    "GroupQueryAttention": lambda: keras.layers.GroupQueryAttention(4, 2, 1),
    "LSTM": lambda: keras.layers.LSTM(4, return_sequences=True),
    "LayerNormalization": keras.layers.LayerNormalization,
    "LeakyReLU": keras.layers.LeakyReLU,
    "Masking": keras.layers.Masking,
    "MaxPooling1D": keras.layers.MaxPooling1D,
    "MultiHeadAttention": lambda: keras.layers.MultiHeadAttention(2, 4),
    "Normalization": lambda: keras.layers.Normalization(mean=0.0, variance=1.0),
    "PReLU": keras.layers.PReLU,
    "Permute": lambda: keras.layers.Permute((2, 1)),
    "RNN": lambda: keras.layers.RNN(keras.layers.LSTMCell(4)),
    "ReLU": keras.layers.ReLU,
    "Rescaling": lambda: keras.layers.Rescaling(0.5),
    "Reshape": lambda: keras.layers.Reshape((8, 6)),
    "SeparableConv1D": lambda: keras.layers.SeparableConv1D(4, 3),
    "SimpleRNN": lambda: keras.layers.SimpleRNN(4),
    "Softmax": keras.layers.Softmax,
    "SpatialDropout1D": lambda: keras.layers.SpatialDropout1D(0.1),
    "SpectralNormalization": lambda: keras.layers.SpectralNormalization(
        keras.layers.Dense(4)
    ),
    "TimeDistributed": lambda: keras.layers.TimeDistributed(keras.layers.Dense(4)),
    "UnitNormalization": keras.layers.UnitNormalization,
    "UpSampling1D": keras.layers.UpSampling1D,
    "ZeroPadding1D": keras.layers.ZeroPadding1D,
}
ATTENTION = ("MultiHeadAttention", "GroupQueryAttention")
REFUSED = {"MultiHeadAttention", "SimpleRNN", "SpatialDropout1D"}


@pytest.mark.filterwarnings("ignore:Layer 'flatten.*was passed an input with a mask")
@pytest.mark.parametrize("behind", [False, True], ids=["with_lbe", "LBE"])
@pytest.mark.parametrize("name", MAKERS)
def test_lbe_on_every_layer_class_survives_every_format(name, behind, tmp_path):
    """Or it is refused when it is put on; `LBE` behind it always works."""

    def make(layer):
        inputs = keras.Input(SEQUENCE)
        x = layer(inputs, inputs) if name in ATTENTION else layer(inputs)
        if behind:
            x = LBE(lbe_alpha=0.75)(x)
        return LBEModel(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))

    layer = MAKERS[name]()
    if not behind:
        try:
            with_lbe(layer, lbe_alpha=0.75)
        except ValueError as error:
            assert name in REFUSED, error
            assert "LBE()(layer(x))" in str(error)
            assert layer.activity_regularizer is None
            return
    model = make(layer)
    model.compile("sgd", "mse")
    x, y = samples(8, *SEQUENCE), samples(8, 2)
    assert model.train_on_batch(x, y, return_dict=True)["max_lbe"] > 0
    (regularizer,) = model.lbe_regularizers
    regularizer.lbe_alpha.assign(0.875)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    path = tf.train.Checkpoint(model).write(str(tmp_path / "checkpoint"))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    found = [loaded, *(LBEModel.from_config(model.get_config()) for _ in range(2))]
    for each in found[1:]:
        each.lbe_regularizers[0].lbe_alpha.assign(0.5)
        each.compile("sgd", "mse")
        each.optimizer.build(each.trainable_variables)
    found[1].load_weights(tmp_path / "model.weights.h5")
    tf.train.Checkpoint(found[2]).read(path).expect_partial()
    for each in found:
        assert [float(r.lbe_alpha) for r in each.lbe_regularizers] == [0.875]
        np.testing.assert_allclose(each(x), model(x), rtol=1e-5, atol=1e-6)


def test_lbe_behind_a_layer_passes_everything_on():
    inputs = keras.Input((7,))
    h = keras.layers.Embedding(10, 4, mask_zero=True)(inputs)
    tapped = LBE(lbe_alpha=1.0, name="behind")(h)
    assert tapped.shape == h.shape and tapped.dtype == h.dtype
    model = LBEModel(inputs, keras.layers.LSTM(4)(tapped))
    plain = keras.Model(inputs, model.layers[-1](h))
    x = np.arange(56).reshape(8, 7) % 10
    np.testing.assert_array_equal(model(x), plain(x))  # with the same mask
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        z = tf.cast(samples(8, 3), dtype)
        for arguments in ({}, {"training": True}):
            y = LBE()(z, **arguments)
            assert y.dtype == z.dtype
            np.testing.assert_array_equal(y, z)
    pair = (samples(8, 3), samples(8, 2))
    one, two = keras.Input((3,)), keras.Input((2,))
    expected = [oracle.batch_entropy(x) for x in pair]
    for arguments in ({}, {"activity_regularizer": "l2"}):
        both = LBEModel([one, two], LBE(**arguments)([one, two]))
        both.compile("sgd", ["mse", "mse"])
        y = both(list(pair), training=True)
        np.testing.assert_array_equal(y[1], pair[1])
        entropies = [float(entry.entropy) for entry in y[0]._lbe_recording.entries]
        assert entropies == pytest.approx(expected, rel=1e-5)
