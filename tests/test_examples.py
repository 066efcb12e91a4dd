# SPDX-License-Identifier: Apache-2.0
"""The examples: each runs as a user runs it, and prints what its text says."""

import ast
import json
import pathlib
import re
import runpy
import subprocess
import sys

import matplotlib.pyplot
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
SHORT = sorted(path.stem for path in EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))


def numbers(line: str) -> list[float]:
    """The decimal numbers of a line."""
    return [float(n) for n in re.findall(r"-?\d+\.\d*(?:e[+-]\d+)?", line)]


def test_every_example_is_tested():
    tested = {name.removeprefix("test_") for name in globals() if "test_" in name}
    assert {path.stem for path in EXAMPLES.glob("paper/*.py")} <= tested
    assert set(SHORT) == set(PRINTED)
    assert set(NOTEBOOKS) == set(LAST_VALUES)


# One for each thing that users do

# Of what they print: a pattern, and the least and the most that its number may be.
PRINTED = {
    "applications": (r"accuracy 0\.\d+, ce (\d\.\d+), lbe ", 0, 10),
    "arrays": (r"^NumPy: H = (\d\.\d+) nats", 1.0, 1.3),
    "autoencoder": (r"squared error (0\.\d+), of the mean image 0.07", 0, 0.066),
    "convolution": (r"accuracy (0\.\d+)", 0.3, 1),
    "devices": (r"2 replicas, (0\.\d+)", 0.5, 1),
    "export": (r"served \(3, (10)\) False", 10, 10),
    "functional": (r"accuracy (0\.\d+)", 0.5, 1),
    "own_loop": (r"epoch 5: loss (\d\.\d+)", 0, 2),
    "residual": (r"accuracy (0\.\d+)", 0.8, 1),
    "subclassed": (r"accuracy (0\.\d+)", 0.5, 1),
    "transformer": (r"character (0\.\d+)", 0.25, 1),
    "tuner": (r"'strength': (0\.\d+)", 0.01, 1),
}


@pytest.mark.parametrize("name", SHORT)
def test_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40


@pytest.mark.long
@pytest.mark.parametrize("name", SHORT)
def test_example(name, tmp_path):
    command = [sys.executable, EXAMPLES / f"{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pattern, least, most = PRINTED[name]
    assert least <= float(re.search(pattern, done.stdout, re.MULTILINE)[1]) <= most
    assert not list(tmp_path.iterdir())


# Of the last cell of a notebook.
LAST_VALUES = {
    "diagnose": lambda value: (
        value == ["scale gone", "rank gone", "fine", "exploding", "fine"]
    ),
    "quickstart": lambda value: value["with LBE"] > 0.5 > value["without LBE"],
}


@pytest.mark.long
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, monkeypatch, tmp_path):
    """Every cell in turn; what the last one that has a value shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: None)
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    variables, value = {"__name__": "__main__"}, None
    for number, cell in enumerate(cells):
        code, place = "".join(cell["source"]), f"{name}.ipynb, cell {number}"
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"], "notebooks are kept without output"
        tree = ast.parse(code, place)
        shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, place, "exec"), variables)
        if shown is not None:
            found = eval(compile(ast.Expression(shown.value), place, "eval"), variables)
            value = value if found is None else found
    assert LAST_VALUES[name](value)


# The experiments of the paper


@pytest.fixture
def lines(monkeypatch, capsys):
    """Runs an experiment in its quick size; the lines that it has printed."""

    def run(name: str) -> list[str]:
        path = str(EXAMPLES / "paper" / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, "--quick"])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


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
