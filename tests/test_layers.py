# SPDX-License-Identifier: Apache-2.0
"""`Dense_LBE`, `Conv2D_LBE`, and LBE on any other layer and on existing models."""

import keras
import numpy as np
import pytest
from conftest import samples

from lbe_ops import (
    Conv2D_LBE,
    Dense_LBE,
    LBEModel,
    LBERegularizer,
    add_lbe,
    with_lbe,
)


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
    one, two = (float(layer.activity_regularizer(y)) for y in (x, 2 * x))
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
        for layer in model._flatten_layers()
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
    model = add_lbe(add_lbe(plain), lambda layer: True)
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
    model = add_lbe(resnet, keras.layers.Conv2D)
    assert len(model.lbe_regularizers) == len(convolutions) == 53
    *others, alphas = model.trainable_variables
    assert (len(others), alphas.shape) == (before, (53,))
    # A forward pass alone: compiling the step of the whole network takes minutes.
    y_pred = model(samples(4, 32, 32, 3), training=True)
    model.compile("sgd", "sparse_categorical_crossentropy")
    loss = model.compute_loss(None, np.arange(4), y_pred)
    results = model.get_metrics_result()
    assert float(loss) == pytest.approx(
        float(results["ce"] + 1.5 * results["lbe"]), rel=1e-5
    )
    assert results["lbe"] > 0


@pytest.mark.parametrize(
    "arguments",
    [{"LBE_strength": -1.0}, {"lbe_alpha": float("nan")}, {"unknown": 1}],
    ids=str,
)
def test_add_lbe_changes_nothing_when_it_fails(arguments):
    model = network()
    with pytest.raises((ValueError, TypeError)):
        add_lbe(model, **arguments)
    assert all(layer.activity_regularizer is None for layer in model._flatten_layers())


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
