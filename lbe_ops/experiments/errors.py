# SPDX-License-Identifier: Apache-2.0
"""The error that the command shows as one line."""


class ExperimentError(Exception):
    """A bad argument, unreadable data or a conflicting result; one line of text."""
