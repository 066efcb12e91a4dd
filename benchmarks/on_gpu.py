# SPDX-License-Identifier: Apache-2.0
"""Builds lbe_ops for this Python, and tests or times it on this machine's GPU.

    python3 benchmarks/on_gpu.py test [arguments of pytest]
    python3 benchmarks/on_gpu.py bench [arguments of benchmarks/bench_gpu.py]
    python3 benchmarks/on_gpu.py evidence [--seconds N] [--output DIR] [--archive FILE]
    python3 benchmarks/on_gpu.py build

Takes what is installed, and names in one line what it needs and does not find; builds
TensorFlow's ops only where TensorFlow is. No virtual environment and no download, since
GPU machines may reach no package registry.

`evidence` is for a machine that is there for some minutes: everything that only a GPU
can tell, the most telling first. Bits of all kernels, tests, sanitizers, the kernels'
times beside a model's, numbers of blocks, the profiler's counters, and what else
computes batch entropy. Each stage has a limit and a log; none ends the run. Everything
is in the archive, which is made anew after each stage.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig

import gpu_stages
from gpu_stages import Stage

ROOT = pathlib.Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
# In tests/, where `import lbe_ops` cannot mean the source folder. What takes minutes or
# gigabytes is for who asks for it (-m "gpu and slow"); packages of a GPU machine may
# have warnings that are none of ours.
# The experiments have no test for GPUs, and need matplotlib.
PYTEST = ["-m", "pytest", "-m", "gpu and not slow", "-W", "default", "-rs"]
PYTEST += ["--ignore=test_experiments.py"]
COMMANDS = {
    "test": (ROOT / "tests", PYTEST),
    "bench": (ROOT, [BENCHMARKS / "bench_gpu.py"]),
}
# What each cannot do without, by the names of the modules.
MODULES = {
    "test": ["pybind11", "numpy", "pytest", "hypothesis", "ml_dtypes"],
    "bench": ["pybind11", "numpy", "torch"],
    "build": ["pybind11", "numpy"],
    "evidence": ["pybind11", "numpy", "ml_dtypes"],
}
SHAPES_WITH_PEERS = ("4096x4096", "65536x64", "128x200704", "512x1024")
SWEPT_SHAPES = ("4096x4096", "128x200704", "65536x64", "16384x16384")
SWEPT_BLOCKS = ("264", "396", "528", "792", "1024", "2048")
SWEPT_PASSES = ("forward", "relu+bias forward", "gradient", "relu+bias gradient")
# Counters of Nsight Compute: time, memory, sectors that L2 is asked to write and to
# read, issue slots, pipes, and what a launch is made of.
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sectors_op_write.sum",
    "lts__t_sectors_op_read.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__grid_size",
    "launch__block_size",
    "launch__occupancy_limit_registers",
)
PROFILERS = (
    "/usr/local/cuda/bin/ncu",
    "/opt/nvidia/nsight-compute/*/ncu",
)


def missing_gpu() -> str:
    """Why the driver finds no GPU, or nothing."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"the NVIDIA driver does not load ({error})"
    status, count = driver.cuInit(0), ctypes.c_int()
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0:
        return f"the NVIDIA driver does not start (CUDA error {status})"
    return "" if count.value > 0 else "the NVIDIA driver knows of none"


def architecture() -> str:
    """What CMake calls the first GPU: 90-real. REQUIRES: there is one."""
    driver = ctypes.CDLL("libcuda.so.1")
    numbers = []
    for attribute in (75, 76):  # major and minor compute capability
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        numbers.append(value.value)
    return "{}{}-real".format(*numbers)


def missing_requirements(command: str, path: str) -> list[str]:
    missing = [tool for tool in ("cmake", "ninja") if not shutil.which(tool, path=path)]
    return missing + missing_modules(MODULES[command])


def missing_modules(names: list[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def untested() -> list[str]:
    """What the tests of a build leave out on this machine, and why."""
    if not built("libtf_ops.so"):
        return [f"TensorFlow's op: {sys.executable} cannot import tensorflow"]
    lines = []
    script = "import sys, tensorflow as tf; sys.exit(not tf.test.is_built_with_cuda())"
    if subprocess.run([sys.executable, "-c", script], check=False).returncode != 0:
        lines.append("TensorFlow's op on the GPU: a TensorFlow without GPU support")
    if not built("libxla_ops.so"):
        lines.append(
            "the op under XLA: built without libxla_ops.so, which needs TensorFlow "
            "2.20 or newer"
        )
    return lines


def built(name: str) -> bool:
    """Whether there is that library for TensorFlow in the build."""
    return any((SITE / "lbe_ops").glob(f"tensorflow*/{name}"))


def build(path: str) -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(
        ROOT / "lbe_ops", SITE / "lbe_ops", ignore=shutil.ignore_patterns("*.so")
    )
    options = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DLBE_OUTPUT_DIR={SITE}",
        *("-DLBE_CUDA=ON", "-DLBE_TENSORFLOW=AUTO"),
    ]
    for command in (
        ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *options],
        ["cmake", "--build", BUILD],
    ):
        done = subprocess.run(command, env={**os.environ, "PATH": path}, check=False)
        if done.returncode != 0:
            sys.exit(done.returncode)


def environment() -> dict[str, str]:
    """What a script needs to find the build and to insist on the GPU."""
    known = os.environ.get("PYTHONPATH")
    return {
        "LBE_REQUIRE_GPU": "1",
        "PYTHONPATH": os.pathsep.join([str(SITE), *([known] if known else [])]),
    }


def find_tool(name: str, *patterns: str) -> str:
    """The path of a tool of CUDA, or nothing."""
    found = shutil.which(name)
    if found:
        return found
    for pattern in patterns:
        paths = sorted(pathlib.Path("/").glob(pattern.lstrip("/")))
        if paths:
            return str(paths[-1])
    return ""


def evidence_stages(output: pathlib.Path, emulate: bool = False) -> list[Stage]:
    """Every stage, the most telling first.

    Args:
        output: where they leave their results, a folder.
        emulate: for a test of this script: no GPU and no build, and tiny shapes.
    """
    env = {} if emulate else environment()
    built = [] if emulate else ["build"]
    no_gpu = "emulated" if emulate else ""
    tiny = ["--emulate"] if emulate else []

    def script(name: str, *arguments: str) -> list[str]:
        return [sys.executable, str(BENCHMARKS / name), *arguments]

    def lacking(*modules: str, tool: str = "", path: str = "") -> str:
        missing = missing_modules(list(modules))
        if tool and not path:
            missing.append(tool)
        return f"{', '.join(missing)} is missing" if missing else ""

    def bench(name: str, rounds: int, *arguments: str) -> list[str]:
        command = script("bench_gpu.py", *tiny, *arguments)
        command += ["--output", str(output / name)]
        if emulate:
            return [*command, "--rounds", "1", "--shapes", "16x8", "--no-l2"]
        return [*command, "--rounds", str(rounds)]

    nvidia_smi = find_tool("nvidia-smi")
    sanitizer = find_tool("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
    profiler = find_tool("ncu", *PROFILERS)
    most = ["--most", "3"] if emulate else []
    kernels = script("gpu_kernels.py", "bits", *tiny, *most)
    profile = [profiler, "--clock-control", "none", "--csv", "--page", "raw"]
    profile += ["--print-units", "base", "--metrics", ",".join(COUNTERS)]
    architectures = {} if emulate else {"CUDAARCHS": architecture()}
    stages = [
        Stage(
            "build",
            script("on_gpu.py", "build"),
            180,
            ROOT,
            architectures,
            lacks=no_gpu,
        ),
        Stage(
            "state",
            [nvidia_smi, "-q", "-d", "CLOCK,POWER,ECC"],
            15,
            ROOT,
            lacks=lacking(tool="nvidia-smi", path=nvidia_smi),
        ),
        Stage(
            "bits",
            [*kernels, "--output", str(output / "bits.jsonl")],
            60,
            ROOT,
            env,
            built,
            lacking("numpy", "ml_dtypes"),
        ),
        Stage(
            "tests",
            [sys.executable, *PYTEST, "--deselect"]
            + ["tests/test_cuda_arrays.py::test_compute_sanitizer"],
            90,
            ROOT / "tests",
            env,
            built,
            no_gpu or lacking(*MODULES["test"]),
        ),
        *(
            Stage(
                tool,
                [sanitizer, "--tool", tool, "--error-exitcode", "9", *kernels]
                + ["--quick"],
                45,
                ROOT,
                env,
                built,
                no_gpu or lacking(tool="compute-sanitizer", path=sanitizer),
            )
            for tool in ("memcheck", "racecheck")
        ),
        Stage(
            "bench",
            bench("bench", 10, "--variants", "fused"),
            130,
            ROOT,
            env,
            built,
            lacking("torch"),
        ),
        Stage(
            "blocks",
            bench("blocks", 10, "--variants", "fused", "--no-l2")
            + ["--dtypes", "float32", "float16", "--passes", *SWEPT_PASSES]
            + ["--blocks", *(SWEPT_BLOCKS[:2] if emulate else SWEPT_BLOCKS)]
            + ([] if emulate else ["--shapes", *SWEPT_SHAPES]),
            60,
            ROOT,
            env,
            built,
            lacking("torch"),
        ),
        *(
            Stage(
                name,
                [*profile, "--log-file", str(output / f"{name}.csv")]
                + script("gpu_kernels.py", "launch", *more),
                60,
                ROOT,
                env,
                built,
                no_gpu or lacking(tool="ncu", path=profiler),
            )
            for name, more in (("counters", []), ("counters-more", ["--more"]))
        ),
        Stage(
            "peers",
            bench("peers", 10, "--dtypes", "float32", "float16", "--no-l2")
            + ["--passes", "forward", "forward+gradient"]
            + ["relu+bias forward+gradient", "--variants", "fused", "fused eager"]
            + ["torch eager", *([] if emulate else ["torch compile"]), "JAX jit"]
            + ([] if emulate else ["--shapes", *SHAPES_WITH_PEERS]),
            240,
            ROOT,
            env,
            built,
            lacking("torch"),
        ),
    ]
    return stages


def highlights(folder: pathlib.Path) -> list[str]:
    """Measured beside predicted, as far as that is there; the rest is in the tables."""
    lines = []
    for dtype in ("float32", "float16"):
        path = folder / "bench" / dtype / "results.json"
        if not path.exists():
            continue
        rows = json.loads(path.read_text())["rows"]
        known = [
            r for r in rows if "fused" in r["seconds"] and r.get("predicted_seconds")
        ]
        for row in known[:22]:
            shape = "x".join(map(str, row["shape"]))
            took = row["seconds"]["fused"]["median"]
            ratio = took / row["predicted_seconds"]
            lines.append(
                f"{shape} {dtype} {row['pass']}: {1e6 * took:.1f} us, "
                f"{ratio:.2f} of the prediction"
            )
    return lines


def evidence(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="on_gpu.py evidence")
    parser.add_argument("--seconds", type=float, default=570, help="for everything")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("results/gpu-evidence")
    )
    parser.add_argument(
        "--archive", type=pathlib.Path, help="all of it packed; DIR/all.tgz"
    )
    parser.add_argument("--only", nargs="+", help="names of stages; build comes along")
    parser.add_argument(
        "--emulate", action="store_true", help="no GPU: test this script"
    )
    chosen = parser.parse_args(arguments)
    output = chosen.output.resolve()
    archive = (chosen.archive or output / "all.tgz").resolve()
    if (output / "stages.json").exists():  # of an earlier run
        shutil.rmtree(output)
    stages = evidence_stages(output, chosen.emulate)
    if chosen.only:
        unknown = set(chosen.only) - {stage.name for stage in stages}
        if unknown:
            parser.error(f"no such stage: {', '.join(sorted(unknown))}")
        stages = [s for s in stages if s.name in {"build", *chosen.only}]
    # Whoever ends this process gets what is there, and no stage runs on.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    outcomes = gpu_stages.run_stages(stages, output, chosen.seconds, archive)
    left_out = gpu_stages.keep(outcomes, output, archive, gpu_stages.ARCHIVE_BYTES)
    for outcome in outcomes:
        if outcome["status"].startswith(("failed", "cut off")):
            print(f"\nThe end of {outcome['stage']}.log:")
            log = output / f"{outcome['stage']}.log"
            print("\n".join(gpu_stages.last_lines(log, 12)))
    print("\n".join(["", *highlights(output), "", gpu_stages.summary(outcomes)]))
    if left_out:
        print(f"Too large for the archive: {', '.join(left_out)}")
    print(f"Results: {output}, packed: {archive}")
    good = all(o["status"] == "ok" or "left out" in o["status"] for o in outcomes)
    return 0 if good else 1


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in MODULES:
        sys.exit(__doc__)
    command, *rest = arguments
    emulated = command == "evidence" and "--emulate" in rest
    reason = "" if emulated else missing_gpu()
    if reason:
        sys.exit(f"no GPU: {reason}")
    path = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
    missing = missing_requirements(command, path)
    if missing:
        sys.exit(f"error: {sys.executable} lacks: pip install {' '.join(missing)}")
    if command == "evidence":
        return evidence(rest)
    build(path)
    if command == "build":
        return 0
    folder, script = COMMANDS[command]
    env = {**os.environ, **environment()}
    left_out = []
    if command == "test":
        left_out = [f"NOT TESTED: {what}" for what in untested()]
        env["LBE_REQUIRE_NATIVE"] = "1"
        if built("libxla_ops.so"):
            env["LBE_REQUIRE_XLA"] = "1"
    # Before the tests, for who waits; and after, where it is read.
    for line in left_out:
        print(line, flush=True)
    status = subprocess.run(
        [sys.executable, *script, *rest], cwd=folder, env=env, check=False
    ).returncode
    for line in left_out:
        print(line)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
