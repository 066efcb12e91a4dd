# SPDX-License-Identifier: Apache-2.0
"""The machine under a benchmark: what it is, and how fast it moves memory."""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
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


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a line of the caches, as TensorFlow's memory does."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    copy = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@functools.cache
def _compiled_streams() -> ctypes.CDLL:
    """streams.c, by the compiler that builds the package, too."""
    compiler = os.environ.get("CC", "cc")
    source = pathlib.Path(__file__).with_name("streams.c")
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder) / "streams.so"
        command = [compiler, "-O3", "-shared", "-fPIC", source, "-o", library]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            sys.exit(f"error: plain reads and copies need a C compiler: {error}")
        if done.returncode != 0:
            sys.exit(f"error: {compiler} does not compile {source}: {done.stderr}")
        loaded = ctypes.CDLL(os.fspath(library))
    pointer, count, flag = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    loaded.stream_read.argtypes = [pointer, count]
    loaded.stream_copy.argtypes = [pointer, pointer, count, flag]
    loaded.stream_triad.argtypes = [pointer, pointer, pointer, count, flag]
    return loaded


class Streams:
    """Plain reads and copies, with a number of threads.

    What a kernel can reach at best: `read` reads an array, `copy` reads one and writes
    another, `triad` reads two and writes a third. From 16 MB up they write around the
    caches, as the kernels do.
    """

    AROUND_BYTES = 16 * 2**20

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)

    def calls(self, size: int) -> dict[str, tuple[Call, int]]:
        """For arrays of `size` bytes: a call of each kind, and the bytes it moves."""
        streams = _compiled_streams()
        count = max(size // 4 // self._threads // 16, 1) * 16
        total = 4 * count * self._threads
        arrays = [aligned(np.ones((self._threads, count), np.float32)) for _ in "xyz"]
        x, y, to = ([row.ctypes.data for row in array] for array in arrays)
        around = int(total > self.AROUND_BYTES)

        def each(work: Callable[[int], object]) -> Call:
            def call() -> object:
                if self._threads == 1:
                    return work(0)
                return list(self._pool.map(work, range(self._threads)))

            call.arrays = arrays  # alive as long as the call
            return call

        return {
            "read": (each(lambda i: streams.stream_read(x[i], count)), total),
            "copy": (
                each(lambda i: streams.stream_copy(x[i], to[i], count, around)),
                2 * total,
            ),
            "triad": (
                each(lambda i: streams.stream_triad(x[i], y[i], to[i], count, around)),
                3 * total,
            ),
        }
