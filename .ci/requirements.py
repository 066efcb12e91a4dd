# SPDX-License-Identifier: Apache-2.0
"""Prints the requirements of pyproject.toml, one a line, for `pip install -r`.

The build requirements, the dependencies and the extras that are named as arguments;
after `--only`, the extras alone.
"""

import pathlib
import platform
import sys

from pip._vendor.packaging.specifiers import SpecifierSet

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(extras: list[str]) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        config = tomllib.load(file)
    project = config["project"]
    version = platform.python_version()
    if version not in SpecifierSet(project["requires-python"]):
        sys.exit(
            f"error: Python {project['requires-python']} is needed, and this is "
            f"{version}: make clean, then make PYTHON=python3.x"
        )
    requirements = [*config["build-system"]["requires"], *project["dependencies"]]
    if extras[:1] == ["--only"]:
        requirements, extras = [], extras[1:]
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    print("\n".join(sorted(set(requirements))))


if __name__ == "__main__":
    main(sys.argv[1:])
