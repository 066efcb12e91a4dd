# SPDX-License-Identifier: Apache-2.0
"""`BatchEntropyLogger`: its numbers against NumPy, its files, and its side effects."""

import csv

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import samples

from lbe_ops import BatchEntropyLogger, Dense_LBE, LBEModel, add_lbe

X, Y, PROBE = samples(12, 5), samples(12, 2, seed=1), samples(9, 5, seed=2)


def network(lbe, extra=()):
    layer_class = Dense_LBE if lbe else keras.layers.Dense
    layers = [
        layer_class(4, activation="tanh", name="one"),
        *extra,
        layer_class(
            3, bias_initializer=keras.initializers.Constant(-100.0), name="two"
        ),
        keras.layers.ReLU(name="relu"),
        keras.layers.Dense(2, name="out"),
    ]
    inputs = keras.Input((5,))
    x = inputs
    for layer in layers:
        x = layer(x)
    model = (LBEModel if lbe else keras.Model)(inputs, x)
    model.compile("sgd", "mse")
    return model, layers


def by_hand(layers, names):
    x, entropies = PROBE, []
    for layer in layers:
        x = layer(x, training=False) if layer.name == "noise" else layer(x)
        if layer.name in names:
            entropies.append(oracle.batch_entropy(x))
    return entropies


@pytest.mark.parametrize(
    ("lbe", "selection", "names"),
    [
        (True, None, ["one", "two"]),
        (False, None, ["one", "two", "out"]),
        (True, keras.layers.ReLU, ["relu"]),
        (False, ["relu", "one"], ["one", "relu"]),
    ],
)
@pytest.mark.parametrize("eagerly", [False, True])
def test_values(lbe, selection, names, eagerly):
    model, layers = network(lbe)
    model.compile("sgd", "mse", run_eagerly=eagerly)
    logger = BatchEntropyLogger(PROBE, selection)
    history = model.fit(X, Y, epochs=2, callbacks=[logger], verbose=0).history
    assert logger.names == names
    assert logger.epochs == [0, 1]
    expected = by_hand(layers, names)
    np.testing.assert_allclose(logger.values[-1], expected, rtol=1e-5, atol=1e-7)
    assert history["batch_entropy"] == logger.values
    assert history["h_avg"][-1] == pytest.approx(np.mean(expected), rel=1e-5)
    assert history["h_out"][-1] == pytest.approx(expected[-1], rel=1e-5, abs=1e-7)
    assert history["h_positive"][-1] == sum(h > 0 for h in expected)


def test_layers_that_were_built_before_lbe_was_put_on_them():
    plain, layers = network(False)
    model = add_lbe(plain, ["one", "two"])
    model.compile("sgd", "mse")
    logger = BatchEntropyLogger(PROBE)
    for _ in range(2):
        model.fit(X, Y, callbacks=[logger], verbose=0)
    expected = by_hand(layers, ["one", "two"])
    np.testing.assert_allclose(logger.values[-1], expected, rtol=1e-5, atol=1e-7)
    assert len(model.lbe_regularizers) == 2


def test_dead_layer_is_not_counted():
    model, _ = network(True)
    logger = BatchEntropyLogger(PROBE, ["one", "relu"])
    history = model.fit(X, Y, callbacks=[logger], verbose=0).history
    assert history["h_positive"] == [1]
    assert history["h_out"] == [0.0]


def test_files(tmp_path):
    model, _ = network(True)
    arguments = {
        "csv": tmp_path / "new" / "entropy.csv",
        "tensorboard": tmp_path / "board",
        "plot": tmp_path / "new" / "entropy.png",
    }
    first = BatchEntropyLogger(PROBE, **arguments)
    model.fit(X, Y, epochs=2, callbacks=[first], verbose=0)
    second = BatchEntropyLogger(PROBE, **arguments)  # resumes
    model.fit(X, Y, epochs=3, initial_epoch=2, callbacks=[second], verbose=0)

    with arguments["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    for row, values in zip(rows, first.values + second.values, strict=True):
        assert [float(row["one"]), float(row["two"])] == values
        assert float(row["h_avg"]) == pytest.approx(np.mean(values))

    logged = {}
    for path in sorted(arguments["tensorboard"].iterdir()):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                number = float(tf.make_ndarray(value.tensor))
                logged.setdefault(value.tag, []).append((event.step, number))
    expected = [(epoch, float(row["two"])) for epoch, row in enumerate(rows)]
    assert sorted(logged["batch_entropy/layers/two"]) == expected
    assert len(logged["batch_entropy/h_avg"]) == 3

    assert arguments["plot"].read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "entropy.csv",
        "entropy.png",
    ]


def test_layers_given_as_an_iterator_serve_more_than_once():
    logger = BatchEntropyLogger(PROBE, iter(["one", "relu"]))
    for _ in range(2):
        model, _ = network(True)
        model.fit(X, Y, callbacks=[logger], verbose=0)
        assert logger.names == ["one", "relu"]


def test_a_csv_file_of_other_layers_is_left_alone(tmp_path):
    path = tmp_path / "entropy.csv"
    model, _ = network(True)
    model.fit(X, Y, callbacks=[BatchEntropyLogger(PROBE, csv=path)], verbose=0)
    content = path.read_bytes()
    other = BatchEntropyLogger(PROBE, ["relu"], csv=path)
    with pytest.raises(ValueError, match=r"other columns.*'relu'.*Received.*'two'"):
        model.fit(X, Y, callbacks=[other], verbose=0)
    assert path.read_bytes() == content


def test_measuring_needs_a_model():
    with pytest.raises(ValueError, match="Received: no model"):
        BatchEntropyLogger(PROBE).measure()


def test_training_is_the_same_with_and_without_it():
    results = []
    for callbacks in ([], [BatchEntropyLogger(PROBE)]):
        keras.utils.set_random_seed(7)
        extra = [keras.layers.Dropout(0.5), keras.layers.BatchNormalization()]
        model, _ = network(True, extra)
        model.fit(X, Y, epochs=3, batch_size=4, callbacks=callbacks, verbose=0)
        results.append(model.get_weights())
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_it_traces_once():
    model, _ = network(True)
    calls = []
    model.layers[1].activation = lambda x: calls.append(x) or x
    logger = BatchEntropyLogger(PROBE)
    logger.set_model(model)
    for epoch in range(3):
        logger.on_epoch_end(epoch, {})
    assert len(calls) == 1


def test_no_layer_to_observe():
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.ReLU()(inputs))
    logger = BatchEntropyLogger(PROBE)
    logger.set_model(model)
    with pytest.raises(ValueError, match="No layer matches"):
        logger.measure()


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="Received: 0 epochs"):
        BatchEntropyLogger(PROBE).plot(tmp_path / "entropy.png")
