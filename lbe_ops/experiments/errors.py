# SPDX-License-Identifier: Apache-2.0
"""The errors that the command shows as one line."""

from __future__ import annotations

import importlib.util

# What pip calls a module, where that is another name.
DISTRIBUTIONS = {"sklearn": "scikit-learn"}


class ExperimentError(Exception):
    """A bad argument, unreadable data or a conflicting result; one line of text."""


class WorkerLostError(Exception):
    """Another worker of a training on several machines is gone; one line of text."""


def require_installed(*modules: str) -> None:
    """Fails before hours of training and not after them.

    Args:
        modules: what is not among the requirements of the package itself.

    Raises:
        ExperimentError: one of them is not installed.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        # Not the extra, which pip finds in the source folder or in an index alone.
        packages = [DISTRIBUTIONS.get(name, name) for name in missing]
        raise ExperimentError(
            f"{', '.join(packages)} not installed; pip install {' '.join(packages)}"
        )
