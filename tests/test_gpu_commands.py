# SPDX-License-Identifier: Apache-2.0
"""`make test-gpu` and `make bench-gpu` without a GPU: they say so; the rest runs."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from helpers import EMULATION, ROOT, import_numpy_module

from lbe_ops import native


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
    variants = ["fused", "fused eager", "torch eager", "TensorFlow op"]
    variants += ["TensorFlow op XLA", "pure graph"]
    if not native.load().custom_call:
        variants.remove("TensorFlow op XLA")
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
            assert row["large_read_GB_per_s"] > 0
        assert (tmp_path / dtype / "plot.png").stat().st_size > 0
        assert "| 16 x 8 | forward |" in (tmp_path / dtype / "table.md").read_text()


WITHOUT = """
import runpy, sys

for name in ("matplotlib", "rich", "jax"):
    sys.modules[name] = None  # any import of it fails
sys.path.insert(0, sys.argv[1])
sys.argv = ["bench_gpu.py", *sys.argv[2:]]
sys.modules["torch"] = __import__("torch")


def broken(*_, **__):
    raise ZeroDivisionError("of torch.compile")


sys.modules["torch"].compile = broken
runpy.run_path(sys.path[0] + "/bench_gpu.py", run_name="__main__")
"""


def test_bench_gpu_without_plots_and_with_variants_that_fail(emulated_module, tmp_path):
    """What cannot run is named with its reason, and everything else is measured."""
    pytest.importorskip("torch")
    plot = tmp_path / "float16" / "plot.png"
    plot.parent.mkdir()
    plot.touch()  # of an earlier run
    done = run(
        *("-c", WITHOUT, ROOT / "benchmarks", "--emulate", "--rounds", "1"),
        *("--shapes", "16x8", "--dtypes", "float16", "--output", tmp_path),
        *("--variants", "torch compile", "JAX jit"),
        PYTHONPATH=str(EMULATION / "out"),
    )
    assert done.returncode == 0, done.stderr
    assert "No plot: pip install matplotlib" in done.stdout
    assert "| 16 x 8 | forward |" in done.stdout
    assert not plot.exists()
    rows = json.loads((plot.parent / "results.json").read_text())["rows"]
    for row in rows:
        assert list(row["seconds"]) == ["fused"]
        if row["pass"] != "gradient":
            reason = "ZeroDivisionError: of torch.compile"
            assert row["skipped"]["torch compile"] == reason
            assert "jax" in row["skipped"]["JAX jit"]


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_missing_requirements_are_named_before_the_build(monkeypatch, tmp_path):
    on_gpu = load_script(ROOT / ".ci" / "on_gpu.py")
    monkeypatch.setattr(on_gpu, "missing_gpu", lambda: "")
    monkeypatch.setattr(on_gpu, "build", lambda path: pytest.fail("built"))
    monkeypatch.setitem(on_gpu.MODULES, "bench", ["numpy", "no_such_module"])
    with pytest.raises(SystemExit, match="pip install .*no_such_module$"):
        on_gpu.main(["bench"])


def test_what_is_not_tested_is_said(monkeypatch, tmp_path):
    on_gpu = load_script(ROOT / ".ci" / "on_gpu.py")
    monkeypatch.setattr(on_gpu, "SITE", tmp_path)
    (line,) = on_gpu.untested()
    assert "cannot import tensorflow" in line
    (tmp_path / "lbe_ops").mkdir()
    (tmp_path / "lbe_ops" / "libtf_ops.so").touch()
    assert "libhighwayhash-dev libfarmhash-dev" in on_gpu.untested()[-1]
    (tmp_path / "lbe_ops" / "libxla_ops.so").touch()
    assert not any("XLA" in line for line in on_gpu.untested())
