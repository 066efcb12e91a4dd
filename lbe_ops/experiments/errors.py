# SPDX-License-Identifier: Apache-2.0
"""The errors that the command shows as one line."""


class ExperimentError(Exception):
    """A bad argument, unreadable data or a conflicting result; one line of text."""


class WorkerLostError(Exception):
    """Another worker of a training on several machines is gone; one line of text."""
