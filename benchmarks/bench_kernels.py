# SPDX-License-Identifier: Apache-2.0
"""Times the CPU kernels alone, beside plain reads and copies by as many threads.

Forward pass, gradient, the epilogue of a ReLU layer (in place) and its gradient (in the
place of dy), through lbe_ops_numpy, on memory that is there already. A forward pass has
to read x once and is judged by reads, everything else by copies. All calls take turns,
round by round, in one process for each instruction set.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import lbe_ops_numpy
import numpy as np
import report
from machine import Streams, aligned, describe
from rounds import round_robin
from shapes import parse_shape

LEVELS = ("avx512", "avx2", "baseline")
SHAPES = ("512x32", "512x128", "4096x64", "65536x64", "4096x4096", "128x200704")
SHAPES += ("8x65536",)
# The share of reads or copies to reach from 16 MB up.
LEAST_SHARE = 0.85
LARGE_BYTES = 16 * 2**20

Call = Callable[[], object]


def kernel_calls(x: np.ndarray, threads: int) -> dict[str, tuple[Call, int, str]]:
    """Of each pass: a call, how many arrays of x's size it moves, and its measure."""
    units = x.shape[1:]
    result = np.float64 if x.dtype == np.float64 else np.float32
    out = (np.empty((), result), np.empty(units, result), np.empty(units, result))
    x, dx, y, dy = (aligned(x) for _ in range(4))
    bias = np.zeros(units, x.dtype)
    lbe_ops_numpy.batch_entropy(x, out=out)
    of_x = tuple(array.copy() for array in out)
    share = 1e-3  # so that dy, which takes the gradient's place, hardly changes

    def forward() -> object:
        return lbe_ops_numpy.batch_entropy(x, out=out, threads=threads)

    def gradient() -> object:
        return lbe_ops_numpy.batch_entropy_grad(x, *of_x[1:], dx=dx, threads=threads)

    def epilogue() -> object:
        return lbe_ops_numpy.epilogue(
            y, bias, activation="relu", y=y, out=out, threads=threads
        )

    def epilogue_gradient(bias_grad: bool) -> Call:
        return lambda: lbe_ops_numpy.epilogue_grad(
            *(dy, x, *of_x[1:], share),
            activation="relu",
            bias_grad=bias_grad,
            dz=dy,
            threads=threads,
        )

    return {
        "forward": (forward, 1, "read"),
        "gradient": (gradient, 2, "copy"),
        "ReLU epilogue": (epilogue, 2, "copy"),
        "its gradient": (epilogue_gradient(False), 3, "copy"),
        "its gradient, bias": (epilogue_gradient(True), 3, "copy"),
    }


def measure(
    shape: tuple[int, int], dtype: str, threads: int, rounds: int
) -> dict[str, Any]:
    """Medians of one shape; seconds, and GB/s of what has to move."""
    import ml_dtypes  # bfloat16

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    x = np.random.default_rng(0).standard_normal(shape, np.float32).astype(kind)
    passes = kernel_calls(x, threads)
    plain = Streams(threads).calls(x.nbytes)
    calls = {name: call for name, (call, *_) in passes.items()}
    calls |= {name: plain[name][0] for name in ("read", "copy")}
    seconds = {
        name: float(np.median(values))
        for name, values in round_robin(calls, rounds, pause=0).items()
    }
    rates = {name: plain[name][1] / seconds[name] / 1e9 for name in ("read", "copy")}
    found = {}
    for name, (_, arrays, judged_by) in passes.items():
        rate = arrays * x.nbytes / seconds[name] / 1e9
        found[name] = {
            "seconds": seconds[name],
            "GB_per_s": rate,
            "share": rate / rates[judged_by],
        }
    return {
        "shape": list(shape),
        "dtype": dtype,
        "threads": threads,
        "bytes": x.nbytes,
        "plain_GB_per_s": rates,
        "passes": found,
    }


def measured_by(level: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one instruction set, from a process of its own."""
    command = [sys.executable, __file__, "--rows-of", level]
    command += ["--rounds", str(arguments.rounds), "--dtypes", *arguments.dtypes]
    command += ["--threads", *map(str, arguments.threads)]
    command += ["--shapes", *("x".join(map(str, s)) for s in arguments.shapes)]
    done = subprocess.run(
        command,
        env={**os.environ, "LBE_OPS_SIMD": level},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"error: the kernels of {level} failed ({done.returncode})")
    return [json.loads(line) for line in done.stdout.splitlines()]


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table: microseconds, GB/s and the share of reads or copies."""
    names = list(rows[0]["passes"])
    header = ["shape", "dtype", "SIMD", "threads", *names, "read", "copy"]
    table = [header]
    for row in rows:
        line = [" x ".join(map(str, row["shape"])), row["dtype"], row["simd"]]
        line.append(str(row["threads"]))
        for name in names:
            found = row["passes"][name]
            line.append(
                f"{1e6 * found['seconds']:.1f} us, {found['GB_per_s']:.1f}, "
                f"{found['share']:.0%}"
            )
        line += [f"{row['plain_GB_per_s'][name]:.1f}" for name in ("read", "copy")]
        table.append(line)
    return table


def targets(rows: list[dict[str, Any]]) -> list[report.Judged]:
    """Shares of reads and copies from 16 MB up, by instruction set and threads."""
    judged = []
    large = [row for row in rows if row["bytes"] >= LARGE_BYTES]
    for simd, threads in dict.fromkeys((r["simd"], r["threads"]) for r in large):
        for name in ("forward", "gradient", "ReLU epilogue"):
            share, shape = min(
                (row["passes"][name]["share"], report.label(row))
                for row in large
                if (row["simd"], row["threads"]) == (simd, threads)
            )
            what = f"{name} from 16 MB, {simd}, {threads} threads: {LEAST_SHARE:.0%}"
            judged.append((what, f"{share:.0%} ({shape})", share >= LEAST_SHARE))
    return judged


def parse_arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    best = LEVELS.index(lbe_ops_numpy.simd_level())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="NxU")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float16", "bfloat16", "float32", "float64"),
        default=["float32"],
    )
    parser.add_argument("--simd", nargs="+", choices=LEVELS[best:])
    parser.add_argument(
        "--threads", nargs="+", type=int, default=sorted({1, cores}), metavar="T"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("results/kernels")
    )
    parser.add_argument("--rows-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1 or min(arguments.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    arguments.shapes = arguments.shapes or [parse_shape(name) for name in SHAPES]
    arguments.simd = arguments.simd or list(LEVELS[best:2]) or list(LEVELS[best:])
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.rows_of is not None:
        for shape in arguments.shapes:
            for dtype in arguments.dtypes:
                for threads in arguments.threads:
                    row = measure(shape, dtype, threads, arguments.rounds)
                    row["simd"] = lbe_ops_numpy.simd_level()
                    print(json.dumps(row), flush=True)
        return
    machine = describe()
    results = {"machine": machine, "rounds": arguments.rounds, "rows": []}
    for level in arguments.simd:
        results["rows"] += measured_by(level, arguments)
        report.write(results, arguments.output)
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    report.conclude(
        arguments.output,
        "The CPU kernels alone",
        cells(results["rows"]),
        3,
        [
            f"{machine['cpu']}, {machine['cores']} cores, {caches}; medians of "
            f"{arguments.rounds} rounds. Microseconds a call, GB/s of what has to "
            "move, and its share of plain reads (forward) or copies (the rest) of as "
            "many bytes by as many threads, in turn with the kernels. A call starts "
            "its threads anew, which counts below a megabyte or two."
        ],
        targets(results["rows"]),
        None,
    )
    print((arguments.output / "table.md").read_text())


if __name__ == "__main__":
    main()
