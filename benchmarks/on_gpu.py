# SPDX-License-Identifier: Apache-2.0
"""Builds lbe_ops for this Python, and tests or times it on this machine's GPU.

    python3 .ci/on_gpu.py test [arguments of pytest]
    python3 .ci/on_gpu.py bench [arguments of benchmarks/bench_gpu.py]

Takes what is installed, and names in one line what it needs and does not find; builds
TensorFlow's ops only where TensorFlow is. No virtual environment and no download, since
GPU machines may reach no package registry.
"""

import ctypes
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
# In tests/, where `import lbe_ops` cannot mean the source folder.
# The experiments have no test for GPUs, and need matplotlib.
PYTEST = ["-m", "pytest", "-m", "gpu", "-rs", "--ignore=test_experiments.py"]
COMMANDS = {
    "test": (ROOT / "tests", PYTEST),
    "bench": (ROOT, [ROOT / "benchmarks" / "bench_gpu.py"]),
}
# What each cannot do without, by the names of the modules.
MODULES = {
    "test": ["pybind11", "numpy", "pytest", "hypothesis", "ml_dtypes"],
    "bench": ["pybind11", "numpy", "torch"],
}


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


def missing_requirements(command: str, path: str) -> list[str]:
    missing = [tool for tool in ("cmake", "ninja") if not shutil.which(tool, path=path)]
    return missing + [
        name for name in MODULES[command] if importlib.util.find_spec(name) is None
    ]


def untested() -> list[str]:
    """What the tests of a build leave out on this machine, and why."""
    if not (SITE / "lbe_ops" / "libtf_ops.so").exists():
        return [f"TensorFlow's op: {sys.executable} cannot import tensorflow"]
    lines = []
    script = "import sys, tensorflow as tf; sys.exit(not tf.test.is_built_with_cuda())"
    if subprocess.run([sys.executable, "-c", script], check=False).returncode != 0:
        lines.append("TensorFlow's op on the GPU: a TensorFlow without GPU support")
    if not (SITE / "lbe_ops" / "libxla_ops.so").exists():
        lines.append(
            "the op under XLA: built without libxla_ops.so, which needs "
            "sudo apt-get install -y libhighwayhash-dev libfarmhash-dev"
        )
    return lines


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


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        sys.exit(__doc__)
    reason = missing_gpu()
    if reason:
        sys.exit(f"no GPU: {reason}")
    path = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
    missing = missing_requirements(arguments[0], path)
    if missing:
        sys.exit(f"error: {sys.executable} lacks: pip install {' '.join(missing)}")
    build(path)
    folder, command = COMMANDS[arguments[0]]
    known = os.environ.get("PYTHONPATH")
    env = {
        **os.environ,
        "LBE_REQUIRE_GPU": "1",
        "PYTHONPATH": os.pathsep.join([str(SITE), *([known] if known else [])]),
    }
    left_out = []
    if arguments[0] == "test":
        left_out = [f"NOT TESTED: {what}" for what in untested()]
        env["LBE_REQUIRE_NATIVE"] = "1"
        if (SITE / "lbe_ops" / "libxla_ops.so").exists():
            env["LBE_REQUIRE_XLA"] = "1"
    # Before the tests, for who waits; and after, where it is read.
    for line in left_out:
        print(line, flush=True)
    status = subprocess.run(
        [sys.executable, *command, *arguments[1:]], cwd=folder, env=env, check=False
    ).returncode
    for line in left_out:
        print(line)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
