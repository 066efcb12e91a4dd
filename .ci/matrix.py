# SPDX-License-Identifier: Apache-2.0
"""Tests the wheel in dist/ with other TensorFlows, Pythons and Kerases.

For each of CELLS an environment below build/matrix, with the wheel and nothing of the
source folder. Tests that matter to a TensorFlow run once in it, those of the Keras half
with every Keras. The results go into a table; a failure is the exit status.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys
import time

import supported

ROOT = supported.ROOT
# TensorFlow, Python.
CELLS = (
    *(("2.19", "3.11"), ("2.20", "3.12"), ("2.20", "3.13")),
    *(("2.21", "3.10"), ("2.21", "3.13")),
)
KERASES = "3.15", "3.13", "3.12"
OLDEST_PYTHON_OF_KERAS_3_13 = "3.11"
# Files of tests: what is quickly seen of a TensorFlow, what takes minutes, and all of
# the Keras half.
QUICK_TESTS = "native numpy_module packaging"
TENSORFLOW_TESTS = "ops epilogue synchronized_ops xla"
KERAS_TESTS = (
    "callbacks diagnose initializers keras_internals layers loss measure migration "
    "model regularizer strength targets variants"
)
TOOLS = "hypothesis", "matplotlib", "pytest", "pytest-xdist", "tensorboard"


def kerases(python: str) -> list[str]:
    """The Kerases that there are for a Python."""
    old = supported.as_numbers(python) < supported.as_numbers(
        OLDEST_PYTHON_OF_KERAS_3_13
    )
    return [keras for keras in KERASES if keras == "3.12" or not old]


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(each) for each in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,
    )


def install(python: pathlib.Path, *what: object) -> None:
    done = run(python, "-m", "pip", "install", "--quiet", *what)
    if done.returncode != 0:
        sys.exit(f"error: pip install {' '.join(map(str, what))}\n{done.stdout}")


def environment(tensorflow: str, minor: str, wheel: pathlib.Path) -> pathlib.Path:
    """The interpreter of the cell's environment, which is made if it is not there."""
    folder = ROOT / "build" / "matrix" / f"tensorflow{tensorflow}-python{minor}"
    python = folder / "bin" / "python"
    if not python.exists():
        base = supported.find(minor)
        if base is None:
            sys.exit(f"error: there is no Python {minor} with header files")
        run(base, "-m", "venv", folder).check_returncode()
    install(python, f"tensorflow-cpu=={tensorflow}.*", *TOOLS)
    install(python, "--force-reinstall", "--no-deps", wheel)
    return python


def test(
    python: pathlib.Path, tensorflow: str, names: str, jobs: str
) -> tuple[str, bool]:
    """pytest's last line, and whether all tests have passed."""
    env = {
        **os.environ,
        "LBE_REQUIRE_NATIVE": "1",
        "LBE_REQUIRE_XLA": "0" if tensorflow == "2.19" else "1",
        "LBE_TEST_INSTALLED": "1",
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    files = [f"test_{name}.py" for name in names.split()]
    command = ["-m", "pytest", "-q", "-n", jobs, "--dist", "loadfile"]
    done = run(python, *command, *files, cwd=ROOT / "tests", env=env)
    summary = re.findall(r"^.*\d+ (?:passed|failed|error).* in .*$", done.stdout, re.M)
    if done.returncode != 0:
        print(done.stdout[-20_000:])
    return summary[-1] if summary else "did not run", done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cells",
        nargs="+",
        default=["/".join(cell) for cell in CELLS],
        metavar="TENSORFLOW/PYTHON",
    )
    parser.add_argument("--kerases", nargs="+", choices=KERASES, default=KERASES)
    parser.add_argument("--quick", action="store_true", help="not the longest tests")
    parser.add_argument("--jobs", default="logical", help="of pytest-xdist")
    parser.add_argument("--output", type=pathlib.Path, help="where to write the table")
    arguments = parser.parse_args()
    wheels = list((ROOT / "dist").glob("lbe_ops-*-py3-none-manylinux*.whl"))
    if len(wheels) != 1:
        sys.exit(f"error: `make wheel` makes one, and dist/ has {len(wheels)}")
    rows = []
    for cell in arguments.cells:
        tensorflow, minor = cell.split("/")
        python = environment(tensorflow, minor, wheels[0])
        wanted = [each for each in kerases(minor) if each in arguments.kerases]
        for index, keras in enumerate(wanted):
            install(python, f"keras=={keras}.*")
            names = [KERAS_TESTS]
            if index == 0:
                names += [QUICK_TESTS] + [TENSORFLOW_TESTS] * (not arguments.quick)
            started = time.monotonic()
            line, passed = test(python, tensorflow, " ".join(names), arguments.jobs)
            line = f"{line.strip('= ')} ({time.monotonic() - started:.0f} s)"
            print(f"TensorFlow {tensorflow}, Python {minor}, Keras {keras}: {line}")
            versions = run(python, "-c", VERSIONS).stdout.split()[-3:]
            rows.append((passed, [*versions, "green" if passed else "RED", line]))
            if arguments.output is not None:
                write([row for _, row in rows], wheels[0], arguments.output)
    return 0 if all(passed for passed, _ in rows) else 1


VERSIONS = """
import importlib.metadata as m, platform
print(m.version("tensorflow-cpu"), platform.python_version(), m.version("keras"))
"""


def write(rows: list[list[str]], wheel: pathlib.Path, path: pathlib.Path) -> None:
    header = ["TensorFlow", "Python", "Keras", "", "tests"]
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    path.write_text(f"`make test-matrix`, {wheel.name}:\n\n{text}\n")


if __name__ == "__main__":
    sys.exit(main())
