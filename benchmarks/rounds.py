# SPDX-License-Identifier: Apache-2.0
"""Calls that take turns, so that a disturbance hits all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

PAUSE_SECONDS = 0.01


def round_robin(
    calls: dict[str, Callable[[], object]], rounds: int, pause: float = PAUSE_SECONDS
) -> dict[str, np.ndarray]:
    """Seconds of each call in each round; where it is short, the mean of many.

    Idle threads of one library spin for a while, at the next one's cost: hence a
    pause between the calls, and a first one that does not count where it matters.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        repeats[name] = min(200, max(1, math.ceil(5e-3 / once)))
    seconds = {name: np.empty(rounds) for name in calls}
    for index in range(rounds):
        for name, call in calls.items():
            time.sleep(pause)
            if repeats[name] > 1:
                call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name][index] = (time.perf_counter() - start) / repeats[name]
    return seconds
