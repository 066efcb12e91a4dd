# SPDX-License-Identifier: Apache-2.0
"""`lbe-ops report` and `lbe-ops train --dry-run`: what they print, and that is all."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import types

import numpy as np
import pytest
from helpers import TINY

from lbe_ops import __main__ as command_line
from lbe_ops.experiments import command, data, estimate, plots
from lbe_ops.experiments.results import RunFolder
from lbe_ops.experiments.settings import Settings

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture
def train(npz, tmp_path, capsys, monkeypatch):
    """Runs `lbe-ops train`; its status, standard output and standard error."""
    monkeypatch.setattr(plots, "draw", lambda *arguments: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        words = ["--data", str(npz), *TINY.split(), "--output", str(tmp_path / "run")]
        status = command.main([*words, *map(str, arguments)])
        return (status, *capsys.readouterr())

    return run


def write_run(
    folder: pathlib.Path,
    accuracies: dict[str, list[float]],
    tensorflow: str = "2.21.0",
    crc32: str = "01234567",
    finished: bool = True,
    **settings: object,
) -> pathlib.Path:
    """What a run leaves whose nets had these accuracies, epoch by epoch."""
    chosen = Settings(**{"epochs": 2, "data": "digits", **settings})
    run = RunFolder(folder)
    run.open(
        {
            "settings": chosen.as_dict(),
            "data": {"train": 100, "crc32": crc32},
            "nets": [*accuracies],
            "environment": {"tensorflow": tensorflow, "keras": "3.15.1"},
        }
    )
    for net, values in accuracies.items():
        rows = [
            {"epoch": epoch, "seconds": 1.5, "accuracy": value, "val_accuracy": value}
            | {"ce": 1 - value, "val_ce": 1 - value}
            | ({"lbe": 0.25, "val_lbe": 0.25} if net == "with_lbe" else {})
            for epoch, value in enumerate(values, 1)
        ]
        run.net(net).write_history(rows)
        if finished:
            run.net(net).weights.touch()
    (folder / "summary.json").write_text(json.dumps({"chance": 0.125}))
    return folder


def table(output: str) -> dict[str, list[str]]:
    """The cells of each row of a printed table, by the row's title."""
    rows = [re.split(r"[│┃]", line)[1:-1] for line in output.splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows if row]
    head = [list(cells) for cells in itertools.takewhile(lambda r: not r[0], rows)]
    titles = [" ".join(filter(None, cells)) for cells in zip(*head, strict=True)]
    return {"": titles[1:], **{row[0]: row[1:] for row in rows[len(head) :]}}


def report(capsys, *folders: object) -> tuple[int, dict[str, list[str]], str]:
    status = command_line.main(["report", *map(str, folders)])
    output, error = capsys.readouterr()
    return status, table(output) if output else {}, error


def test_runs_are_compared_by_what_differs(tmp_path, capsys):
    both = {"without_lbe": [0.1, 0.2], "with_lbe": [0.9, 0.8]}
    a = write_run(tmp_path / "a", both)
    b = write_run(
        tmp_path / "b",
        {"with_lbe": [0.5, 0.6]},
        tensorflow="2.20.0",
        crc32="89abcdef",
        learning_rate=1e-2,
        lbe_input=True,
    )
    status, rows, error = report(capsys, a, b)
    assert (status, error) == (0, "")
    assert rows == {
        "": ["a without LBE", "a with LBE", "b with LBE"],
        "--lbe-input": ["false", "false", "true"],
        "--learning-rate": ["0.0001", "0.0001", "0.01"],
        "data: crc32": ["01234567", "01234567", "89abcdef"],
        "environment: tensorflow": ["2.21.0", "2.21.0", "2.20.0"],
        "epochs": ["2", "2", "2"],
        "accuracy": ["0.2", "0.8", "0.6"],
        "validation accuracy": ["0.2", "0.8", "0.6"],
        "ce": ["0.8", "0.2", "0.4"],
        "validation ce": ["0.8", "0.2", "0.4"],
        "lbe": ["", "0.25", "0.25"],
        "validation lbe": ["", "0.25", "0.25"],
        "best validation accuracy": ["0.2", "0.9", "0.6"],
        "best epoch": ["2", "1", "2"],
        "seconds": ["3", "3", "3"],
        "validation accuracy by chance": ["0.125"] * 3,
    }


def test_same_settings_are_not_printed_and_folders_count_once(tmp_path, capsys):
    a = write_run(tmp_path / "x" / "run", {"with_lbe": [0.5, 0.5]})
    b = write_run(tmp_path / "y" / "run", {"with_lbe": [0.25, 0.5]}, epochs=3)
    status, rows, _ = report(capsys, a, b, a)
    assert status == 0
    assert not [name for name in rows if name.startswith(("--", "data", "env"))]
    # Two folders of one name are told apart.
    assert rows[""] == [f"{a} with LBE", f"{b} with LBE"]
    assert rows["epochs"] == ["2", "2 of 3"]


def test_lines_of_a_file_are_as_long_as_they_have_to_be(tmp_path, capsys):
    names = [f"run-with-a-name-that-takes-room-{number}" for number in range(9)]
    for number, name in enumerate(names):
        write_run(tmp_path / name, {"with_lbe": [0.5]}, epochs=1, seed=number)
    status, rows, _ = report(capsys, *(tmp_path / name for name in names))
    assert status == 0
    assert rows[""] == [f"{name} with LBE" for name in names]
    assert rows["--seed"] == [str(number) for number in range(9)]


def test_what_is_not_a_run_is_one_line(tmp_path, capsys):
    good = write_run(tmp_path / "good", {"with_lbe": [0.5, 0.5]})
    config = json.loads((good / "config.json").read_text())

    def changed(name: str, **changes: object) -> pathlib.Path:
        folder = write_run(tmp_path / name, {"with_lbe": [0.5, 0.5]})
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    def with_history(name: str, text: str) -> pathlib.Path:
        folder = write_run(tmp_path / name, {"with_lbe": [0.5, 0.5]})
        (folder / "with_lbe" / "history.json").write_text(text)
        return folder

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    no_config = changed("none")
    (no_config / "config.json").write_text("{}")
    for folder, message in (
        (tmp_path / "absent", "is no folder"),
        (tmp_path / "file", "is no folder"),
        (tmp_path / "empty", "has no config.json"),
        (no_config, "is not that of a run"),
        (changed("text", settings="x"), "is not that of a run"),
        (changed("list", environment=[1]), "is not that of a run"),
        (changed("depth", settings={"depth": "deep"}), "--depth must be of type int"),
        (changed("activation", settings={"activation": "x"}), "--activation must be"),
        (with_history("number", "1"), "is not the history of a run"),
        (with_history("numbers", "[1]"), "is not the history of a run"),
        (with_history("row", '[{"epoch": 1}]'), "does not hold what a run writes"),
        (with_history("half", "[{"), "cannot be read"),
        (with_history("nothing", "[]"), "holds no finished epoch"),
    ):
        status, rows, error = report(capsys, good, folder)
        assert (status, rows) == (2, {}), folder
        assert error.startswith("error: ") and error.count("\n") == 1
        assert message in error, error
        assert folder.name in error or error.startswith("error: --")


def test_report_of_a_run_is_what_the_run_printed(train, tmp_path, capsys):
    status, output, _ = train("--epochs", 1)
    assert status == 0
    printed = table("\n".join(re.findall(r"^[│┃].*$", output, re.M)))
    status, rows, _ = report(capsys, tmp_path / "run")
    assert status == 0
    chance = rows.pop("validation accuracy by chance")
    assert chance == [f"{14 / 40:.4g}"] * 2
    assert rows.pop("") == ["run without LBE", "run with LBE"]
    assert printed.pop("") == ["without LBE", "with LBE"]
    assert rows == printed and len(rows) > 10


# The dry run


def test_dry_run_says_what_there_is_to_do_and_writes_nothing(train, tmp_path):
    status, output, error = train("--dry-run", "--epochs", 7, "--lbe-alpha", 2.5)
    assert (status, error) == (0, "")
    assert not (tmp_path / "run").exists()
    printed = dict(re.findall(r"^  --(\S+) +(.*)$", output, re.M))
    assert [*printed] == [name.replace("_", "-") for name in Settings().as_dict()]
    assert (printed["epochs"], printed["lbe-alpha"]) == ("7", "2.5")
    rows = table(output)
    assert rows[""] == ["without LBE", "with LBE"]
    # Two hidden layers and the logits of 6 x 6 pixels; and an alpha for each of two.
    plain = (36 * 8 + 8) + (8 * 8 + 8) + (8 * 3 + 3)
    assert rows["parameters"] == [str(plain), str(plain + 2)]
    assert rows["epochs to train"] == ["7", "7"]
    assert re.search(r"^memory: \d+\.\d GiB, time: about \d+ s; nothing", output, re.M)


def test_dry_run_of_a_run_that_began_is_of_what_is_left(train, tmp_path):
    assert train("--lbe", "--epochs", 1)[0] == 0
    folder = tmp_path / "run"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    status, output, _ = train("--lbe", "--epochs", 3, "--dry-run")
    assert status == 0 and table(output)["epochs to train"] == ["2"]
    status, output, _ = train("--lbe", "--epochs", 1, "--dry-run")
    assert status == 0 and "with LBE: finished earlier, nothing to train" in output
    status, _, error = train("--lbe", "--dry-run", "--seed", 5)
    assert status == 2 and "(seed: 1 there, 5 here)" in error
    status, output, _ = train("--lbe", "--dry-run", "--overwrite", "--seed", 5)
    assert status == 0 and table(output)["epochs to train"] == ["3"]
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    # The checkpoint is as large as was said.
    with np.load(folder / "with_lbe" / "checkpoint.npz") as saved:
        size = sum(saved[key].nbytes for key in saved if key != "progress")
    settings = Settings.from_mapping(RunFolder(folder).config()["settings"])
    cost = estimate.measure(settings, data.load(settings.data), lbe=True)
    assert cost.saved_bytes == size


@pytest.mark.parametrize(("steps", "calls"), [(1, 3 + 1), (2, 2 + 1)])
def test_time_of_an_epoch_is_that_of_its_calls(npz, monkeypatch, steps, calls):
    """By a clock that goes on by a second whenever somebody looks at it."""
    clock = itertools.count()
    monkeypatch.setattr(
        estimate, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock)))
    )
    settings = Settings(depth=1, width=4, batch_size=64, steps_per_execution=steps)
    cost = estimate.measure(settings, data.load(str(npz)), lbe=False)
    assert cost.epoch_seconds == calls
    # The clock is read twice for each call, and before and after the first epoch.
    first_epoch = min(estimate.STEPS, calls - 1) + 1
    assert cost.start_seconds == 2 * first_epoch + 1


def test_tracing_is_no_part_of_an_epoch():
    assert estimate._typical([60.0, 1.0, 2.0, 1.0, 1.0, 3.0]) == 1.0
    assert estimate._typical([60.0, 1.0]) == 1.0


def test_memory_is_what_the_system_counts():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    now = pages * os.sysconf("SC_PAGE_SIZE")
    before = estimate.memory()
    assert now * 0.9 <= before < 100 * now
    held = np.ones(2 * before, np.uint8)
    assert estimate.memory() > before + held.nbytes / 3
