# SPDX-License-Identifier: Apache-2.0
"""The trainability map: trials, the trainer, the command, and the statistics."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import itertools
import pathlib
import subprocess
import sys
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from lbe_ops import __main__ as command_line
from lbe_ops.experiments import map as trainability
from lbe_ops.experiments import map_report
from lbe_ops.experiments.trainer import Trainer
from lbe_ops.experiments.trial import ARMS, Trial

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "map"
SMALL = Trial(
    activation="relu",
    initializer="he_normal",
    depth=3,
    learning_rate=3e-3,
    arm="lbe",
    seed=5,
    width=16,
    batch_size=64,
    steps=60,
)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(SMALL)


def of(outcome: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in outcome.items() if name != "seconds"}


def test_a_trial_gives_the_same_bits_whatever_ran_before(trainer):
    first = trainer.run(SMALL)
    trainer.run(dataclasses.replace(SMALL, arm="none", seed=6, learning_rate=1e-2))
    assert of(trainer.run(SMALL)) == of(first) == of(Trainer(SMALL).run(SMALL))
    assert first["val_accuracy"] > 0.3
    assert first["h_min_50"] > first["h_min_0"]


def test_a_trial_without_lbe_is_keras_own_training(trainer):
    """The same weights, batches and Adam, for each weight by itself, in a plain net."""
    trial = dataclasses.replace(SMALL, arm="none")
    outcome = trainer.run(trial)

    rng = np.random.default_rng(trial.seed)
    seeds = [int(s) for s in rng.integers(2**31, size=trial.depth + 1)]
    hidden = [
        keras.layers.Dense(
            trial.width,
            activation="relu",
            kernel_initializer=keras.initializers.HeNormal(seed),
        )
        for seed in seeds[:-1]
    ]
    glorot = keras.initializers.GlorotUniform(seeds[-1])
    net = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            *hidden,
            keras.layers.Dense(10, kernel_initializer=glorot),
        ]
    )
    schedule = keras.optimizers.schedules.CosineDecay(trial.learning_rate, trial.steps)
    net.compile(
        keras.optimizers.Adam(schedule, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    digits = trainer.data
    for indices in trainer.batches(trial):
        net.train_on_batch(digits.x_train[indices], digits.y_train[indices])
    ce, accuracy = net.evaluate(digits.x_train, digits.y_train, verbose=0)
    np.testing.assert_allclose(outcome["train_ce"], ce, rtol=1e-3)
    np.testing.assert_allclose(outcome["train_accuracy"], accuracy, atol=0.01)


def test_every_arm_does_what_it_says(trainer):
    def alphas_after(arm: str) -> np.ndarray:
        trainer.run(dataclasses.replace(SMALL, arm=arm))
        return trainer.net.lbe_loss.alphas.numpy()

    assert (alphas_after("lbe_fixed_alpha") == 1).all()
    assert (alphas_after("lbe") != 1).all()
    assert np.abs(alphas_after("lbe_alpha_3") - 3).max() < 1
    outcomes = {}
    for arm in ARMS:
        trial = dataclasses.replace(SMALL, arm=arm)
        one = trainer if trial.graph() == SMALL.graph() else Trainer(trial)
        outcomes[arm] = one.run(trial)["train_ce"]
        layer = one.net.get_layer("hidden_1")
        assert layer.activity_regularizer.variant == ARMS[arm].variant
    different = {
        frozenset(pair)
        for pair in itertools.combinations(ARMS, 2)
        if outcomes[pair[0]] == outcomes[pair[1]]
    }
    # 60 steps are over before the 200th, and no layer is above its alpha then.
    same = itertools.combinations(("lbe", "lbe_until_200", "lbe_one_sided"), 2)
    assert different <= set(map(frozenset, same))


def test_another_graph_is_refused(trainer):
    with pytest.raises(ValueError, match="Another graph"):
        trainer.run(dataclasses.replace(SMALL, depth=4))


def test_the_initial_weights_are_those_asked_for(trainer):
    trial = dataclasses.replace(SMALL, steps=0)

    def kernel_of(**changes: object) -> np.ndarray:
        trainer.run(dataclasses.replace(trial, **changes))
        return trainer.net.get_layer("hidden_2").kernel.numpy()

    orthogonal = kernel_of(initializer="critical_orthogonal")
    np.testing.assert_allclose(orthogonal @ orthogonal.T, 2 * np.eye(16), atol=1e-5)
    np.testing.assert_allclose(kernel_of(gain=0.5), kernel_of() / 2, rtol=1e-6)
    assert (kernel_of(seed=6) != kernel_of()).all()
    mirrored = kernel_of(initializer="looks_linear")
    np.testing.assert_array_equal(mirrored[:8], -mirrored[8:])
    kernel_of(initializer="lsuv")
    x = tf.reshape(trainer.data.x_train, [-1, 64])
    for number in (1, 2, 3):
        layer = trainer.net.get_layer(f"hidden_{number}")
        z = x @ layer.kernel
        assert np.std(z.numpy()) == pytest.approx(1, abs=0.1)
        x = layer.activation(z)


# The command


@pytest.fixture
def smoke(monkeypatch):
    """A block of a few seconds, with two graphs."""
    trials = trainability.grid(
        activation="relu",
        initializer="he_normal",
        depth=(1, 2),
        width=8,
        learning_rate=1e-3,
        arm=("none", "lbe"),
        seed=(1, 2),
        steps=4,
    )
    monkeypatch.setitem(trainability.BLOCKS, "smoke", lambda: trials)
    return trials


@pytest.mark.long
def test_an_interrupted_map_goes_on_where_it_was(smoke, tmp_path, capfd):
    arguments = ["map", "smoke", "--output", str(tmp_path), "--processes", "2"]
    assert command_line.main(arguments) == 0
    path = tmp_path / "smoke.csv"
    rows = trainability.read(path)
    assert {trial for trial, _ in rows} == set(smoke)
    assert (tmp_path / "smoke.md").exists() and (tmp_path / "smoke.png").exists()

    # As after a crash in the middle of a line.
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:30])
    assert command_line.main([*arguments, "--processes", "1"]) == 0
    again = trainability.read(path)
    assert len(again) == len(smoke)
    assert {t: of(o) for t, o in again} == {t: of(o) for t, o in rows}
    assert "8 trials, 5 to run" in capfd.readouterr().out
    assert path.read_bytes().startswith(b"".join(lines[:4]))


def test_a_line_that_ends_within_its_last_number_does_not_count(tmp_path):
    path = tmp_path / "map.csv"
    trials = [dataclasses.replace(SMALL, seed=seed) for seed in (1, 2)]
    for trial in trials:
        trainability._append(path, trial, {"val_accuracy": 0.25})
    path.write_text(path.read_text()[:-2])
    assert trainability.read(path) == [(trials[0], {"val_accuracy": 0.25})]


def test_a_foreign_file_is_not_touched(smoke, tmp_path, capsys):
    path = tmp_path / "smoke.csv"
    path.write_text("a,b\n1,2\n")
    assert command_line.main(["map", "smoke", "--output", str(tmp_path)]) == 2
    assert "smoke.csv is not a file of this map" in capsys.readouterr().err
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("processes", [0, -1])
def test_a_map_needs_a_process(smoke, tmp_path, capsys, processes):
    words = ["map", "smoke", "--output", str(tmp_path), "--processes", str(processes)]
    assert command_line.main(words) == 2
    assert f"at least 1. Received: {processes}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_block_without_time_left_draws_nothing(smoke, tmp_path, capsys):
    words = ["map", "smoke", "m0", "--output", str(tmp_path), "--minutes", "0"]
    assert command_line.main(words) == 0
    printed = capsys.readouterr().out
    for block in ("smoke", "m0"):
        assert f"{block}: no trial was run, nothing is drawn" in printed


def test_every_block_names_trials_of_known_arms_once():
    for name, block in trainability.BLOCKS.items():
        trials = block()
        assert len(set(trials)) == len(trials) > 0, name
        assert {trial.arm for trial in trials} <= set(ARMS)


def test_chunks_have_one_graph_each_and_lose_nothing():
    trials = trainability.BLOCKS["m1"]()
    chunks = trainability.chunks(trials, 2)
    assert sorted(map(str, itertools.chain(*chunks))) == sorted(map(str, trials))
    for chunk in chunks:
        assert len({trial.graph() for trial in chunk}) == 1
    costs = [sum(trial.cost() for trial in chunk) for chunk in chunks]
    assert max(costs) < sum(costs) / 4


@pytest.mark.parametrize(
    "broken, words",
    [
        ({"initializer": "no_such"}, "lsuv or one that Keras knows, such as he_normal"),
        # More than there are samples: a fault of the block, which shows its place.
        ({"batch_size": 10_000}, "a process of the map has failed"),
    ],
)
def test_a_failing_process_is_an_error(monkeypatch, tmp_path, capfd, broken, words):
    trials = [dataclasses.replace(SMALL, **broken)]
    monkeypatch.setitem(trainability.BLOCKS, "smoke", lambda: trials)
    assert command_line.main(["map", "smoke", "--output", str(tmp_path)]) == 2
    assert words in capfd.readouterr().err


# Statistics


@pytest.fixture(scope="module")
def hypotheses():
    """The script that tests the hypotheses, as a module."""
    path = pathlib.Path(__file__).parents[1] / "benchmarks" / "map_hypotheses.py"
    specification = importlib.util.spec_from_file_location("map_hypotheses", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def write_maps(folder: pathlib.Path, trains: Callable[[Trial], bool]) -> None:
    """All blocks, as if exactly these trials had trained."""
    for block in (
        *("shallow", "m1", "m1_claims", "m1_500", "m2", "m3", "m3_confirm"),
        *("m5", "m7", "m8", "m8_sigmoid"),
    ):
        rows = []
        for trial in trainability.BLOCKS[block]():
            good = trains(trial)
            noise = np.random.default_rng(len(rows)).uniform(0, 0.004)
            best = 0.96 if trial.initializer == "looks_linear" else 0.95
            outcome = {"val_accuracy": (best if good else 0.1) + noise}
            for feature in map_report.FEATURES:
                outcome |= {f"{feature}_{s}": 1 + good + noise for s in (0, 50)}
            rows.append(dataclasses.asdict(trial) | outcome)
        with (folder / f"{block}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def test_every_block_of_the_hypotheses_has_a_report(tmp_path):
    write_maps(tmp_path, lambda trial: trial.depth < 50)
    for path in sorted(tmp_path.glob("*.csv")):
        trainability._report(path.stem, path)
        arms = {trial.arm for trial, _ in trainability.read(path)}
        assert all(arm in path.with_suffix(".md").read_text() for arm in arms)
        drawn = path.stem in ("shallow", "m1", "m1_claims", "m2")
        assert path.with_suffix(".png").exists() == drawn


def test_hypotheses_hold_where_the_trials_say_so(hypotheses, tmp_path):
    def as_hoped(trial: Trial) -> bool:
        if trial.depth <= 10 or trial.initializer == "looks_linear":
            return True
        if trial.model in ("residual", "transformer"):
            return True
        if trial.gain > 1:
            return trial.arm != "none"
        if trial.activation == "sigmoid":
            return trial.arm == "lbe" and trial.depth <= 20
        if trial.activation == "tanh":
            return trial.initializer == "critical_orthogonal" or trial.depth < 100
        if trial.seed > 8 and trial.arm != "lbe":
            return True
        return trial.depth <= (50 if trial.arm.startswith("lbe") else 20)

    write_maps(tmp_path, as_hoped)
    found = {each.name: each for each in hypotheses.verdicts(tmp_path)}
    assert list(found) == [f"H{number}" for number in (*range(14), *range(15, 25))]
    assert {name for name, each in found.items() if each.holds} == set(found)
    assert found["H1"].evidence.startswith(
        "50 layers with LBE, 20 without; at 50: +0.8"
    )
    assert found["H1"].p == 2 / 256
    assert "8/8 with LBE, 0/8 without" in found["H3"].evidence


def test_hypotheses_are_refuted_where_the_trials_say_so(hypotheses, tmp_path):
    def otherwise(trial: Trial) -> bool:
        if trial.depth == 3 or trial.norm == "batch":
            return trial.arm == "none"
        if trial.model in ("residual", "transformer"):
            return trial.arm == "lbe"
        if trial.initializer == "looks_linear" and trial.activation != "relu":
            return trial.arm == "lbe"
        if trial.arm in ("lbe_units", "none") and trial.activation == "gelu":
            return True
        if trial.activation == "sigmoid":
            return False
        if trial.initializer == "looks_linear" or trial.activation == "tanh":
            return trial.arm == "none"
        if trial.initializer != "glorot_uniform" and trial.activation == "relu":
            return trial.arm in ("lbe", "lbe_until_50") and trial.gain == 1
        return trial.seed % 2 == 0 or trial.arm == "none"

    write_maps(tmp_path, otherwise)
    found = {each.name: each.holds for each in hypotheses.verdicts(tmp_path)}
    # The measurements of these files are those of the outcome, whatever that is.
    assert [name for name, holds in found.items() if holds] == ["H9"]
    text = hypotheses.table(hypotheses.verdicts(tmp_path))
    assert text.count("**refuted**") == 23


def test_a_hypothesis_is_open_while_trials_are_missing(hypotheses, tmp_path):
    write_maps(tmp_path, lambda trial: True)
    path = tmp_path / "m2.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    found = {each.name: each for each in hypotheses.verdicts(tmp_path)}
    assert found["H7"].holds is None
    assert found["H7"].evidence == "3 trials are missing"
    assert [n for n, each in found.items() if each.holds is None] == ["H7", "H9"]


def rows_of(accuracies: dict[tuple[str, float], list[float]]) -> list:
    return [
        (
            dataclasses.replace(SMALL, arm=arm, learning_rate=rate, seed=seed),
            {"val_accuracy": value},
        )
        for (arm, rate), values in accuracies.items()
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    "data, block, depth", [("digits", "shallow", 3), ("text", "m7", 2)]
)
def test_what_counts_as_trained_is_taken_from_the_shallow_nets(data, block, depth):
    rows = trainability.read(RESULTS / f"{block}.csv")
    assert {trial for trial, _ in rows} == set(trainability.BLOCKS[block]())
    rows = [(trial, outcome) for trial, outcome in rows if trial.depth == depth]
    found = map_report.cells(rows, ("norm", "activation", "initializer")).values()
    best = max(cell.mean for arms in found for cell in arms.values())
    assert map_report.SHALLOW_ACCURACY[data] == pytest.approx(best, abs=5e-4)


def test_a_cell_takes_the_rate_that_is_best_on_average():
    rows = rows_of(
        {
            ("none", 1e-3): [0.1, 0.95],
            ("none", 1e-4): [0.6, 0.6],
            ("lbe", 1e-3): [0.9, 0.96],
            ("lbe", 1e-4): [0.1, 0.1],
        }
    )
    cells = map_report.cells(rows, ["depth"])[3,]
    assert cells["none"].learning_rate == 1e-4 and cells["lbe"].learning_rate == 1e-3
    assert cells["none"].trained == 0 and cells["lbe"].trained == 2
    low, high = map_report.mean_interval([0.3, 0.36])
    assert f"+0.330 [{low:+.3f}, {high:+.3f}]" in map_report.table(rows, ["depth"])


def test_untrained_nets_have_a_table_of_their_medians():
    trials = [dataclasses.replace(SMALL, steps=0, seed=seed) for seed in (1, 2, 3)]
    rows = [
        (trial, {f"{name}_last": 10.0**trial.seed for name in map_report.MEASURED})
        for trial in trials
    ]
    text = map_report.measurements(rows, ("activation", "depth"))
    assert text.splitlines()[2] == f"| relu | 3 |{' 1e+02 |' * 7}"


def test_intervals_and_p_values_are_those_of_the_textbooks():
    low, high = map_report.wilson(8, 10)
    z = stats.norm.ppf(0.975)
    centre = (0.8 + z**2 / 20) / (1 + z**2 / 10)
    half = z / (1 + z**2 / 10) * np.sqrt(0.16 / 10 + z**2 / 400)
    assert (low, high) == pytest.approx((centre - half, centre + half))
    # All of eight pairs on one side: 2 of 256 flips are as extreme.
    assert map_report.sign_flip([0.1, 0.2, 0.3, 0.1, 0.2, 0.5, 0.3, 0.2]) == 2 / 256
    assert map_report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    values = [0.9, 0.8, 0.95]
    interval = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert map_report.mean_interval(values) == pytest.approx(interval)


def test_the_trainable_depth_needs_four_seeds_of_five():
    rows = []
    for depth, accuracies in {
        10: [0.95] * 5,
        20: [0.95] * 4 + [0.1],
        50: [0.95] * 3 + [0.1] * 2,
    }.items():
        for seed, value in enumerate(accuracies):
            trial = dataclasses.replace(SMALL, depth=depth, seed=seed)
            rows.append((trial, {"val_accuracy": value}))
    assert map_report.trainable_depths(rows, lambda trial: True) == {"relu": 20}
    assert map_report.trainable_depths(rows, lambda trial: trial.depth > 20) == {
        "relu": 0
    }


def test_a_prediction_is_made_without_the_activation_it_is_for():
    """Nets train where the rank is above 2, whatever their entropy."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(120):
        rank, entropy = rng.uniform(1, 3), 10 ** rng.uniform(-9, 0)
        activation = ("relu", "tanh", "gelu")[seed % 3]
        trial = dataclasses.replace(SMALL, activation=activation, seed=seed)
        outcome = {"val_accuracy": 0.95 if rank > 2 else 0.1}
        for step in (0, 50):
            outcome |= {
                f"h_min_{step}": entropy,
                f"rank_out_{step}": rank,
                f"gradient_first_{step}": np.nan if seed % 10 == 0 else entropy,
                f"gradient_max_{step}": 0.0,
            }
        rows.append((trial, outcome))
    found = map_report.prediction(rows, "gelu")
    gelu = [row for row in rows if row[0].activation == "gelu"]
    assert found["trials"] == 40
    assert found["trained"] == sum(o["val_accuracy"] > 0.5 for _, o in gelu)
    assert found["auc"] > 0.97 and 0.3 < found["auc_entropy"] < 0.7
    # Other outcomes of it change nothing of the rule, only whether that is right.
    opposite = [
        (t, {**o, "val_accuracy": 1.05 - o["val_accuracy"]})
        if t in dict(gelu)
        else (t, o)
        for t, o in rows
    ]
    assert map_report.prediction(opposite, "gelu")["auc"] < 0.03


@pytest.mark.long
def test_plasticity_goes_on_where_it_was(tmp_path):
    path = tmp_path / "m6.csv"
    done = [
        f"{arm},{seed},{task},0.{seed}5,5,0.25\n"
        for seed in (1, 2)
        for arm in ("none", "lbe", "l2_to_init", "layer_norm")
        for task in (0, 1)
    ]
    missing = done[-6:-4]  # those of LBE, seed 2
    header = "arm,seed,task,accuracy,effective_rank,dead_share\n"
    path.write_text(header + "".join(x for x in done if x not in missing))
    script = RESULTS.parents[1] / "plasticity.py"

    def run(tasks: int) -> subprocess.CompletedProcess:
        command = [sys.executable, script, tmp_path, "--seeds", "2", "--epochs", "1"]
        command += ["--processes", "1", "--tasks", str(tasks)]
        return subprocess.run(command, capture_output=True, text=True)

    first = run(tasks=2)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("1 of 1 nets\n")
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + len(done)
    new = lines[1 + done.index(missing[0]) :][:2]
    assert [line for line in lines[1:] if line not in new] == [
        line for line in done if line not in missing
    ]
    for line, expected in zip(new, missing, strict=True):
        assert line.startswith(expected[:8]) and 0 < float(line.split(",")[3]) < 1
    text = (tmp_path / "m6.md").read_text()
    assert "H14 is **refuted**." in text
    # All is there: the same again. Nets of another number of tasks are no part of it.
    assert run(tasks=2).stdout == text
    other = run(tasks=3)
    assert other.returncode == 2
    assert f"{path} has 2 tasks of a net, not 3" in other.stderr
    assert path.read_text() == "".join(lines)
