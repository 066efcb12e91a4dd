# SPDX-License-Identifier: Apache-2.0
"""Builds lbe_ops for this Python, and tests or times it on this machine's GPU.

    python3 .ci/on_gpu.py test [arguments of pytest]
    python3 .ci/on_gpu.py bench [arguments of benchmarks/bench_gpu.py]

Takes what is installed: CMake, Ninja, nvcc and pybind11; TensorFlow's ops only where
TensorFlow is. No virtual environment and no download, since GPU machines may reach no
package registry.
"""

import ctypes
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
COMMANDS = {
    "test": (ROOT / "tests", ["-m", "pytest", "-m", "gpu", "-rs"]),
    "bench": (ROOT, [ROOT / "benchmarks" / "bench_gpu.py"]),
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


def build() -> None:
    path = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=path) is None:
            sys.exit(f"error: {tool} is missing: pip install {tool}")
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
    build()
    folder, command = COMMANDS[arguments[0]]
    known = os.environ.get("PYTHONPATH")
    env = {
        **os.environ,
        "LBE_REQUIRE_GPU": "1",
        "PYTHONPATH": os.pathsep.join([str(SITE), *([known] if known else [])]),
    }
    return subprocess.run(
        [sys.executable, *command, *arguments[1:]], cwd=folder, env=env, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
