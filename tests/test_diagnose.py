# SPDX-License-Identifier: Apache-2.0
"""`diagnose` on real nets: each illness, and healthy ones."""

import importlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import samples

from lbe_ops import Diagnosis, LBEModel, add_lbe, diagnose, effective_rank
from lbe_ops.initializers import LooksLinear

# Keras reads a variable into NumPy 2 in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

module = importlib.import_module("lbe_ops.diagnose")
X, Y = samples(256, 20), np.arange(256) % 10

INITIALIZERS = {
    "glorot": lambda i: keras.initializers.GlorotUniform(i),
    "he": lambda i: keras.initializers.HeNormal(i),
    "he x 1.4": lambda i: keras.initializers.VarianceScaling(4.0, seed=i),
    "orthogonal": lambda i: keras.initializers.Orthogonal(seed=i),
    "orthogonal x 1.4": lambda i: keras.initializers.Orthogonal(2**0.5, seed=i),
    "looks linear": lambda i: LooksLinear(first=i == 0, seed=i),
}
CASES = [
    ("relu", "glorot", 100, "scale gone"),
    ("sigmoid", "glorot", 30, "scale gone"),
    ("gelu", "he", 100, "scale gone"),
    ("relu", "he", 100, "rank gone"),
    ("relu", "orthogonal x 1.4", 100, "rank gone"),
    ("tanh", "he", 100, "exploding"),
    ("tanh", "orthogonal x 1.4", 100, "exploding"),
    ("relu", "he x 1.4", 100, "exploding"),
    # These have lost their rank as well, for fewer layers, and train.
    ("relu", "he", 50, "fine"),
    ("tanh", "glorot", 100, "fine"),
    ("relu", "looks linear", 100, "fine"),
    ("tanh", "orthogonal", 100, "fine"),
    ("relu", "glorot", 3, "fine"),
    ("relu", "he", 3, "fine"),
    ("tanh", "he", 3, "fine"),
    ("sigmoid", "glorot", 3, "fine"),
]


def net(activation, initializer, depth, head=10, width=64, **options):
    make = INITIALIZERS[initializer]
    hidden = [
        keras.layers.Dense(width, activation, kernel_initializer=make(i), name=f"h{i}")
        for i in range(depth)
    ]
    out = keras.layers.Dense(
        head, kernel_initializer=INITIALIZERS["glorot"](depth), name="head"
    )
    model = keras.Sequential([keras.Input((20,)), *hidden, out])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, **options)
    return model


@pytest.mark.parametrize(("activation", "initializer", "depth", "illness"), CASES)
def test_illness(activation, initializer, depth, illness):
    model = net(activation, initializer, depth)
    printed = []
    diagnosis = diagnose(model, X, Y, print_fn=printed.append)
    assert diagnosis.illness == illness
    assert diagnosis.remedy == module.REMEDIES[illness]
    assert len(diagnosis.layers) == depth + 1
    assert printed == [str(diagnosis)]
    assert f"{illness}: {diagnosis.evidence}" in printed[0]
    assert "not measured" not in printed[0]


def test_every_illness_has_a_case():
    assert {case[-1] for case in CASES} == set(module.REMEDIES)


def test_without_targets():
    explodes = net("tanh", "orthogonal x 1.4", 100)
    diagnosis = diagnose(explodes, X, print_fn=None)
    assert diagnosis.illness == "fine"  # as far as it goes
    assert "Gradients were not measured" in diagnosis.evidence
    assert diagnosis.layers[0].gradient_norm is None
    never_compiled = keras.Sequential([keras.Input((20,)), keras.layers.Dense(3)])
    assert diagnose(never_compiled, X, print_fn=None).illness == "fine"
    with pytest.raises(ValueError, match="compiled loss"):
        diagnose(never_compiled, X, Y, print_fn=None)


def test_a_data_set_is_refused():
    model, data = net("relu", "he", 3), tf.data.Dataset.from_tensor_slices((X, Y))
    with pytest.raises(TypeError, match=r"x, y = next\(iter\(dataset\)\)"):
        diagnose(model, data.batch(64))
    x, y = next(iter(data.batch(64)))
    assert diagnose(model, x, y, print_fn=None).illness == "fine"


def test_rows_and_table(capsys):
    diagnosis = diagnose(net("relu", "he", 100), X, Y)
    lines = capsys.readouterr().out.splitlines()
    assert isinstance(diagnosis, Diagnosis)
    rows = [line.split() for line in lines[1 : module.ROWS + 1]]
    assert [rows[0][1].split("/")[-1], rows[-1][1].split("/")[-1]] == ["h0", "head"]
    assert lines[module.ROWS + 1] == f"({module.ROWS} of 101 layers)"
    shown = [int(row[0]) for row in rows]
    assert shown == sorted(set(shown)) and shown[0] == 1 and shown[-1] == 101
    for number, name, *cells in rows:
        layer = diagnosis.layers[int(number) - 1]
        assert layer.name == name
        expected = [layer.batch_entropy, layer.effective_rank, layer.mean_cosine]
        expected += [layer.rms, layer.deviation, layer.dead_share, layer.gradient_norm]
        np.testing.assert_allclose([float(c) for c in cells], expected, rtol=6e-3)
    few = diagnose(net("relu", "he", 3), X, print_fn=None)
    lines = str(few).splitlines()
    assert len(lines) == 1 + 4 + 2
    assert lines[1].split()[-1] == "-"


def test_numbers_are_those_of_the_layers():
    model = net("tanh", "he", 3)
    first = diagnose(model, X, Y, print_fn=None).layers[0]
    out = np.float64(model.layers[0](X))
    assert first.rms == pytest.approx(np.sqrt((out**2).mean()), rel=1e-5)
    assert first.effective_rank == pytest.approx(float(effective_rank(out)), rel=1e-5)
    assert first.deviation == pytest.approx(np.sqrt(out.var(0).mean()), rel=1e-5)


def test_what_is_not_finite():
    model = net("relu", "he", 3)
    weights = model.get_weights()
    model.set_weights([1e30 * w for w in weights])
    diagnosis = diagnose(model, X, Y, print_fn=None)
    assert diagnosis.illness == "exploding"
    assert "not finite" in diagnosis.evidence
    model.set_weights([np.nan * w for w in weights])
    assert diagnose(model, X, print_fn=None).illness == "exploding"


def test_gradients_that_vanish_on_their_way_back():
    """The forward pass alone looks healthy."""

    @tf.custom_gradient
    def one_way(x):
        return tf.identity(x), lambda dy: 1e-9 * dy

    model = net("relu", "looks linear", 12)
    model.layers[5].activation = lambda x: one_way(tf.nn.relu(x))
    assert diagnose(model, X, print_fn=None).illness == "fine"
    diagnosis = diagnose(model, X, Y, print_fn=None)
    assert diagnosis.illness == "scale gone"
    assert "the gradient falls backwards" in diagnosis.evidence


def test_a_head_that_starts_from_zeros_is_no_illness():
    model = net("relu", "looks linear", 20)
    head = model.layers[-1]
    head.set_weights([np.zeros_like(w) for w in head.get_weights()])
    diagnosis = diagnose(model, X, Y, print_fn=None)
    assert diagnosis.illness == "fine"
    assert {layer.gradient_norm for layer in diagnosis.layers[:-1]} == {0.0}


def test_two_classes_told_apart_are_no_illness():
    keras.utils.set_random_seed(3)
    model = net("relu", "he", 4, head=1)
    model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))
    y = (X[:, :1] > 0).astype("float32")
    model.fit(X, y, epochs=30, verbose=0)
    diagnosis = diagnose(model, X, y, print_fn=None)
    assert diagnosis.layers[-1].effective_rank == pytest.approx(1, abs=1e-5)
    assert diagnosis.illness == "fine"


def test_normalization_cures_scale():
    """In training it takes the statistics of the batch; before, it has none yet."""
    layers = [keras.Input((20,))]
    for i in range(30):
        layers.append(keras.layers.Dense(64, kernel_initializer=INITIALIZERS["he"](i)))
        layers += [
            keras.layers.BatchNormalization(),
            keras.layers.Activation("sigmoid"),
        ]
    model = keras.Sequential([*layers, keras.layers.Dense(10)])
    before = model.get_weights()
    diagnosis = diagnose(model, X, print_fn=None)
    assert diagnosis.illness != "scale gone"
    assert diagnosis.layers[-2].deviation > 0.1
    for ours, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, expected)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.deep = net("relu", "glorot", 40)
        self.head = keras.layers.Dense(2)

    def call(self, x):
        return self.head(self.deep(x))


@pytest.mark.parametrize("eagerly", [False, True])
def test_subclassed_models_before_they_are_built(eagerly):
    model = Subclassed()
    model.compile("sgd", "mse", run_eagerly=eagerly)
    diagnosis = diagnose(model, X, samples(256, 2), print_fn=None)
    assert diagnosis.illness == "scale gone"
    assert len(diagnosis.layers) == 42


def test_convolutions_in_mixed_precision():
    def conv(i):
        initializer = keras.initializers.GlorotUniform(i)
        return keras.layers.Conv2D(
            8, 3, padding="same", activation="relu", dtype="mixed_float16",
            kernel_initializer=initializer,
        )  # fmt: skip

    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            *(conv(i) for i in range(4)),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), loss)
    diagnosis = diagnose(model, samples(32, 8, 8, 3), Y[:32], print_fn=None)
    assert diagnosis.illness == "fine"
    assert all(layer.gradient_norm > 0 for layer in diagnosis.layers)


def test_lbe_models():
    """All layers with a kernel are judged, and LBE stays as it is."""
    plain = net("relu", "he", 100)
    expected = diagnose(plain, X, Y, print_fn=None)
    model = add_lbe(plain, ["h1", "h50"])
    model.compile("adam", plain.loss, run_eagerly=True)  # it is trained once
    assert isinstance(model, LBEModel)
    diagnosis = diagnose(model, X, Y, print_fn=None)
    assert diagnosis.illness == "rank gone"
    for ours, theirs in zip(diagnosis.layers, expected.layers, strict=True):
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-4)
    assert len(model.lbe_regularizers) == 2
    assert "lbe" in model.fit(X, Y, 256, verbose=0).history


def test_layers_of_choice():
    model = net("relu", "he", 3)
    diagnosis = diagnose(model, X, layers=["h1"], print_fn=None)
    assert [layer.name.split("/")[-1] for layer in diagnosis.layers] == ["h1"]
    with pytest.raises(ValueError, match="There is no such layer"):
        diagnose(model, X, layers=["h9"])
    with pytest.raises(tf.errors.InvalidArgumentError, match="at least 2 samples"):
        diagnose(model, X[:1])
    without = keras.Sequential([keras.Input((20,)), keras.layers.ReLU()])
    with pytest.raises(ValueError, match="No layer"):
        diagnose(without, X)
