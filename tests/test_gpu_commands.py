# SPDX-License-Identifier: Apache-2.0
"""`make test-gpu` and `make bench-gpu` without a GPU: they say so; the rest runs."""

import json
import os
import subprocess
import sys

import pytest
from conftest import EMULATION, ROOT, import_numpy_module


def run(*command, **env):
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **env},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        check=False,
    )


def no_gpu():
    if not import_numpy_module().cuda_system()["problem"]:
        pytest.skip("there is a GPU")


def test_test_gpu_says_that_there_is_no_gpu():
    no_gpu()
    done = run(ROOT / ".ci" / "on_gpu.py", "test")
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU: the NVIDIA driver")
    assert done.stderr.count("\n") == 1


def test_bench_gpu_says_that_there_is_no_gpu():
    no_gpu()
    pytest.importorskip("torch")
    done = run(ROOT / "benchmarks" / "bench_gpu.py")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("no GPU: ")


def test_bench_gpu_with_emulated_kernels(emulated_module, tmp_path):
    """All but the GPU's clock and graphs: oracle, turns, results, table and plot."""
    pytest.importorskip("torch")
    variants = ["fused", "fused eager", "torch eager", "TensorFlow op", "pure graph"]
    done = run(
        *(ROOT / "benchmarks" / "bench_gpu.py", "--emulate", "--rounds", "2"),
        *("--shapes", "16x8", "10x2048", "--variants", *variants),
        *("--output", tmp_path),
        PYTHONPATH=str(EMULATION / "out"),
    )
    assert done.returncode == 0, done.stderr
    for dtype in ("float32", "float16", "bfloat16"):
        rows = json.loads((tmp_path / dtype / "results.json").read_text())["rows"]
        assert len(rows) == 6
        for row in rows:
            expected = variants if row["pass"] != "gradient" else variants[:2]
            assert list(row["seconds"]) == expected
            assert not row["skipped"]
        assert (tmp_path / dtype / "plot.png").stat().st_size > 0
        assert "| 16 x 8 | forward |" in (tmp_path / dtype / "table.md").read_text()
