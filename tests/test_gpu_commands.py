# SPDX-License-Identifier: Apache-2.0
"""`make test-gpu`, `bench-gpu` and `evidence-gpu` without a GPU.

They say so; stages are run on commands of any kind, and the rest on emulated kernels.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from helpers import EMULATION, ROOT, import_numpy_module

from lbe_ops import native

BENCHMARKS = ROOT / "benchmarks"


def run(*command, **env):
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **env},
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def load_script(monkeypatch):
    """Imports a script of benchmarks/, which has its neighbours at hand."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def no_gpu():
    if not import_numpy_module().cuda_system()["problem"]:
        pytest.skip("there is a GPU")


@pytest.mark.parametrize("command", ["test", "bench", "evidence", "build"])
def test_that_there_is_no_gpu_is_said(command):
    no_gpu()
    done = run(BENCHMARKS / "on_gpu.py", command)
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU: the NVIDIA driver")
    assert done.stderr.count("\n") == 1


def test_bench_gpu_says_that_there_is_no_gpu():
    no_gpu()
    pytest.importorskip("torch")
    done = run(BENCHMARKS / "bench_gpu.py")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("no GPU: ")


def test_bench_gpu_with_emulated_kernels(emulated_module, tmp_path):
    """All but the GPU's clock and graphs: oracle, turns, results, table and plot."""
    pytest.importorskip("torch")
    variants = ["fused", "fused eager", "torch eager", "TensorFlow op"]
    variants += ["TensorFlow op XLA", "pure graph"]
    if not native.load().custom_call:
        variants.remove("TensorFlow op XLA")
    passes = ["forward", "gradient", "relu+bias forward+gradient"]
    done = run(
        *(BENCHMARKS / "bench_gpu.py", "--emulate", "--rounds", "2", "--no-l2"),
        *("--shapes", "16x8", "--dtypes", "float32", "bfloat16", "--passes", *passes),
        *("--variants", *variants, "--output", tmp_path),
        PYTHONPATH=path_with(EMULATION / "out"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for dtype in ("float32", "bfloat16"):
        rows = json.loads((tmp_path / dtype / "results.json").read_text())["rows"]
        assert [row["pass"] for row in rows] == passes
        for row in rows:
            expected = variants if row["pass"] != "gradient" else variants[:2]
            assert list(row["seconds"]) == expected
            assert not row["skipped"]
            assert row["memory_GB_per_s"]["read"] > 0
        assert (tmp_path / dtype / "plot.png").stat().st_size > 0
        table = (tmp_path / dtype / "table.md").read_text()
        assert "| 16 x 8 | forward |" in table
        assert "predicted" not in table
    # Nobody looks at it: plain Markdown.
    assert "| --- | --- | ---: |" in done.stdout


def test_bench_gpu_in_l2_with_blocks_and_predictions(emulated_module, tmp_path):
    pytest.importorskip("torch")
    done = run(
        *(BENCHMARKS / "bench_gpu.py", "--emulate", "--rounds", "1", "--blocks", "7"),
        *("--shapes", "16x8", "3x5", "--dtypes", "float16", "float64"),
        *("--variants", "fused", "--model", "H100", "--output", tmp_path),
        PYTHONPATH=path_with(EMULATION / "out"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # x in units of its size: what is moved, and what is only read.
    moved = {"forward": (1, 1), "gradient": (2, 0), "forward+gradient": (3, 1)}
    for name in ("relu", "tanh", "relu+bias", "tanh+bias"):
        moved |= {f"{name} forward": (2, 0), f"{name} gradient": (3, 1)}
        if "bias" in name:
            moved |= {f"{name} forward+gradient": (5, 1)}
    for dtype in ("float16", "float64"):
        rows = json.loads((tmp_path / dtype / "results.json").read_text())["rows"]
        assert len(rows) == 2 * 2 * len(moved)
        for row in rows:
            name = row["pass"].removesuffix(", in L2")
            assert list(row["seconds"]) == ["fused", "fused, 7 blocks"]
            found = (row["bytes_to_move"], row["bytes_only_read"])
            assert found == tuple(row["bytes"] * times for times in moved[name])
            counted = dtype == "float16" or " " not in name
            predicted = counted and row["pass"] == name
            assert (row["predicted_seconds"] is not None) == predicted
        table = (tmp_path / dtype / "table.md").read_text()
        assert "| predicted | fused/predicted |" in table
    # Each shape with all dtypes before the next shape.
    lines = [line for line in done.stdout.splitlines() if "microseconds:" in line]
    order = list(dict.fromkeys(tuple(line.split()[:4]) for line in lines))
    assert order == [
        (*shape.split(), dtype)
        for shape in ("16 x 8", "3 x 5")
        for dtype in ("float16", "float64")
    ]


def path_with(folder):
    known = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(folder), *([known] if known else [])])


PATCHED = """
import runpy, sys

sys.path.insert(0, sys.argv[1])
patch = sys.argv[2]
sys.argv = ["bench_gpu.py", *sys.argv[3:]]
sys.modules["torch"] = __import__("torch")
exec(patch)
runpy.run_path(sys.path[0] + "/bench_gpu.py", run_name="__main__")
"""


def patched_bench(patch, tmp_path, *arguments):
    return run(
        *("-c", PATCHED, BENCHMARKS, patch, "--emulate", "--rounds", "1"),
        *("--shapes", "16x8", "--no-l2", "--output", tmp_path, *arguments),
        PYTHONPATH=path_with(EMULATION / "out"),
    )


WITHOUT = """
for name in ("matplotlib", "rich", "jax"):
    sys.modules[name] = None  # any import of it fails


def broken(*_, **__):
    raise ZeroDivisionError("of torch.compile")


sys.modules["torch"].compile = broken
"""


def test_bench_gpu_without_plots_and_with_variants_that_fail(emulated_module, tmp_path):
    """What cannot run is named with its reason, and everything else is measured."""
    pytest.importorskip("torch")
    plot = tmp_path / "float16" / "plot.png"
    plot.parent.mkdir()
    plot.touch()  # of an earlier run
    done = patched_bench(
        *(WITHOUT, tmp_path, "--dtypes", "float16", "--passes", "forward", "gradient"),
        *("--variants", "torch compile", "JAX jit"),
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


KERNELS_FAIL = """
import lbe_ops_numpy_emulated as kernels

gradient = kernels.batch_entropy_grad


def broken(*_, **__):
    raise RuntimeError("an illegal memory access")


def wrong(x, *arguments, dx, **options):
    gradient(x, *arguments, dx=dx, **options)
    dx.tensor[3, 2] += 1e3


kernels.epilogue = broken
kernels.batch_entropy_grad = wrong
"""


def test_kernels_that_fail_do_not_end_the_benchmark(emulated_module, tmp_path):
    """They are named in their rows, the others are measured, the exit status is 1."""
    pytest.importorskip("torch")
    done = patched_bench(
        *(KERNELS_FAIL, tmp_path, "--variants", "fused", "torch eager"),
        *("--passes", "relu forward", "gradient", "forward", "--dtypes", "float32"),
    )
    assert done.returncode == 1
    assert "error: 2 rows without the kernels" in done.stderr
    rows = json.loads((tmp_path / "float32" / "results.json").read_text())["rows"]
    relu, gradient, forward = rows
    assert relu["skipped"]["fused"] == "RuntimeError: an illegal memory access"
    assert list(relu["seconds"]) == ["torch eager"]
    assert relu["times_fused"] == {}
    assert gradient["skipped"]["fused"].startswith("differs from the oracle by")
    assert list(forward["seconds"]) == ["fused", "torch eager"]
    table = (tmp_path / "float32" / "table.md").read_text()
    assert "| 16 x 8 | relu forward | - |" in table
    assert "Not timed, fused: RuntimeError: an illegal memory access." in table


DIES = """
import lbe_ops_numpy_emulated as kernels
import os


def killed(*_, **__):
    os._exit(9)


kernels.batch_entropy_grad = killed
"""


def test_results_are_there_after_every_row(emulated_module, tmp_path):
    pytest.importorskip("torch")
    done = patched_bench(
        *(DIES, tmp_path, "--variants", "fused", "--dtypes", "float32"),
        *("--passes", "forward", "relu forward", "gradient"),
    )
    assert done.returncode == 9
    results = json.loads((tmp_path / "float32" / "results.json").read_text())
    assert [row["pass"] for row in results["rows"]] == ["forward", "relu forward"]
    assert "| relu forward |" in (tmp_path / "float32" / "table.md").read_text()


def test_missing_requirements_are_named_before_the_build(load_script, monkeypatch):
    on_gpu = load_script("on_gpu")
    monkeypatch.setattr(on_gpu, "missing_gpu", lambda: "")
    monkeypatch.setattr(on_gpu, "build", lambda path: pytest.fail("built"))
    monkeypatch.setitem(on_gpu.MODULES, "bench", ["numpy", "no_such_module"])
    with pytest.raises(SystemExit, match="pip install .*no_such_module$"):
        on_gpu.main(["bench"])


def test_what_is_not_tested_is_said(load_script, monkeypatch, tmp_path):
    on_gpu = load_script("on_gpu")
    monkeypatch.setattr(on_gpu, "SITE", tmp_path)
    (line,) = on_gpu.untested()
    assert "cannot import tensorflow" in line
    folder = tmp_path / "lbe_ops" / "tensorflow2.21"
    folder.mkdir(parents=True)
    (folder / "libtf_ops.so").touch()
    assert "needs TensorFlow 2.20 or newer" in on_gpu.untested()[-1]
    (folder / "libxla_ops.so").touch()
    assert not any("XLA" in line for line in on_gpu.untested())


# The stages of evidence.


def stage(stages, name, script, seconds=20.0, **options):
    command = [sys.executable, "-c", script]
    return stages.Stage(name, command, seconds, ROOT, **options)


def names_in(archive):
    with tarfile.open(archive) as tar:
        return set(tar.getnames())


def test_no_stage_ends_the_run(load_script, tmp_path):
    stages = load_script("gpu_stages")
    stages.PATIENCE = 0.5
    folder, archive = tmp_path / "results", tmp_path / "all.tgz"
    child = tmp_path / "child"
    hangs = f"""
import pathlib, subprocess, sys, time
print("begun", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(child)!r}).write_text(str(child.pid))
time.sleep(600)
"""
    look = f"""
import json, pathlib, tarfile
names = tarfile.open({str(archive)!r}).getnames()
assert "hangs.log" in names and "summary.md" in names, names
print([o["stage"] for o in json.loads(pathlib.Path({str(folder)!r}, "stages.json")
      .read_text())])
"""
    start = time.monotonic()
    outcomes = stages.run_stages(
        [
            stage(stages, "fails", "print('why'); raise SystemExit(3)"),
            stage(stages, "hangs", hangs, seconds=2),
            stage(stages, "looks", look),
            stage(stages, "needs", "print(1)", needs=("looks", "fails")),
            stage(stages, "lacks", "print(1)", lacks="no such tool"),
            stages.Stage("starts not", ["/no/such/program"], 9, ROOT),
            stage(stages, "last", "print('done')", needs=("looks",)),
        ],
        *(folder, 60, archive),
    )
    assert time.monotonic() - start < 30
    statuses = {o["stage"]: o["status"] for o in outcomes}
    assert statuses.pop("starts not").startswith("failed: ")
    assert statuses == {
        "fails": "failed: exit status 3",
        "hangs": "cut off after 2 s",
        "looks": "ok",
        "needs": "left out: it needs fails",
        "lacks": "left out: no such tool",
        "last": "ok",
    }
    assert outcomes[0]["exit_status"] == 3
    assert (folder / "fails.log").read_text() == "why\n"
    assert (folder / "hangs.log").read_text() == "begun\n"
    assert (folder / "looks.log").read_text() == "['fails', 'hangs']\n"
    with pytest.raises(ProcessLookupError):  # what the stage had started is ended, too
        for _ in range(100):
            os.kill(int(child.read_text()), 0)
            time.sleep(0.05)
    assert {"fails.log", "last.log", "stages.json"} <= names_in(archive)
    assert "| hangs |" in (folder / "summary.md").read_text()


def test_the_budget_holds_for_all_stages(load_script, tmp_path):
    stages = load_script("gpu_stages")
    stages.RESERVE, stages.LEAST_SECONDS, stages.PATIENCE = 0.0, 0.5, 0.5
    outcomes = stages.run_stages(
        [
            stage(stages, "long", "import time; time.sleep(600)", seconds=500),
            stage(stages, "none", "print(1)"),
        ],
        *(tmp_path / "results", 2.0, tmp_path / "all.tgz"),
    )
    assert [o["status"] for o in outcomes] == [
        "cut off after 2 s",
        "left out: no time is left",
    ]
    assert "long.log" in names_in(tmp_path / "all.tgz")


def test_a_run_that_is_ended_leaves_its_archive(load_script, tmp_path, monkeypatch):
    stages = load_script("gpu_stages")

    def ended(*_):
        raise SystemExit(143)

    monkeypatch.setattr(stages, "run_stage", ended)
    with pytest.raises(SystemExit):
        stages.run_stages(
            [stage(stages, "first", "")], tmp_path / "r", 60, tmp_path / "all.tgz"
        )
    assert "ended with the run" in (tmp_path / "r" / "summary.md").read_text()
    assert "stages.json" in names_in(tmp_path / "all.tgz")


def test_the_archive_has_a_limit(load_script, tmp_path):
    """The largest files are left out, by name, and what compresses well is not."""
    stages = load_script("gpu_stages")
    folder, archive = tmp_path / "results", tmp_path / "results" / "all.tgz"
    (folder / "bench").mkdir(parents=True)
    rng = np.random.default_rng(0)
    (folder / "noise.log").write_bytes(rng.bytes(200_000))
    (folder / "bench" / "rows.json").write_bytes(rng.bytes(30_000))
    (folder / "zeros.log").write_bytes(bytes(1_500_000))
    (folder / "huge.log").write_bytes(bytes(2_500_000))
    left_out = stages.pack(folder, archive, 100_000)
    # zeros.log is larger than noise.log, and so the first to go.
    assert left_out == ["huge.log", "zeros.log", "noise.log"]
    assert archive.stat().st_size <= 100_000
    assert names_in(archive) == {"bench/rows.json", "left_out.txt"}
    assert stages.pack(folder, archive, 300_000) == []
    assert "zeros.log" in names_in(archive)
    assert "all.tgz" not in names_in(archive)
    assert not list(folder.glob("*.draft"))


def test_the_stages_of_evidence(load_script, monkeypatch, tmp_path):
    """What tells most comes first, and all of it insists on the build."""
    on_gpu = load_script("on_gpu")
    monkeypatch.setattr(on_gpu, "architecture", lambda: "90-real")
    monkeypatch.setattr(on_gpu, "find_tool", lambda name, *_: f"/tools/{name}")
    monkeypatch.setattr(on_gpu, "missing_modules", lambda names: [])
    stages = on_gpu.evidence_stages(tmp_path)
    names = [stage.name for stage in stages]
    assert names == [
        *("build", "state", "bits", "tests", "memcheck", "racecheck"),
        *("bench", "blocks", "counters", "counters-more", "peers"),
    ]
    of = dict(zip(names, stages, strict=True))
    assert of["build"].env == {"CUDAARCHS": "90-real"}
    assert of["tests"].command[1:7] == [
        *("-m", "pytest", "-m", "gpu and not slow", "-W", "default")
    ]
    assert of["tests"].env["LBE_REQUIRE_GPU"] == "1"
    collected = subprocess.run(
        [*of["tests"].command, "--collect-only", "-q", "test_cuda_arrays.py"],
        cwd=of["tests"].folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "test_values_and_bits" in collected.stdout, collected.stdout
    assert "sanitizer" not in collected.stdout  # a stage of its own
    for name in ("bits", "tests", "memcheck", "bench", "counters", "peers"):
        assert of[name].needs == ["build"]
        assert not of[name].lacks
    assert of["racecheck"].command[:3] == [
        *("/tools/compute-sanitizer", "--tool", "racecheck")
    ]
    counters = of["counters"].command
    assert counters[counters.index("--clock-control") + 1] == "none"
    assert "lts__t_sectors_op_write.sum" in counters[counters.index("--metrics") + 1]
    blocks = of["blocks"].command
    first = blocks.index("--blocks") + 1
    assert blocks[first : first + 6] == ["264", "396", "528", "792", "1024", "2048"]
    monkeypatch.setattr(on_gpu, "find_tool", lambda name, *_: "")
    lacks = {stage.name: stage.lacks for stage in on_gpu.evidence_stages(tmp_path)}
    assert lacks["memcheck"] == "compute-sanitizer is missing"
    assert lacks["counters"] == "ncu is missing"


def test_evidence_with_emulated_kernels(emulated_module, tmp_path):
    """The whole command, as far as it needs no GPU."""
    output, archive = tmp_path / "results", tmp_path / "out" / "all.tgz"
    output.mkdir()
    (output / "stages.json").write_text("[]")
    (output / "stale.log").touch()  # of an earlier run
    done = run(
        *(BENCHMARKS / "on_gpu.py", "evidence", "--emulate", "--seconds", "200"),
        *("--output", output, "--archive", archive, "--only", "bits", "blocks"),
        PYTHONPATH=path_with(EMULATION / "out"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (output / "stale.log").exists()
    statuses = {
        o["stage"]: o["status"]
        for o in json.loads((output / "stages.json").read_text())
    }
    assert statuses["build"] == "left out: emulated"
    assert statuses["bits"] == "ok"
    assert {"bits.jsonl", "bits.log", "summary.md"} <= names_in(archive)
    if importlib.util.find_spec("torch"):
        assert "blocks/float32/results.json" in names_in(archive)
    else:
        assert statuses["blocks"] == "left out: torch is missing"
    unknown = run(*(BENCHMARKS / "on_gpu.py", "evidence", "--emulate", "--only", "no"))
    assert "no such stage: no" in unknown.stderr


# All kernels, for bits and profilers.


class Kernels:
    """The CPU kernels as those of a GPU, as if they wrote to its memory."""

    def __init__(self, real):
        self.real = real

    def cuda_array(self, array):
        return array

    def __getattr__(self, name):
        function = getattr(self.real, name)

        def call(*arguments, blocks=None, **options):
            return function(*arguments, **options)

        return call


def test_bits_of_all_kernels(load_script, tmp_path):
    """Different bits and errors are counted by case, and end nothing."""
    script = load_script("gpu_kernels")
    kernels = Kernels(import_numpy_module())
    path = tmp_path / "bits.jsonl"
    with path.open("w") as log:
        assert script.bits(kernels, quick=False, most=68, log=log) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 68
    assert {line["dtype"] for line in lines} == set(script.DTYPES)
    assert {line["activation"] for line in lines} == set(script.ACTIVATIONS)

    class Wrong(Kernels):
        def batch_entropy_grad(self, x, *arguments, blocks=None):
            dx = self.real.batch_entropy_grad(x, *arguments)
            return dx if blocks is None else np.nextafter(dx, dx.dtype.type(9))

        def epilogue(self, z, bias=None, *, activation, blocks=None, **options):
            if activation == "tanh" and blocks is not None:
                raise RuntimeError("an illegal memory access")
            return self.real.epilogue(z, bias, activation=activation, **options)

    with path.open("w") as log:
        assert script.bits(Wrong(kernels.real), quick=True, most=7, log=log) == 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["different"] == ["dx"]
    assert "illegal memory access" in lines[3]["error"]
    assert lines[5]["different"] == []


def test_launches_for_a_profiler(load_script):
    script = load_script("gpu_kernels")
    kernels = Kernels(import_numpy_module())
    for cases in (script.LAUNCHES, script.MORE_LAUNCHES):
        assert script.launch(kernels, cases, emulated=True) == 0


# The model.

FORWARD, GRADIENT = "forward", "gradient"
LARGE, MIDDLE = (16384, 16384), (4096, 4096)
IMAGES, NARROW = (128, 200704), (65536, 64)
# From reading the machine code and launches by hand, of a forward pass of two launches:
# dtype, shape, then per cent of the usable bandwidth on an H100 and on an H200.
BY_HAND = [
    ((FORWARD, None, False), "float32", MIDDLE, (70, 70), (63, 63)),
    ((FORWARD, None, False), "float32", LARGE, (96, 96), (95, 95)),
    ((FORWARD, None, False), "float32", IMAGES, (84, 84), (79, 79)),
    ((FORWARD, None, False), "float32", NARROW, (18, 18), (13, 13)),
    ((FORWARD, None, False), "float16", MIDDLE, (51, 51), (39, 39)),
    ((FORWARD, None, False), "float16", LARGE, (88, 88), (81, 81)),
    ((FORWARD, None, False), "float16", IMAGES, (23, 23), (17, 17)),
    ((FORWARD, None, False), "float64", MIDDLE, (81, 81), (75, 75)),
    ((FORWARD, "relu", False), "float32", MIDDLE, (83, 83), (70, 70)),
    ((FORWARD, "relu", False), "float32", LARGE, (97, 97), (94, 94)),
    ((FORWARD, "relu", False), "float16", LARGE, (92, 97), (76, 89)),
    ((FORWARD, "tanh", False), "float32", LARGE, (77, 87), (55, 62)),
    ((FORWARD, "softplus", False), "float32", LARGE, (56, 62), (40, 43)),
    ((FORWARD, "tanh", False), "float16", LARGE, (45, 49), (32, 34)),
    ((GRADIENT, None, False), "float32", LARGE, (96, 97), (93, 97)),
    ((GRADIENT, None, False), "float32", MIDDLE, (96, 97), (93, 97)),
    ((GRADIENT, None, False), "float16", MIDDLE, (90, 90), (84, 84)),
    ((GRADIENT, "relu", True), "float32", MIDDLE, (88, 88), (83, 83)),
    ((GRADIENT, "relu", True), "float32", LARGE, (96, 96), (96, 96)),
    ((GRADIENT, "relu", True), "float16", MIDDLE, (78, 78), (67, 67)),
    ((GRADIENT, "relu", True), "float16", LARGE, (95, 95), (93, 93)),
]


def pass_of(model, direction, activation, bias):
    return model.Pass(direction == GRADIENT, activation, bias)


@pytest.mark.parametrize("what, dtype, shape, on_h100, on_h200", BY_HAND, ids=str)
def test_the_model_says_what_was_found_by_hand(
    load_script, what, dtype, shape, on_h100, on_h200
):
    """Within 10 points, as it promises for large arrays."""
    model = load_script("gpu_model")
    what = pass_of(model, *what)
    for gpu, (least, most) in ((model.H100, on_h100), (model.H200, on_h200)):
        time = model.predict(what, dtype, shape, gpu, model.TWO_LAUNCHES)
        share = 100 * model.share_of_bandwidth(time, what, dtype, shape, gpu)
        assert least - 10 <= share <= most + 10


def test_small_arrays_are_latency(load_script):
    model = load_script("gpu_model")
    for gpu in (model.H100, model.H200):
        times = [
            model.predict(
                model.Pass(gradient), "float32", (512, 128), gpu, model.TWO_LAUNCHES
            )
            for gradient in (False, True)
        ]
        assert times == pytest.approx([9, 3], rel=0.4)


def test_launches_are_those_of_the_code(load_script):
    """Tiles, splits and rows of a thread, as the launchers cut them."""
    model = load_script("gpu_model")
    forward, gradient = model.Pass(), model.Pass(gradient=True)
    bias = model.Pass(True, "relu", True)
    for what, dtype, shape, tiles, splits, rows in (
        (forward, "float32", (512, 128), 1, 8, 8),
        (forward, "float16", (512, 128), 1, 4, 8),
        (forward, "float32", MIDDLE, 32, 32, 16),
        (forward, "float16", MIDDLE, 16, 64, 8),
        (forward, "float64", MIDDLE, 64, 16, 32),
        (forward, "float32", IMAGES, 1568, 1, 16),
        (forward, "float16", IMAGES, 784, 2, 8),
        (forward, "float32", NARROW, 1, 512, 8),
        (gradient, "float32", MIDDLE, 4, 256, 16),
        (gradient, "float32", IMAGES, 196, 8, 16),
        (gradient, "float32", (512, 128), 1, 16, 4),
        (bias, "float32", MIDDLE, 32, 32, 16),
        (bias, "float16", IMAGES, 784, 2, 8),
        (bias, "float64", NARROW, 1, 1024, 8),
    ):
        launch = model.launch_of(what, dtype, shape, 1024)
        assert (launch.tiles, launch.splits, launch.run_rows) == (tiles, splits, rows)


def test_launches_of_the_launchers_choice(load_script):
    """No splits where the tiles make a wave, or else nearly two waves of blocks."""
    model = load_script("gpu_model")
    for dtype, shape, wave, blocks in (
        ("float16", IMAGES, 264, 784),
        ("float32", IMAGES, 396, 1568),
        ("float32", MIDDLE, 396, 1024),
        ("float16", MIDDLE, 264, 512),
    ):
        launch = model.launch_of(model.Pass(), dtype, shape, None, wave)
        assert launch.blocks == blocks


def test_the_model_follows_the_design(load_script):
    """Fewer launches, blocks, registers and wider stores change what it says."""
    model = load_script("gpu_model")
    two = model.TWO_LAUNCHES

    def time(what=None, dtype="float32", shape=MIDDLE, design=two):
        what = what or model.Pass()
        return model.predict(what, dtype, shape, model.H200, design)

    one = model.dataclasses.replace(two, launches=1, merge=(3500,))
    for shape in (MIDDLE, IMAGES, NARROW, (512, 128)):
        assert time(shape=shape, design=one) < time(shape=shape)
    assert time(dtype="float16", shape=IMAGES, design=one) < 0.5 * time(
        dtype="float16", shape=IMAGES
    )
    crowded = model.dataclasses.replace(two, resident={("forward", "float16"): 3})
    assert time(dtype="float16", design=crowded) < time(dtype="float16")
    narrow = model.dataclasses.replace(two, write_amplification=8)
    epilogue = model.Pass(True, "relu")
    assert time(epilogue, "float16", LARGE, narrow) > 1.5 * time(
        epilogue, "float16", LARGE
    )
    relu = model.Pass(activation="relu")
    assert time(relu, "float16", LARGE, model.ONE_LAUNCH) < time(relu, "float16", LARGE)
    assert time(relu, "float64") is None  # nobody has counted that one


def test_gpus_by_name(load_script):
    model = load_script("gpu_model")
    assert model.gpu_named("NVIDIA H100 80GB HBM3") is model.H100
    assert model.gpu_named("NVIDIA H200") is model.H200
    assert model.gpu_named("Tesla T4") is None


def test_the_model_as_a_command():
    done = run(BENCHMARKS / "gpu_model.py", "H100", "--shapes", "512x128")
    assert done.returncode == 0, done.stderr
    assert "| 512 x 128 | float32 | forward |" in done.stdout
