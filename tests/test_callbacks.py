# SPDX-License-Identifier: Apache-2.0
"""`BatchEntropyLogger`: its numbers against NumPy, its files, and its side effects."""

import csv

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import samples

from lbe_ops import (
    BatchEntropyLogger,
    Dense_LBE,
    LBEModel,
    add_lbe,
    effective_rank,
    mean_cosine,
)
from lbe_ops.measure import MEASURES

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


def read_board(folder):
    """What TensorBoard shows: of each tag its steps and values."""
    logged = {}
    for path in sorted(folder.iterdir()):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                number = float(tf.make_ndarray(value.tensor))
                logged.setdefault(value.tag, []).append((event.step, number))
    return logged


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
    assert list(rows[0])[4:] == [
        *("one", "two", "one/effective_rank", "two/effective_rank"),
        *("one/mean_cosine", "two/mean_cosine"),
    ]
    ranks = first.measured["effective_rank"] + second.measured["effective_rank"]
    for row, values in zip(rows, ranks, strict=True):
        assert float(row["two/effective_rank"]) == values[1]
    for row, values in zip(rows, first.values + second.values, strict=True):
        assert [float(row["one"]), float(row["two"])] == values
        assert float(row["h_avg"]) == pytest.approx(np.mean(values))

    logged = read_board(arguments["tensorboard"])
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


OLD = ["epoch", "h_avg", "h_out", "h_positive", "one", "two"]


def test_a_file_with_entropies_alone_goes_on(tmp_path):
    path = tmp_path / "entropy.csv"
    path.write_text(",".join(OLD) + "\n0,1.5,2.0,2,1.0,2.0\n")
    model, _ = network(True)
    logger = BatchEntropyLogger(PROBE, csv=path)
    model.fit(X, Y, callbacks=[logger], verbose=0)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == OLD
    assert rows[1] == ["0", "1.5", "2.0", "2", "1.0", "2.0"]
    assert [float(x) for x in rows[2][4:]] == logger.values[0]
    assert "effective_rank" in model.history.history


def test_entropy_alone(tmp_path):
    """The files, the history and the tags of TensorBoard are those without the rest."""
    path = tmp_path / "entropy.csv"
    model, _ = network(True)
    arguments = {"csv": path, "tensorboard": tmp_path / "board"}
    logger = BatchEntropyLogger(PROBE, measures=(), **arguments)
    history = model.fit(X, Y, callbacks=[logger], verbose=0).history
    assert path.read_text().splitlines()[0] == ",".join(OLD)
    own = {"h_avg", "h_out", "h_positive", "batch_entropy"}
    assert set(history) == {"loss", "ce", "lbe", "max_lbe", *own}
    names = ["h_avg", "h_out", "h_positive", "layers/one", "layers/two"]
    tags = {f"batch_entropy/{name}" for name in names}
    assert set(read_board(arguments["tensorboard"])) == tags


@pytest.mark.parametrize("measures", ["ranks", ["gradient_norm"]])
def test_unknown_measures(measures):
    with pytest.raises(ValueError, match=f"Unknown measures.*{measures[0]}"):
        BatchEntropyLogger(PROBE, measures=measures)


class Subclassed(keras.Model):
    """Calls one of its layers twice, and a model of its own."""

    def __init__(self):
        super().__init__()
        self.one = keras.layers.Dense(5, name="one")
        self.net = keras.Sequential([keras.layers.Dense(4, "relu", name="inside")])
        self.out = keras.layers.Dense(2, name="out")

    def call(self, x):
        return self.out(self.net(self.one(self.one(x))))


def functional(lbe=False):
    model, layers = network(lbe)
    layers[1].bias.assign([0.0, 0.0, 0.0])  # it is dead otherwise
    return model


def lbe():
    return functional(True)


def mixed():
    layers = [keras.layers.Dense(n, dtype="mixed_float16") for n in (4, 3)]
    out = keras.layers.Dense(2, dtype="float32", name="out")
    model = keras.Sequential([keras.Input((5,)), *layers, out])
    adam = keras.optimizers.Adam()
    model.compile(keras.optimizers.LossScaleOptimizer(adam), "mse")
    return model


def convolutions():
    layers = [
        keras.layers.Reshape((5, 1, 1)),
        keras.layers.Conv2D(3, 1, activation="tanh", name="conv"),
        keras.layers.Conv2D(2, (5, 1), name="conv2"),
        keras.layers.Flatten(),
        keras.layers.Dense(2, name="out"),
    ]
    return keras.Sequential([keras.Input((5,)), *layers])


def nested():
    inner = keras.Sequential([keras.Input((5,)), Dense_LBE(4, name="deep")])
    inputs = keras.Input((5,))
    return LBEModel(inputs, keras.layers.Dense(2)(inner(inputs)))


KINDS = {
    "functional": (functional, ["one", "two", "out"]),
    "subclassed": (Subclassed, ["one", "one (2)", "inside", "out"]),
    "lbe": (lbe, ["one", "two"]),
    "mixed": (mixed, None),
    "convolutions": (convolutions, ["conv", "conv2", "out"]),
    "nested": (nested, ["deep"]),
}


@pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_measure_of_every_kind_of_model(kind, tmp_path):
    make, names = KINDS[kind]
    model = make()
    if not model.compiled:
        model.compile("sgd", "mse")
    arguments = {
        "csv": tmp_path / "health.csv",
        "tensorboard": tmp_path / "board",
        "plot": tmp_path / "health.png",
    }
    targets = samples(9, 2, seed=3)
    logger = BatchEntropyLogger(PROBE, measures=MEASURES, targets=targets, **arguments)
    history = model.fit(X, Y, epochs=3, callbacks=[logger], verbose=0).history
    if names is not None:
        assert [name.split("/")[-1] for name in logger.names] == names
    assert set(logger.measured) == {*MEASURES, "gradient_norm"}
    board = read_board(arguments["tensorboard"])
    with arguments["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    for measure, values in logger.measured.items():
        assert np.shape(values) == (3, len(logger.names))
        assert np.isfinite(values).all()
        assert history[measure] == values
        for place, name in enumerate(logger.names):
            expected = [epoch[place] for epoch in values]
            column = name if measure == "batch_entropy" else f"{name}/{measure}"
            assert [float(row[column]) for row in rows] == expected
            assert sorted(board[f"{measure}/layers/{name}"]) == [
                (step, pytest.approx(value)) for step, value in enumerate(expected)
            ]
    assert np.min(logger.measured["gradient_norm"]) > 0
    assert logger.values is logger.measured["batch_entropy"]
    assert arguments["plot"].read_bytes().startswith(b"\x89PNG")


def test_measures_are_those_of_the_outputs():
    model, layers = network(False)
    logger = BatchEntropyLogger(PROBE)
    model.fit(X, Y, callbacks=[logger], verbose=0)
    x, outputs = PROBE, []
    for layer in layers:
        x = layer(x)
        outputs.append(np.float64(x))
    outputs = [outputs[i] for i in (0, 1, 3)]  # those with a kernel
    for name, function in {
        "effective_rank": effective_rank,
        "mean_cosine": mean_cosine,
    }.items():
        expected = [float(function(x)) for x in outputs]
        np.testing.assert_allclose(logger.measured[name][0], expected, rtol=1e-4)


def test_training_is_the_same_with_and_without_gradients():
    results = []
    for targets in (None, samples(9, 2, seed=3)):
        keras.utils.set_random_seed(7)
        extra = [keras.layers.Dropout(0.5), keras.layers.BatchNormalization()]
        model, _ = network(True, extra)
        logger = BatchEntropyLogger(PROBE, targets=targets)
        fit = {"epochs": 3, "batch_size": 4, "callbacks": [logger], "verbose": 0}
        losses = model.fit(X, Y, **fit).history["loss"]
        results.append([*model.get_weights(), losses])
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_a_picture_of_what_is_not_finite_or_zero(tmp_path):
    """Dead layers, and ones without a gradient, stay blank; nothing warns."""
    model, _ = network(True)
    selection = ["one", "two", "relu"]
    logger = BatchEntropyLogger(PROBE, selection, targets=samples(9, 2))
    model.fit(X, Y, callbacks=[logger], verbose=0)
    assert np.isnan(logger.measured["gradient_norm"][0][2])
    model.set_weights([np.nan * w for w in model.get_weights()])
    logger.on_epoch_end(1)
    logger.plot(tmp_path / "health.png")
    assert (tmp_path / "health.png").read_bytes().startswith(b"\x89PNG")
