# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml allows: `supported.py tensorflows` prints minors of TensorFlow,
`supported.py pythons` an interpreter on this machine for each minor of Python.

Interpreters are looked for in PATH and among those of pyenv and uv, which need not be
in PATH. A minor that is not there, or without its header files, is named on standard
error.
"""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROBE = (
    "import os, sys, sysconfig;"
    "assert os.path.exists(sysconfig.get_path('include') + '/Python.h');"
    "print('{}.{}'.format(*sys.version_info))"
)


def minors(requirement: str) -> list[str]:
    """The minors that a requirement in pyproject.toml allows, such as 3.10."""
    text = (ROOT / "pyproject.toml").read_text()
    limits = re.search(rf'{requirement}[ ="]*>=(\d)\.(\d+),<\d\.(\d+)', text)
    major, first, end = limits.groups()
    return [f"{major}.{minor}" for minor in range(int(first), int(end))]


def as_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def find(minor: str) -> str | None:
    """The path of an interpreter of that minor, or None."""
    home = pathlib.Path.home()
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", home / ".pyenv"))
    uv = home / ".local" / "share" / "uv" / "python"
    candidates = [
        *(pathlib.Path(path, f"python{minor}") for path in os.get_exec_path()),
        *sorted((pyenv / "versions").glob(f"{minor}.*/bin/python{minor}")),
        *sorted(uv.glob(f"cpython-{minor}.*/bin/python{minor}")),
    ]
    for candidate in filter(pathlib.Path.exists, candidates):
        done = subprocess.run(
            [candidate, "-c", PROBE], capture_output=True, text=True, check=False
        )
        if done.stdout.strip() == minor:
            return str(candidate)
    return None


def pythons() -> list[str]:
    found = {minor: find(minor) for minor in minors("requires-python")}
    missing = [minor for minor, path in found.items() if path is None]
    if missing:
        print(f"no Python {', '.join(missing)} with header files", file=sys.stderr)
    return [path for path in found.values() if path]


if __name__ == "__main__":
    print(*pythons() if sys.argv[1:] == ["pythons"] else minors("tensorflow-cpu"))
