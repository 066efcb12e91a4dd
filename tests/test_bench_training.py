# SPDX-License-Identifier: Apache-2.0
"""`make bench-training`: its processes, its figures, and what it makes of them."""

import dataclasses
import json
import subprocess
import sys

import pytest
from helpers import ROOT, require_native

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    pytest.importorskip("scipy", reason="only the benchmark needs it")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import training_report
    import training_worker

    return training_report, training_worker


def run(*arguments):
    return subprocess.run(
        [sys.executable, BENCHMARKS / "bench_training.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
def test_a_short_run(modules, tmp_path):
    require_native()
    loops = ["graph", "fit"]
    done = run(
        *("--nets", "quick", "--loops", *loops, "--rounds", "3"),
        *("--output", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["loop"], row["variant"]) for row in rows] == [
        (loop, variant) for loop in loops for variant in modules[1].VARIANTS
    ]
    for row in rows:
        assert len(row["step_seconds"]) == 3
        assert all(
            0 < seconds < min(row["first_step_seconds"])
            for seconds in (row["step_seconds"])
        )
        assert row["peak_memory_bytes"] > 2**27  # TensorFlow alone needs that
    for without, pure, fused in (rows[:3], rows[3:]):
        assert max(without["nodes"], fused["nodes"]) < pure["nodes"]
        # The same net with one loss added, which is the same in both.
        assert without["loss"] < pure["loss"] == pytest.approx(fused["loss"], rel=0.02)
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n| dense 20 x 32") == 6
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.usefixtures("modules")
def test_bad_arguments_are_named():
    done = run("--nets", "quick", "--loops", "graph", "--threads", "-1")
    assert done.returncode == 2
    assert "must be at least 1" in done.stderr


def rows_of(net, loop, seconds):
    return [
        {
            "net": dataclasses.asdict(net),
            "loop": loop,
            "variant": variant,
            "step_seconds": steps,
            "first_step_seconds": [10.0 * (1 + index)],
            "peak_memory_bytes": 10**9 * (2 + index),
            "nodes": 5,
        }
        for index, (variant, steps) in enumerate(seconds.items())
    ]


def test_targets_and_ratios(modules):
    training_report, training_worker = modules
    net = training_worker.Net("dense", 500, 128, 512)
    base = [1.0, 2.0, 4.0, 8.0]
    rows = rows_of(
        net,
        "graph",
        {
            "no LBE": base,
            "pure LBE": [1.5 * seconds for seconds in base],
            "fused LBE": [0.9, 2.2, 3.96, 7.92],
        },
    )
    assert training_report.step_ratio(rows[1], rows[0]) == (1.5, 1.5, 1.5)
    ratio, low, high = training_report.step_ratio(rows[2], rows[0])
    assert ratio == pytest.approx(0.99)
    assert 0.9 <= low <= ratio <= high <= 1.1
    step, first, memory = training_report.targets(rows)
    assert "step at most 1.00" in step[0] and step[2]
    assert first[1] == "3.000" and not first[2]
    assert memory[1] == "2.000" and not memory[2]


def test_variants_that_could_not_run_are_left_out_with_the_reason(modules, tmp_path):
    training_report, training_worker = modules
    net = training_worker.Net("dense", 500, 32, 128)
    rows = rows_of(net, "XLA", {"no LBE": [1.0, 1.1], "pure LBE": [1.0, 1.2]})
    rows[1] = {k: rows[1][k] for k in ("net", "loop", "variant")}
    rows[1]["skipped"] = "no more memory"
    results = {
        "command": ["bench"],
        "threads": 1,
        "rounds": 2,
        "machine": {"cpu": "some", "cores": 1},
        "versions": {"keras": "3"},
        "rows": rows,
    }
    training_report.finish(results, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "Not timed, dense 500 x 32, batch 128, XLA, pure LBE: no more memory." in (
        table
    )
    assert table.count("\n| dense") == 1
