# SPDX-License-Identifier: Apache-2.0
"""Shapes of activations on the command line of a benchmark: 512x128."""

from __future__ import annotations

import argparse


def parse_shape(text: str) -> tuple[int, int]:
    try:
        n, units = map(int, text.split("x"))
    except ValueError:
        n = units = 0
    if n < 2 or units < 1:
        raise argparse.ArgumentTypeError(
            f"a shape is SAMPLESxUNITS with at least 2x1, such as 512x128, not {text!r}"
        )
    return n, units
