# SPDX-License-Identifier: Apache-2.0
"""The machine under a benchmark: what it is, and how fast it moves memory."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import platform
from collections.abc import Callable

import numpy as np

Call = Callable[[], object]


def describe() -> dict[str, object]:
    """CPU, cores, caches, memory, system and how busy it is."""
    cpuinfo = _fields("/proc/cpuinfo")
    return {
        "cpu": cpuinfo.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "memory": _fields("/proc/meminfo").get("MemTotal", "unknown"),
        "system": platform.platform(),
        "load_average": os.getloadavg(),
    }


def _fields(path: str) -> dict[str, str]:
    """`name : value` lines of a file of the kernel; of equal names, the first."""
    fields: dict[str, str] = {}
    for line in pathlib.Path(path).read_text().splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _caches() -> dict[str, str]:
    caches = {}
    for index in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("i*")):
        level, kind, size = (
            (index / name).read_text().strip() for name in ("level", "type", "size")
        )
        caches[f"L{level} {kind}"] = size
    return caches


class Streams:
    """Plain reads and copies by NumPy, with a number of threads.

    What a kernel can reach at best: `read` is NumPy's maximum, which keeps up with
    the memory, `copy` its assignment, `triad` reads two arrays and writes a third.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)

    def calls(self, size: int) -> dict[str, tuple[Call, int]]:
        """For arrays of `size` bytes: a call of each kind, and the bytes it moves."""
        source, other, target = (
            np.array_split(np.ones(max(size // 4, 1), np.float32), self._threads)
            for _ in range(3)
        )

        def each(work: Callable[[int], object]) -> Call:
            return lambda: list(self._pool.map(work, range(self._threads)))

        return {
            "read": (each(lambda i: source[i].max(initial=0)), size),
            "copy": (each(lambda i: np.copyto(target[i], source[i])), 2 * size),
            "triad": (
                each(lambda i: np.add(source[i], other[i], out=target[i])),
                3 * size,
            ),
        }
