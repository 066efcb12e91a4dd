# SPDX-License-Identifier: Apache-2.0
"""The experiments: data, nets, the command, and resuming to the same numbers."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from helpers import TINY, left_to_long

import lbe_ops
from lbe_ops.experiments import command, data, nets, plots, results
from lbe_ops.experiments.errors import ExperimentError
from lbe_ops.experiments.settings import PRESETS, Settings
from lbe_ops.experiments.tasks import Classification, Reconstruction, task_of

# Keras' own conversion of variables for .weights.h5, under NumPy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture
def run(npz, tmp_path, capsys, monkeypatch):
    """Runs the command; its status, standard output and standard error."""

    def run(*arguments: object, draw: bool = False) -> tuple[int, str, str]:
        if not draw:  # takes longer than the training
            monkeypatch.setattr(plots, "draw", lambda *arguments: None)
        monkeypatch.setattr(data, "SOURCES", data.SOURCES[:2])  # of text
        words = ["--data", str(npz), *TINY.split(), "--output", str(tmp_path / "run")]
        status = command.main([*words, *map(str, arguments)])
        return (status, *capsys.readouterr())

    return run


def history(folder: pathlib.Path, net: str) -> list[dict[str, float]]:
    """The rows of a history, without the one column that is not reproducible."""
    rows = json.loads((folder / net / "history.json").read_text())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def checkpoint(folder: pathlib.Path, net: str) -> dict[str, np.ndarray]:
    with np.load(folder / net / "checkpoint.npz") as saved:
        return {key: saved[key] for key in saved if key != "progress"}


def assert_same_run(a: pathlib.Path, b: pathlib.Path, net: str) -> None:
    """The same bits: history, weights and the state of the optimizer."""
    assert history(a, net) == history(b, net)
    first, second = checkpoint(a, net), checkpoint(b, net)
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


# Data


def test_digits_are_split_once_and_for_all():
    digits = data.load("digits")
    assert digits.x_train.shape == (1437, 8, 8, 1)
    assert digits.x_test.shape == (360, 8, 8, 1)
    assert digits.x_train.dtype == np.float32
    assert (digits.x_train.min(), digits.x_train.max()) == (0, 1)
    assert digits.classes == 10
    counts = np.bincount(digits.y_test)
    assert counts.min() >= 35 and counts.max() <= 37
    assert digits.chance == pytest.approx(37 / 360)
    assert digits.describe() == data.load("digits").describe()


def test_local_file_is_scaled(npz):
    raw = np.load(npz)
    unit, symmetric = data.load(str(npz)), data.load(str(npz), "symmetric")
    expected = raw["x_train"][..., None].astype(np.float32)
    np.testing.assert_array_equal(unit.x_train, expected / 255)
    np.testing.assert_allclose(symmetric.x_train, expected / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(unit.y_test, raw["y_test"])
    assert unit.describe()["crc32"] != symmetric.describe()["crc32"]


def test_floating_point_stays_as_it_is_or_is_refused(npz, tmp_path):
    standardized = np.random.default_rng(0).normal(size=(150, 6, 6))
    path = changed(npz, tmp_path, x_train=standardized)
    expected = standardized[..., None].astype(np.float32)
    np.testing.assert_array_equal(data.load(path).x_train, expected)
    with pytest.raises(
        ExperimentError, match=r"symmetric .* x_train must lie in \[0, 1"
    ):
        data.load(path, "symmetric")
    path = changed(npz, tmp_path, x_train=X + 0.25, x_test=np.load(npz)["x_test"])
    assert (data.load(path, "symmetric").x_train == -0.5).all()


def changed(npz: pathlib.Path, folder: pathlib.Path, **arrays: object) -> str:
    content = {**np.load(npz), **arrays}
    path = folder / "changed.npz"
    np.savez(path, **{k: v for k, v in content.items() if v is not None})
    return str(path)


X = np.zeros((150, 6, 6), np.float32)
BAD_ARRAYS = {
    "missing key": ({"y_test": None}, "lacks y_test"),
    "objects": ({"x_train": np.array([None, {}])}, "plain arrays"),
    "dtype": ({"x_train": X.astype(np.int64)}, "must be uint8 or floating point"),
    "rank": ({"x_train": np.zeros(150, np.uint8)}, "must have the shape"),
    "nan": ({"x_train": np.where(X == 0, np.nan, X)}, "NaN"),
    "too large": ({"x_train": np.full(X.shape, 1e300)}, "more than float32 can hold"),
    "length": ({"x_train": X[:149]}, "the same length"),
    "sample shape": ({"x_train": X[:, :5]}, "differ in shape"),
    "float labels": ({"y_train": np.zeros(150)}, "integer labels"),
    "negative label": ({"y_train": np.full(150, -1)}, "must not be negative"),
    "unknown label": ({"y_test": np.full(40, 3)}, "highest label of 3"),
    "huge label": ({"y_train": np.arange(150) + 10**6}, "highest label"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_unfit_data_are_refused(npz, tmp_path, case):
    arrays, message = BAD_ARRAYS[case]
    with pytest.raises(ExperimentError, match=message):
        data.load(changed(npz, tmp_path, **arrays))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.npz", None, "No such file"),
        ("text.npz", b"no archive", "not an .npz"),
        ("empty.npz", b"", "not an .npz"),
        ("cut.npz", "half", "damaged|not an .npz"),
        ("array.npz", "npy", "not an .npz"),
        ("header.npz", "header", "damaged|not an .npz"),
        ("folder/x.npz", "folder", "directory"),
        ("what", None, "--data must be one of digits"),
    ],
)
def test_unreadable_files_are_refused(npz, tmp_path, name, content, message):
    path = tmp_path / name
    if content == "half":
        path.write_bytes(npz.read_bytes()[:3000])
    elif content == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif content == "header":  # which NumPy's parser does not get to the end of
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,"
        array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        with zipfile.ZipFile(path, "w") as archive:
            for key in data.KEYS:
                archive.writestr(f"{key}.npy", array)
    elif content == "folder":
        path.mkdir(parents=True)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ExperimentError, match=message) as error:
        data.load(str(path) if name.endswith("npz") else name)
    assert "\n" not in str(error.value)


def test_failing_download_names_the_alternative(monkeypatch):
    def load_data():
        raise Exception("URL fetch failure on https://x: no network\nmore")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", load_data)
    with pytest.raises(ExperimentError, match=r"no network.*--data mnist\.npz"):
        data.load("mnist")


# Settings


def test_presets_and_overriding():
    port = Settings(**PRESETS["port-mnist"])
    for name, values in PRESETS.items():
        assert Settings(**values).default_name() == name
    for name in ("demo", "vae", "transformer"):
        assert f"`{name}`" in command.DESCRIPTION
    assert (port.depth, port.width, port.batch_size, port.epochs) == (500, 128, 512, 50)
    assert (port.lbe_alpha, port.lbe_alpha_min, port.lbe_beta) == (3.0, 0.3, 1.0)
    assert port.lbe_strength == 1.5 / 512
    assert (port.learning_rate, port.beta_1, port.global_clipnorm) == (1e-4, 0.95, 1)
    assert port.schedule == "constant" and port.reduce_lr and port.lbe_input
    assert Settings().default_name() == "mnist"
    demo = Settings(**PRESETS["demo"])
    assert (demo.data, demo.activation) == ("digits", "gelu")
    assert demo.default_name() == "demo"
    shorter = Settings.from_mapping({**PRESETS["demo"], "epochs": 3})
    assert shorter.default_name().startswith("digits-dense-50x64-")
    assert port.default_name() == "port-mnist"
    other = Settings.from_mapping({**PRESETS["port-mnist"], "depth": 4, "nets": []})
    assert (other.depth, other.width) == (4, 128)
    assert other.default_name().startswith("mnist-dense-4x128-")
    longer = Settings.from_mapping({**other.as_dict(), "epochs": 99})
    assert longer.default_name() == other.default_name()


@pytest.mark.parametrize("model", ["dense", "conv"])
def test_a_looks_linear_net_starts_as_a_linear_isometry(model):
    """However deep: the pairs of the last layer hold the (float32) input, rotated."""
    settings = Settings(
        model=model, depth=60, width=16, dtype="float64", initializer="looks_linear"
    )
    shape = (2, 3, 1) if model == "dense" else (4, 4, 3)
    net = nets.build(settings, shape, 2, lbe=False)
    last = keras.Model(net.input, net.get_layer("hidden_60").output)
    x = np.random.default_rng(0).normal(size=(5, *shape))
    positive, negative = np.split(np.array(last(x)), 2, axis=-1)
    linear = (positive - negative).reshape(5, -1)
    flat = x.reshape(5, -1)
    np.testing.assert_allclose(linear @ linear.T, flat @ flat.T, rtol=1e-5, atol=1e-5)


BAD_INITIALIZER = (
    "--initializer must be looks_linear, critical_orthogonal, lsuv or one that Keras "
    "knows, such as"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--depth 0", "--depth must be at least 1. Received: 0"),
        ("--batch-size 1", "--batch-size must be at least 2"),
        ("--learning-rate nan", "--learning-rate must be finite"),
        ("--lbe-strength -1", "--lbe-strength must be finite and >= 0"),
        ("--activation sine", "--activation must be"),
        ("--initializer he", "--initializer must be"),
        ("--clipnorm 1", "--clipnorm and --global-clipnorm exclude each other"),
        ("--data other.npz", "other.npz cannot be read: No such file"),
        ("--schedule cosine --reduce-lr", "--reduce-lr needs --schedule constant"),
        ("--resume somewhere", "--resume and --output exclude each other"),
        ("--initializer stft", "--initializer stft with --activation relu makes no"),
        ("--initializer constant", f"{BAD_INITIALIZER} he_normal. Received: constant"),
        ("--initializer looks_linaer", f"{BAD_INITIALIZER} he_normal. Received: looks"),
        ("--initializer glorot_unifrom", f"{BAD_INITIALIZER} glorot_uniform. Received"),
        (
            "--activation rely",
            "--activation must be one that Keras knows, such as relu",
        ),
        ("--model conv --initializer identity", "--initializer identity with"),
        ("--activation glu", "--initializer glorot_uniform with --activation glu"),
        ("--initializer looks_linear --width 7", "--initializer looks_linear with"),
        ("--model transformer", "--model transformer needs --data text, and"),
        ("--data text", "--model transformer needs --data text, and --data text"),
        ("--native require --lbe-variant units", "--lbe-variant must be one that"),
        ("--model transformer --data text --norm batch", "--norm must be none, layer"),
        ("--norm post_layer", "--norm must be none, batch or layer"),
        ("--model transformer --data text --heads 3", "--heads must be a divisor of"),
        ("--model vae --latent 0", "--latent must be at least 1"),
    ],
)
def test_bad_arguments_end_in_one_line(run, arguments, message):
    status, _, error = run(*arguments.split())
    assert status == 2
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_bad_environment_variable_ends_in_one_line(run, monkeypatch):
    monkeypatch.setenv("LBE_OPS_NATIVE", "yes")
    status, _, error = run()
    assert status == 2
    assert error.startswith("error: LBE_OPS_NATIVE must be 1")
    assert error.count("\n") == 1


def test_unknown_choice_is_refused(run):
    with pytest.raises(SystemExit) as exit:
        run("--model", "recurrent")
    assert exit.value.code == 2


def test_what_is_not_installed_is_named(run, monkeypatch):
    find_spec, missing = importlib.util.find_spec, ("rich", "sklearn")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n in missing else find_spec(n)
    )
    status, _, error = run("--data", "digits")
    assert status == 2
    names = "rich, scikit-learn"
    assert error == (
        f"error: {names} not installed; pip install {names.replace(',', '')}\n"
    )


def test_required_native_op_that_is_not_there_is_told(run, monkeypatch):
    missing = lbe_ops.native.Native(None, "it is not there.")
    monkeypatch.setattr(lbe_ops.native, "load", lambda: missing)
    status, _, error = run("--native", "require")
    assert status == 2
    assert "it is not there." in error and error.count("\n") == 1


# Nets


@pytest.mark.parametrize("model", ["dense", "conv"])
def test_initial_weights_are_those_without_lbe(model):
    settings = Settings(depth=4, width=6, model=model, lbe_input=True)
    plain = nets.build(settings, (6, 6, 1), 3, lbe=False)
    lbe = nets.build(settings, (6, 6, 1), 3, lbe=True)
    assert type(plain) is not type(lbe)
    assert len(lbe.lbe_regularizers) == 4 + 1
    kernels = [w for w in lbe.weights if not w.path.endswith("lbe_alpha")]
    assert len(kernels) == len(plain.weights) == 2 * 5
    for one, other in zip(plain.weights, kernels, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    hidden = [w.numpy() for w in plain.weights if w.path.startswith("hidden")]
    assert not np.array_equal(hidden[2], hidden[4])  # every layer has its own seed
    again = nets.build(
        Settings(depth=4, width=6, model=model, seed=2), (6, 6, 1), 3, lbe=False
    )
    assert not np.array_equal(again.weights[0].numpy(), plain.weights[0].numpy())


def test_convolutions_need_images():
    with pytest.raises(ExperimentError, match="needs images"):
        nets.build(Settings(model="conv", depth=1), (7,), 3, lbe=False)


@pytest.mark.parametrize("lbe", [False, True])
def test_entropies_over_depth(lbe):
    settings = Settings(depth=3, width=4, activation="relu")
    net = nets.build(settings, (2, 2, 1), 3, lbe=lbe)
    x = np.random.default_rng(0).random((16, 2, 2, 1), np.float32)
    expected, y = [], x.reshape(16, 4).astype(np.float64)
    for number in (1, 2, 3):
        kernel, bias = (
            w.numpy().astype(np.float64)
            for w in net.get_layer(f"hidden_{number}").weights[:2]
        )
        y = np.maximum(y @ kernel + bias, 0)
        expected.append(np.mean(np.log(np.pi * np.e * y.var(axis=0) + 1) / 2))
    entropies = nets.entropies(net, x)
    np.testing.assert_allclose(entropies(), expected, rtol=1e-4)
    y = np.zeros(16, np.int32)
    loss = net.evaluate(x, y, verbose=0)[0]
    entropies()
    assert net.evaluate(x, y, verbose=0)[0] == loss


@pytest.mark.parametrize("lbe", [False, True])
def test_steps_are_traced_once(npz, lbe):
    """Twice, where a metric makes its variables in the first step."""
    patterns = data.load(str(npz))
    net = nets.build(Settings(depth=2, width=4), patterns.shape, 3, lbe)
    traces = []
    train_step, test_step = net.train_step, net.test_step
    net.train_step = lambda batch: traces.append("train") or train_step(batch)
    net.test_step = lambda batch: traces.append("test") or test_step(batch)
    for _ in range(2):
        net.fit(
            patterns.x_train,
            patterns.y_train,
            batch_size=64,  # the last one is smaller
            validation_data=(patterns.x_test, patterns.y_test),
            verbose=0,
        )
    assert traces == ["train", "test"]


# The kinds of nets, each after its formula in float64


def in_float64(net: keras.Model) -> dict[str, list[np.ndarray]]:
    """The kernel and bias of each layer that has them, or what else its weights are."""
    return {
        layer.name: [
            w.numpy().astype(np.float64)
            for w in layer.weights
            if not w.path.endswith("lbe_alpha")
        ]
        for layer in net.layers
        if layer.weights
    }


def dense(x: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    return x @ weights[0] + weights[1]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def normalized(x: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """Layer normalization, whose epsilon in Keras is 1e-3."""
    gamma, beta = weights
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta


def entropy(x: np.ndarray) -> float:
    return np.mean(np.log(np.pi * np.e * x.var(axis=0) + 1) / 2)


SMALL = {"width": 8, "activation": "relu", "initializer": "glorot_uniform"}


def shaken(settings: Settings, shape: tuple[int, ...], classes: int, lbe: bool):
    """A net whose biases and scales have left their initial values."""
    net, generator = nets.build(settings, shape, classes, lbe), np.random.default_rng(5)
    for weight in net.trainable_variables:
        if not weight.path.endswith("alphas"):
            weight.assign_add(generator.normal(size=weight.shape) * 0.1)
    return net


@pytest.mark.parametrize("lbe", [False, True])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_residual_net_adds_shortcuts_before_the_activation(lbe, norm):
    settings = Settings(model="residual", depth=5, norm=norm, **SMALL)
    net = shaken(settings, (7,), 3, lbe)
    weights = in_float64(net)
    x = np.random.default_rng(0).random((16, 7), np.float32)
    hidden = [x.astype(np.float64)]
    for number in range(1, 6):
        adds = number in (3, 5)
        name = "weights" if adds or norm == "layer" else "hidden"
        h = dense(hidden[-1], weights[f"{name}_{number}"])
        if norm == "layer":
            h = normalized(h, weights[f"norm_{number}"])
        hidden.append(relu(h + hidden[number - 2] if adds else h))
    expected = dense(hidden[-1], weights["logits"])
    np.testing.assert_allclose(
        net.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        nets.entropies(net, x)(), [entropy(h) for h in hidden[1:]], rtol=1e-4
    )
    assert len(getattr(net, "lbe_regularizers", [])) == 5 * lbe


def test_batch_normalization_is_before_the_activation():
    net = nets.build(Settings(depth=2, norm="batch", **SMALL), (7,), 3, lbe=False)
    x = np.random.default_rng(0).random((16, 7), np.float32)
    h = x.astype(np.float64)
    for number in (1, 2):
        h = h @ in_float64(net)[f"weights_{number}"][0]
        h = relu((h - h.mean(axis=0)) / np.sqrt(h.var(axis=0) + 1e-3))
    expected = dense(h, in_float64(net)["logits"])
    np.testing.assert_allclose(net(x, training=True), expected, rtol=1e-4, atol=1e-5)


def test_autoencoder_reconstructs_the_flattened_input():
    settings = Settings(model="autoencoder", depth=3, latent=2, **SMALL)
    net = shaken(settings, (2, 3, 1), 5, lbe=False)
    weights = in_float64(net)
    assert [*weights] == [
        "hidden_1",
        "latent",
        "hidden_2",
        "hidden_3",
        "reconstruction",
    ]
    assert weights["latent"][0].shape == (8, 2)
    x = np.random.default_rng(0).random((16, 2, 3, 1), np.float32)
    flat = x.reshape(16, 6).astype(np.float64)
    h = dense(relu(dense(flat, weights["hidden_1"])), weights["latent"])
    for name in ("hidden_2", "hidden_3"):
        h = relu(dense(h, weights[name]))
    error = np.mean((dense(h, weights["reconstruction"]) - flat) ** 2)
    logs = net.evaluate(x, x.reshape(16, 6), verbose=0, return_dict=True)
    assert logs == pytest.approx({"loss": error, "mse": error}, rel=1e-5)


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_vae_has_the_divergence_once_for_each_sample(kl_weight):
    settings = Settings(model="vae", depth=2, latent=3, kl_weight=kl_weight, **SMALL)
    net = shaken(settings, (2, 3, 1), 5, lbe=False)
    weights = in_float64(net)
    x = np.random.default_rng(0).random((16, 2, 3, 1), np.float32)
    (inputs, noise), flat = task_of(settings).pair(x, None, np.random.default_rng(1))
    np.testing.assert_array_equal(inputs, x)
    assert noise.shape == (16, 3) and noise.dtype == np.float32
    assert abs(noise.mean()) < 0.5 < noise.std() < 1.5
    h = dense(
        relu(dense(flat.astype(np.float64), weights["hidden_1"])), weights["latent"]
    )
    mean, variance = h[:, :3], np.exp(h[:, 3:])
    h = relu(dense(mean + np.sqrt(variance) * noise, weights["hidden_2"]))
    squares = np.sum((dense(h, weights["reconstruction"]) - flat) ** 2, axis=1)
    # Of the normal distribution N(mean, variance) from N(0, 1), summed over the units.
    divergence = np.sum(mean**2 + variance - 1 - np.log(variance), axis=1) / 2
    logs = net.evaluate([x, noise], flat, verbose=0, return_dict=True)
    assert logs == pytest.approx(
        {
            "loss": np.mean(squares + kl_weight * divergence) / 6,
            "mse": np.mean(squares) / 6,
            "kl": np.mean(divergence),
        },
        rel=1e-4,
    )


def test_noise_of_a_vae_is_another_one_in_each_epoch(run, tmp_path, monkeypatch):
    fit, seen = keras.Model.fit, []

    def recording(net, x, y, **options):
        seen.extend([x[1], options["validation_data"][0][1]])
        return fit(net, x, y, **options)

    monkeypatch.setattr(keras.Model, "fit", recording)
    assert run("--lbe", "--model", "vae", "--epochs", 2)[0] == 0
    first, validation, second, again = seen
    assert not np.isin(first, second).any() and not np.isin(first, validation).any()
    np.testing.assert_array_equal(validation, again)


TRANSFORMER = Settings(
    model="transformer", data="text", depth=2, heads=2, context=5, **SMALL
)


@pytest.mark.parametrize("norm", ["none", "layer", "post_layer"])
def test_transformer_is_its_formula(norm):
    settings = dataclasses.replace(TRANSFORMER, norm=norm)
    net = shaken(settings, (5,), 11, lbe=True)
    weights = in_float64(net)
    x = np.random.default_rng(0).integers(11, size=(16, 5))
    places = iter(f"norm_{number}" for number in range(1, 6))

    def layer_norm(h: np.ndarray, where: str) -> np.ndarray:
        return normalized(h, weights[next(places)]) if norm == where else h

    def attention(h: np.ndarray, name: str) -> np.ndarray:
        h = dense(h, weights[f"{name}_in"]).reshape(16, 5, 3, 2, 4)
        query, key, value = np.moveaxis(h, 2, 0)
        scores = np.einsum("bqhd,bkhd->bhqk", query, key) / 2
        scores = np.exp(scores) * np.tril(np.ones((5, 5)))
        scores /= scores.sum(axis=-1, keepdims=True)
        h = np.einsum("bhqk,bkhd->bqhd", scores, value).reshape(16, 5, 8)
        return dense(h, weights[f"{name}_out"])

    kernel, bias = weights["input"]
    h, entropies = kernel[x] + bias, []
    for number in (1, 2):
        branch = attention(layer_norm(h, "layer"), f"attention_{number}")
        h = layer_norm(h + branch, "post_layer")
        hidden = relu(dense(layer_norm(h, "layer"), weights[f"hidden_{number}"]))
        entropies.append(entropy(hidden.reshape(16, -1)))
        branch = dense(hidden, weights[f"perceptron_{number}_out"])
        h = layer_norm(h + branch, "post_layer")
    expected = dense(layer_norm(h, "layer"), weights["logits"])
    np.testing.assert_allclose(
        net.predict(x, verbose=0), expected, rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(nets.entropies(net, x)(), entropies, rtol=1e-4)


def test_transformer_does_not_see_what_comes():
    net = shaken(TRANSFORMER, (5,), 11, lbe=False)
    x = np.random.default_rng(0).integers(11, size=(1, 5))
    later = x.copy()
    later[0, 3] = (x[0, 3] + 1) % 11
    before, after = net.predict(x, verbose=0)[0], net.predict(later, verbose=0)[0]
    np.testing.assert_array_equal(before[:3], after[:3])
    assert np.abs(before[3:] - after[3:]).max(axis=1).min() > 1e-3


@pytest.mark.parametrize("model", ["residual", "residual_conv", "autoencoder", "vae"])
def test_initial_weights_of_all_kinds_are_those_without_lbe(model):
    settings = Settings(model=model, depth=4, norm="batch", lbe_input=True, **SMALL)
    plain, lbe = (nets.build(settings, (4, 4, 1), 3, lbe) for lbe in (False, True))
    assert len(lbe.lbe_regularizers) == 4 + 1
    kernels = [w.numpy() for w in lbe.weights if not w.path.endswith("lbe_alpha")]
    kernels = [w for w in kernels if w.shape != (5,)]  # the alphas
    for one, other in zip(plain.weights, kernels, strict=True):
        np.testing.assert_array_equal(one.numpy(), other)


@pytest.mark.parametrize(
    "words",
    [
        "--model vae --epochs 2",
        "--model transformer --data text --context 16 --batch-size 512 --epochs 1",
    ],
)
def test_results_of_other_kinds(run, tmp_path, words):
    status, output, error = run(*words.split(), draw=True)
    assert (status, error) == (0, "")
    folder = tmp_path / "run"
    config = json.loads((folder / "config.json").read_text())
    task = task_of(Settings.from_mapping(config["settings"]))
    plots = {path.stem for path in folder.glob("*.png")}
    assert plots == {*task.curves, "entropy"} <= {*results.PLOTS}
    summary = json.loads((folder / "summary.json").read_text())
    for net in results.NETS:
        rows = history(folder, net)
        scores = [row[f"val_{task.score}"] for row in rows]
        assert summary[net][f"best_val_{task.score}"] == task.best(scores)
        assert summary[net][f"val_{task.score}"] == scores[-1]
        assert ("kl" in summary[net]) == ("val_kl" in rows[0]) == ("vae" in words)
    assert f"validation {task.score}" in output and task.by_chance in output
    results.RunFolder(folder).clear()
    assert not folder.exists()


def test_errors_by_chance(npz):
    patterns = data.load(str(npz))
    mean = patterns.x_test.mean(axis=0, dtype=np.float64)
    error = np.mean((patterns.x_test - mean) ** 2)
    assert Reconstruction().chance(patterns) == pytest.approx(error)
    text = data.load("text", context=10)
    values, counts = np.unique(text.y_test, return_counts=True)
    assert Classification().chance(text) == counts.max() / text.y_test.size
    assert chr(values[counts.argmax()]) == " "


def test_text_is_that_of_the_library():
    text = data.load("text", context=10)
    assert text.shape == (10,) and text.classes == 128
    assert len(text.x_train) == 30 * ((18_000 - 1) // 10)
    assert len(text.x_test) == 30 * ((2_000 - 1) // 10)
    np.testing.assert_array_equal(text.x_train[:, 1:], text.y_train[:, :-1])
    source = pathlib.Path(argparse.__file__).read_text("utf-8")
    beginning = "".join(map(chr, text.x_train[:100].ravel()))
    assert beginning == source[:1000]
    assert "".join(map(chr, text.y_train[0])) == source[1:11]
    held_out = "".join(map(chr, text.x_test[:100].ravel()))
    assert held_out == source[18_000:19_000]
    assert text.describe() == data.load("text", context=10).describe()
    with pytest.raises(ExperimentError, match="--context must be less than 2000"):
        data.load("text", context=2000)


def test_missing_sources_are_told(monkeypatch):
    monkeypatch.setattr(data, "SOURCES", ("no_such_module",))
    with pytest.raises(ExperimentError, match="needs the sources of Python's library"):
        data.load("text")


def test_run_from_before_a_setting_goes_on(run, tmp_path):
    """Its config.json lacks it; and its folder had its name from the others."""
    assert run("--lbe", "--epochs", 1)[0] == 0
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    added = {f.name for f in dataclasses.fields(Settings) if f.metadata["added"]}
    assert added == {
        *("context", "norm", "latent", "kl_weight", "heads", "lbe_variant"),
    }
    for name in added:
        del config["settings"][name]
    path.write_text(json.dumps(config))
    status, output, _ = run("--lbe", "--epochs", 2)
    assert status == 0 and "resuming after epoch 1" in output
    status, _, error = run("--lbe", "--epochs", 2, "--norm", "layer")
    assert status == 2 and "(norm: none there, layer here)" in error
    # What version 0.1.0 called them.
    old = {"activation": "relu", "depth": 4}
    assert Settings(**old).default_name() == "mnist-dense-4x128-4ed921"
    assert Settings(**old, norm="layer").default_name() != "mnist-dense-4x128-4ed921"
    old = {**PRESETS["port-mnist"], "model": "conv", "width": 8}
    assert Settings(**old).default_name() == "mnist-conv-500x8-a8aa09"


# The command


def test_results_of_a_run(run, tmp_path):
    status, output, error = run("--lbe-input", draw=True)
    assert (status, error) == (0, "")
    folder = tmp_path / "run"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    of_a_net = "checkpoint.npz entropy.csv history.csv history.json model.weights.h5"
    assert files == {
        *(f"{plot}.png" for plot in [*Classification().curves, "entropy"]),
        *(f"{net}/{name}" for net in results.NETS for name in of_a_net.split()),
        "config.json",
        "summary.json",
    }
    assert all(path.stat().st_size < 100_000 for path in folder.glob("*.png"))
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["depth"] == 2 and config["settings"]["lbe_input"]
    assert config["data"]["train"] == 150
    assert config["environment"]["lbe_ops"] == lbe_ops.__version__
    for net in results.NETS:
        rows = json.loads((folder / net / "history.json").read_text())
        assert [row["epoch"] for row in rows] == [1, 2, 3]
        assert {"loss", "ce", "accuracy", "val_loss", "val_ce", "val_accuracy"} < {
            *rows[0]
        }
        with (folder / net / "history.csv").open(newline="") as file:
            table = [{k: float(v) for k, v in r.items()} for r in csv.DictReader(file)]
        assert table == rows
        assert "first step done" in output and "epoch 3/3" in output
    lbe = history(folder, "with_lbe")[-1]
    assert lbe["loss"] == pytest.approx(lbe["ce"] + 0.003 * lbe["lbe"], rel=1e-5)
    assert lbe["max_lbe"] >= lbe["lbe"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["chance"] == 14 / 40
    assert summary["with_lbe"]["val_accuracy"] == lbe["val_accuracy"]


def test_first_epoch_of_a_process_does_not_tell_what_is_left(run):
    """It has traced the graph."""
    words = ("--lbe", "--epochs")
    lines = run(*words, 3)[1] + run(*words, 6)[1]
    assert "a line per epoch, training/validation" in lines
    epochs = [line for line in lines.splitlines() if "LBE: epoch " in line]
    assert len(epochs) == 6
    told = [" left)" in line for line in epochs]
    assert told == [False, True, False, False, True, False]


def test_weights_are_the_trained_ones(run, npz, tmp_path):
    run("--lbe")
    folder = tmp_path / "run" / "with_lbe"
    settings = Settings.from_mapping(
        json.loads((folder.parent / "config.json").read_text())["settings"]
    )
    patterns = data.load(str(npz))
    net = nets.build(settings, patterns.shape, 3, lbe=True)
    entropies = nets.entropies(net, patterns.x_test)
    initial = entropies()
    net.load_weights(folder / "model.weights.h5")
    logits = net.predict(patterns.x_test, verbose=0)
    accuracy = np.mean(logits.argmax(axis=1) == patterns.y_test)
    row = history(folder.parent, "with_lbe")[-1]
    assert row["val_accuracy"] == pytest.approx(accuracy)
    with (folder / "entropy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["before"]) for row in rows] == initial
    assert [float(row["after"]) for row in rows] == entropies()


def test_finished_run_is_kept(run, tmp_path, monkeypatch):
    run("--lbe")
    before = checkpoint(tmp_path / "run", "with_lbe")
    modified = (tmp_path / "run/with_lbe/checkpoint.npz").stat().st_mtime_ns
    status, output, _ = run("--lbe")
    assert status == 0 and "with LBE: finished earlier, nothing to train" in output
    assert (tmp_path / "run/with_lbe/checkpoint.npz").stat().st_mtime_ns == modified

    status, _, error = run("--lbe", "--lbe-alpha", 2, "--seed", 5)
    assert status == 2 and error.count("\n") == 1
    assert "lbe_alpha: 3.0 there, 2.0 here; seed: 1 there, 5 here" in error
    status, _, error = run("--epochs", 2)
    assert status == 2 and "holds 3 epochs already" in error

    environment = {**command._environment("another op"), "keras": "3.0"}
    with monkeypatch.context() as patch:
        patch.setattr(command, "_environment", lambda op: environment)
        status, output, _ = run("--lbe")
    assert status == 0 and "note: the run began elsewhere" in output
    assert f"keras: {keras.__version__} there, 3.0 here" in output

    status, output, _ = run("--no-lbe")
    assert status == 0 and "with LBE: epoch" not in output
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["nets"] == ["without_lbe", "with_lbe"]

    assert run("--lbe", "--overwrite", "--seed", 5)[0] == 0
    assert not (tmp_path / "run/without_lbe").exists()
    after = checkpoint(tmp_path / "run", "with_lbe")
    assert any(not np.array_equal(before[key], after[key]) for key in before)


class Interrupted:
    """Makes training stop in the middle of an epoch, as Ctrl-C does."""

    def __init__(self, monkeypatch, epoch: int) -> None:
        fit = keras.Model.fit
        calls = []

        def interrupted(net, *arguments, **options):
            calls.append(net)
            if len(calls) == epoch:
                options["callbacks"] = [
                    keras.callbacks.LambdaCallback(on_train_batch_end=self.interrupt)
                ]
            return fit(net, *arguments, **options)

        monkeypatch.setattr(keras.Model, "fit", interrupted)

    def interrupt(self, batch, logs):
        raise KeyboardInterrupt


RESUMED = {
    "plain": "--no-lbe",
    "plateau": "--lbe --depth 3 --reduce-lr --reduce-lr-patience 1 --learning-rate 0.2",
    "sgd": "--no-lbe --optimizer sgd --momentum 0.9",
    "decay": "--lbe --lbe-input --schedule decay",
    "cosine": "--no-lbe --schedule cosine",
    "std_hinge": "--lbe --lbe-variant std_hinge",
    "adamw": "--lbe --optimizer adamw --native never --steps-per-execution 2",
    "float16": "--lbe --dtype mixed_float16",
    "conv": "--lbe --model conv",
    "residual": "--lbe --model residual --norm batch",
    "vae": "--lbe --model vae --latent 3 --steps-per-execution 2",
    "transformer": "--lbe --model transformer --data text --context 16 --norm layer",
}
QUICK = ("plateau", "cosine", "std_hinge")


def test_float16_trains_with_loss_scaling():
    settings = Settings(depth=2, width=4, dtype="mixed_float16", learning_rate=0.01)
    net = nets.build(settings, (6, 6, 1), 3, lbe=True)
    optimizer = net.optimizer
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    assert optimizer.inner_optimizer.global_clipnorm == settings.global_clipnorm
    assert float(optimizer.learning_rate) == pytest.approx(0.01)
    # What a resumed run needs of it is among the saved variables.
    names = [variable.name for variable in optimizer.variables]
    assert {"dynamic_scale", "step_counter"} < {*names}
    plain = nets.build(Settings(depth=2, width=4), (6, 6, 1), 3, lbe=True)
    assert type(plain.optimizer) is keras.optimizers.Adam


@pytest.mark.parametrize("case", left_to_long(RESUMED, lambda case: case not in QUICK))
def test_interrupted_run_ends_with_the_same_numbers(run, tmp_path, monkeypatch, case):
    arguments = [*RESUMED[case].split(), "--epochs", 4]
    assert run(*arguments)[0] == 0
    whole = (tmp_path / "run").rename(tmp_path / "whole")
    with monkeypatch.context() as patch:
        Interrupted(patch, epoch=3)
        status, _, error = run(*arguments)
    assert status == 130 and "same command continues" in error
    net = next(path.parent.name for path in (tmp_path / "run").glob("*/history.json"))
    assert len(history(tmp_path / "run", net)) == 2
    status, output, _ = run(*arguments)
    assert status == 0 and "resuming after epoch 2" in output
    assert_same_run(whole, tmp_path / "run", net)
    if case == "plateau":
        rates = [row["learning_rate"] for row in history(whole, net)]
        assert len(set(rates)) > 1
    if case == "cosine":
        rates = [row["learning_rate"] for row in history(whole, net)]
        half = 0.5**0.5
        expected = [0.01, 0.005 * (1 + half), 0.005, 0.005 * (1 - half)]
        assert rates == pytest.approx(expected)
    if case == "decay":
        rates = [row["learning_rate"] for row in history(whole, net)]
        assert rates == pytest.approx([0.01, 0.01, 0.01, 0.01 * 0.25 / 0.4])
    if case == "float16":
        # No other scalar is that large: the scale of the loss is saved as well.
        saved = [v for v in checkpoint(whole, net).values() if v.shape == ()]
        assert any(v >= 2.0**8 for v in saved)


def test_prolonged_run_is_that_of_more_epochs(run, tmp_path, npz):
    run("--lbe", "--epochs", 2)
    short = (tmp_path / "run").rename(tmp_path / "short")
    run("--lbe")
    status = command.main(["--resume", str(short), "--epochs", "3"])
    assert status == 0
    assert_same_run(short, tmp_path / "run", "with_lbe")


def test_resume_checks_what_it_finds(run, tmp_path, npz, capsys):
    assert command.main(["--resume", str(tmp_path)]) == 2
    assert "holds no run to resume" in capsys.readouterr().err
    for content in ("{}", "[", "1"):
        (tmp_path / "config.json").write_text(content)
        assert command.main(["--resume", str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    run("--no-lbe", "--epochs", 1)
    folder = tmp_path / "run"
    assert command.main(["--resume", str(folder), "--width", "9"]) == 2
    assert "width: 8 there, 9 here" in capsys.readouterr().err
    moved = changed(npz, tmp_path)
    resume = ["--resume", str(folder), "--epochs", "2", "--data"]
    assert command.main([*resume, moved]) == 0  # the same data, elsewhere
    other = changed(npz, tmp_path, y_test=np.zeros(40, np.uint8))
    capsys.readouterr()
    assert command.main([*resume, other]) == 2
    assert "crc32" in capsys.readouterr().err
    saved = folder / "without_lbe" / "checkpoint.npz"
    resume = ["--resume", str(folder), "--epochs", "3", "--data", str(npz)]
    content = saved.read_bytes()
    for damaged in (content[:-100], content[: len(content) // 2], content[:4], b""):
        saved.write_bytes(damaged)
        assert command.main(resume) == 2
        error = capsys.readouterr().err
        assert "checkpoint.npz is damaged" in error and error.count("\n") == 1


def test_foreign_folder_is_left_alone(run, tmp_path):
    folder = tmp_path / "run"
    (folder / "with_lbe").mkdir(parents=True)
    (folder / "with_lbe" / "checkpoint.npz").write_text("not ours")
    for config in (None, '{"settings": 1}'):
        if config:
            (folder / "config.json").write_text(config)
        before = {p: p.is_file() and p.read_text() for p in folder.rglob("*")}
        for arguments in ([], ["--overwrite"]):
            status, _, error = run(*arguments)
            assert status == 2 and error.count("\n") == 1
            assert "choose another" in error
            after = {p: p.is_file() and p.read_text() for p in folder.rglob("*")}
            assert after == before
    (tmp_path / "file").touch()
    status, _, error = run("--output", tmp_path / "file")
    assert status == 2 and error.count("\n") == 1


def test_overwriting_removes_only_what_a_run_wrote(run, tmp_path):
    folder = tmp_path / "run"
    assert run("--epochs", 1)[0] == 0
    foreign = [folder / "notes.txt", folder / "without_lbe" / "notes.txt"]
    for path in foreign:
        path.touch()
    (folder / "with_lbe" / ".tmp-checkpoint.npz").touch()
    before = set(folder.rglob("*"))
    # Results give way only to a net that can be built.
    assert run("--overwrite", "--initializer", "stft")[0] == 2
    assert set(folder.rglob("*")) == before
    results.RunFolder(folder).clear()
    assert {path for path in folder.rglob("*") if path.is_file()} == {*foreign}
    assert not (folder / "with_lbe").exists()


def test_nets_of_more_epochs_are_not_compared_with_fewer(run):
    assert run("--lbe", "--epochs", 2)[0] == 0
    status, _, error = run("--epochs", 1)
    assert status == 2 and "holds 2 epochs already" in error
    assert run("--no-lbe", "--epochs", 2)[0] == 0


def test_diverged_net_is_recorded(run, tmp_path):
    arguments = ["--no-lbe", "--learning-rate", 1e30, "--global-clipnorm", 0]
    assert run(*arguments, "--epochs", 2, draw=True)[0] == 0
    folder = tmp_path / "run"

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for path in folder.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)
    rows = results.RunFolder(folder).net("without_lbe").history()
    assert np.isnan(rows[-1]["loss"])
    status, output, _ = run(*arguments, "--epochs", 3)
    assert status == 0 and "resuming after epoch 2" in output
    assert len(history(folder, "without_lbe")) == 3


@pytest.mark.long
def test_killed_run_ends_with_the_same_numbers(run, tmp_path, npz):
    arguments = ["--lbe", "--epochs", 20]
    words = ["--data", npz, *TINY.split(), "--output", tmp_path / "killed", *arguments]
    process = subprocess.Popen(
        [sys.executable, "-m", "lbe_ops.experiments", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process.stdout:
        for line in process.stdout:
            if "epoch  3/20" in line:
                break
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = len(history(tmp_path / "killed", "with_lbe"))
    assert 3 <= finished < 20
    assert command.main(["--resume", str(tmp_path / "killed")]) == 0
    assert run(*arguments)[0] == 0
    assert_same_run(tmp_path / "killed", tmp_path / "run", "with_lbe")


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    results.write_json(path, [1])
    with pytest.raises(ZeroDivisionError), results.replacing(path) as temporary:
        temporary.write_text("[2")
        1 / 0  # noqa: B018
    assert json.loads(path.read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_file_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    calls = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync"))
    monkeypatch.setattr(
        os, "replace", lambda a, b: calls.append("replace") or replace(a, b)
    )
    results.write_json(tmp_path / "x.json", [float("nan"), {"a": (1.5, -np.inf)}])
    assert calls == ["fsync", "replace"]
    assert json.loads((tmp_path / "x.json").read_text()) == [None, {"a": [1.5, None]}]


def test_last_batch_of_one_sample_trains(run, tmp_path):
    status, _, _ = run("--lbe", "--batch-size", 149, "--epochs", 2)
    assert status == 0
    rows = history(tmp_path / "run", "with_lbe")
    assert all(np.isfinite(list(row.values())).all() for row in rows)


def test_lbe_trains_what_does_not_train_without(run, tmp_path):
    words = "--data digits --depth 30 --width 32 --epochs 6 --learning-rate 0.002"
    assert run(*words.split())[0] == 0
    plain, lbe = (history(tmp_path / "run", net)[-1] for net in results.NETS)
    assert plain["val_accuracy"] < 0.15
    assert lbe["val_accuracy"] > 0.25
