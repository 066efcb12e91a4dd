# SPDX-License-Identifier: Apache-2.0
"""The examples: each runs in its quick size, and prints what its text says."""

import pathlib
import re
import runpy
import sys

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def lines(monkeypatch, capsys):
    """Runs an example as a user does; the lines that it has printed."""

    def run(name: str) -> list[str]:
        path = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, "--quick"])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def numbers(line: str) -> list[float]:
    """The decimal numbers of a line."""
    return [float(n) for n in re.findall(r"-?\d+\.\d*(?:e[+-]\d+)?", line)]


def test_every_example_is_tested():
    tested = {name.removeprefix("test_") for name in globals() if "test_" in name}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


@pytest.mark.long
def test_info_flow(lines):
    plain, before, after, lbe, lbe_before, lbe_after = map(numbers, lines("info_flow"))
    assert len(before) == len(after) == 3
    assert before == lbe_before == sorted(before, reverse=True)
    assert after[-1] < 1e-3 < 0.1 < lbe_after[-1]


@pytest.mark.long
def test_neuron_distribution(lines):
    printed = lines("neuron_distribution")
    assert [line.strip()[:8] for line in printed if "layer" in line] == [
        f"layer {n}:" for n in range(1, 7)
    ] * 2
    for entropy, deviation, skewness in map(numbers, printed[1:7]):
        # That of units which are all alike; by Jensen's inequality it is the most.
        highest = np.log(np.pi * np.e * deviation**2 + 1) / 2
        assert highest / 2 < entropy < highest + 1e-3
        assert skewness > 0


@pytest.mark.long
def test_normalization(lines):
    header, *rows = lines("normalization")
    assert [row.split()[0] for row in rows] == ["none", "batch", "layer", "selu", "lbe"]
    last = {row.split()[0]: numbers(row)[2] for row in rows}
    normalized = [last[kind] for kind in ("batch", "layer", "selu")]
    assert 0 < 5 * last["none"] < min(normalized) and last["lbe"] > last["none"]


@pytest.mark.long
def test_residual(lines):
    accuracies = [numbers(line)[0] for line in lines("residual")]
    assert len(accuracies) == 4 and min(accuracies) > 0.2  # 0.1 is chance


@pytest.mark.long
def test_autoencoder(lines):
    mean, plain, lbe = (numbers(line)[0] for line in lines("autoencoder"))
    assert plain > 0.9 * mean > lbe


@pytest.mark.long
def test_transformer(lines):
    accuracies = [numbers(line)[0] for line in lines("transformer")]
    assert len(accuracies) == 2 and min(accuracies) > 0.1


@pytest.mark.long
def test_loss_surface(lines):
    printed = lines("loss_surface")
    for first in (0, 4):
        table = np.array([numbers(line) for line in printed[first + 1 : first + 4]])
        assert table.shape == (3, 3)
        assert table[1, 1] == table.min()  # the trained weights
