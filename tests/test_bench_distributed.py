# SPDX-License-Identifier: Apache-2.0
"""`make bench-distributed`: its processes, its figures, and what it makes of them."""

import dataclasses
import json
import subprocess
import sys

import pytest
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    pytest.importorskip("scipy", reason="only the benchmark needs it")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import distributed_report
    import distributed_worker
    import training_worker

    return distributed_report, distributed_worker, training_worker


def run(*arguments):
    return subprocess.run(
        [sys.executable, BENCHMARKS / "bench_distributed.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
def test_a_short_run_on_two_replicas(modules, tmp_path):
    done = run("--quick", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["variant"]: row for row in results["rows"]}
    assert tuple(rows) == modules[1].VARIANTS
    for row in rows.values():
        assert len(row["step_seconds"]) == 3
        assert row["process_seconds"] == [sorted(row["step_seconds"])[1]]
        assert 0 < min(row["step_seconds"]) < row["first_step_seconds"][0]
        assert row["peak_memory_bytes"] > 2**27  # TensorFlow alone needs that
    collectives = {name: row["collectives"] for name, row in rows.items()}
    without, own, synchronised, batch_norm = collectives.values()
    # 784 x 16, 3 x 16 x 16 and 16 x 10 weights, with biases; then 4 alphas.
    gradients = 4 * (785 * 16 + 3 * 17 * 16 + 17 * 10)
    assert without == {"gradients": [gradients], "statistics": [], "logs": []}
    assert own == {"gradients": [gradients + 16], "statistics": [], "logs": []}
    # Of 2 replicas: the loss and its samples, 4 numbers of samples, 64 means and M2.
    slots = [2 * 4 * (2 + 4 + 2 * 64)]
    assert synchronised == {**own, "statistics": slots}
    # Keras has three in the forward pass of a layer, and some in the backward pass.
    assert len(batch_norm["statistics"]) > 3 * 4
    assert 2.0 < rows["no LBE"]["loss"] < rows["LBE synchronised"]["loss"]
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n| dense 4 x 16, batch 32 | 1 process x 2 |") == 4
    assert "met     dense 4 x 16, batch 32, 1 process x 2: 2 collectives: 2" in table
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.long
def test_a_short_run_in_two_processes(modules, tmp_path):
    variants = "no LBE", "LBE synchronised"
    done = run(
        *("--quick", "--layouts", "2x1", "--variants", *variants),
        *("--output", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["layout"] for row in rows] == [{"processes": 2, "replicas": 1}] * 2
    without, synchronised = (row["collectives"] for row in rows)
    assert [len(without["gradients"]), len(without["statistics"])] == [1, 0]
    assert [len(synchronised["gradients"]), len(synchronised["statistics"])] == [1, 1]
    # One mean of all logs, which Keras reduces there: a sum and a count.
    assert len(without["logs"]) == len(synchronised["logs"]) == 2


@pytest.mark.usefixtures("modules")
def test_bad_arguments_are_named():
    done = run("--quick", "--threads", "-1")
    assert done.returncode == 2
    assert "must be at least 1" in done.stderr


def rows_of(modules, seconds):
    _, distributed_worker, training_worker = modules
    net = training_worker.Net("dense", 500, 128, 512)
    return [
        {
            "net": dataclasses.asdict(net),
            "layout": dataclasses.asdict(distributed_worker.Layout(1, 2)),
            "variant": variant,
            "step_seconds": steps,
            "process_seconds": [steps[0], steps[1]],
            "first_step_seconds": [10.0 + index],
            "collectives": {"gradients": [8], "statistics": [4] * index, "logs": []},
            "nodes": 5,
        }
        for index, (variant, steps) in enumerate(seconds.items())
    ]


def test_targets(modules):
    base = [1.0, 2.0, 4.0]
    rows = rows_of(
        modules,
        {"LBE per replica": base, "LBE synchronised": [1.04 * each for each in base]},
    )
    number, step, first = modules[0].targets(rows)
    assert number[1:] == ("2", True)
    assert "step at most 1.05 times LBE per replica" in step[0]
    assert step[1:] == ("1.040", True)
    assert first[1:] == ("1.100", False)


def test_variants_that_take_too_long_are_left_out_with_the_reason(modules, tmp_path):
    rows = rows_of(modules, {"no LBE": [1.0, 1.1], "BatchNormalization": [2.0, 2.1]})
    rows[1] = {name: rows[1][name] for name in ("net", "layout", "variant")}
    rows[1]["skipped"] = "it takes longer than 300 seconds"
    results = {
        "command": ["bench"],
        "native": "1",
        "threads": 1,
        "rounds": 2,
        "starts": 1,
        "machine": {"cpu": "some", "cores": 1},
        "versions": {"keras": "3"},
        "rows": rows,
    }
    modules[0].finish(results, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert (
        "Not timed, dense 500 x 128, batch 512, 1 process x 2, BatchNormalization: it "
        "takes longer than 300 seconds." in table
    )
    assert table.count("\n| dense") == 1
    assert "Medians of each process: no LBE 1000.0, 1100.0." in table


def test_a_worker_that_is_too_slow_is_ended(modules):
    import workers

    with pytest.raises(workers.WorkerError, match="longer than 0.01 seconds"):
        workers.Worker(_sleep, [()], 0.01)


def _sleep(connection):
    connection.recv()
