# SPDX-License-Identifier: Apache-2.0
"""Times the fused batch entropy against the ways to compute it without it.

Variants: the native op, as a graph and within a function compiled by XLA; its kernels
without the call of TensorFlow around them; the same formula in plain TensorFlow, as a
graph and compiled by XLA; the formula of the TensorFlow port; PyTorch's, where torch is
installed. One call each on a tensor that
is there already, forward (the entropy) and forward + gradient (the entropy and dx).
The call itself is included (see `empty call`), as is the allocation of the results.

Every variant is first compared with the float64 oracle of the tests. Then all take
turns, round by round, so that a disturbance hits all of them, together with plain
reads and copies of as many bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import formulas
import lbe_ops_numpy
import numpy as np
import report
import tensorflow as tf
from machine import Streams, describe
from rounds import round_robin
from shapes import parse_shape

import lbe_ops
from lbe_ops import info, native

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
import oracle

SHAPES = ("128x32", "512x32", "512x128", "512x1024", "1024x4096", "4096x4096")
SHAPES += ("128x200704",)
QUICK_SHAPES = ("512x128", "1024x4096", "4096x4096")
PASSES = ("forward", "forward+gradient")
# Of the largest absolute value of the result; a check of sanity, not of precision.
TOLERANCES = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
STREAM_BYTES = 256 * 2**20

Call = Callable[[], object]
Results = tuple[float, np.ndarray | None]


class UnavailableError(Exception):
    """A variant that cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to compute batch entropy.

    Attributes:
        name: as in the tables.
        ddof: what it subtracts from the batch size; the oracle does the same.
        prepare: of x and whether the gradient is wanted: the call to time, and a
            call that returns (entropy, dx or None) as NumPy values.
    """

    name: str
    ddof: int
    prepare: Callable[[np.ndarray, bool], tuple[Call, Callable[[], Results]]]


def tensorflow_variant(
    name: str, entropy: Callable[[tf.Tensor], tf.Tensor], xla: bool = False
) -> Variant:
    def prepare(
        array: np.ndarray, gradient: bool
    ) -> tuple[Call, Callable[[], Results]]:
        x = tf.constant(array)

        @tf.function(jit_compile=xla, autograph=False)
        def run(x: tf.Tensor) -> tuple[tf.Tensor, ...]:
            if not gradient:
                return (entropy(x),)
            with tf.GradientTape() as tape:
                tape.watch(x)
                h = entropy(x)
            return h, tape.gradient(h, x)

        def results() -> Results:
            h, *dx = run(x)
            return float(h), dx[0].numpy() if dx else None

        return lambda: run(x)[0].numpy(), results

    return Variant(name, 0, prepare)


def fused_xla_variant() -> Variant:
    """The native op under XLA, where the library was built with that."""
    fused = tensorflow_variant(
        "fused XLA", lambda x: lbe_ops.batch_entropy(x, native=True), xla=True
    )

    def prepare(
        array: np.ndarray, gradient: bool
    ) -> tuple[Call, Callable[[], Results]]:
        reason = native.load().xla_reason
        if reason:
            raise UnavailableError(reason)
        return fused.prepare(array, gradient)

    return dataclasses.replace(fused, prepare=prepare)


def kernel_variant(threads: int) -> Variant:
    """The native kernels on TensorFlow's own memory, without a call of TensorFlow."""

    def prepare(
        array: np.ndarray, gradient: bool
    ) -> tuple[Call, Callable[[], Results]]:
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise UnavailableError(f"no view of a {array.dtype} tensor in NumPy")
        x = np.asarray(memoryview(tf.constant(array)))
        dx = np.zeros_like(x)  # memory that is there already

        def run() -> tuple[Any, ...]:
            entropy, *statistics = lbe_ops_numpy.batch_entropy(x, threads=threads)
            if not gradient:
                return (entropy,)
            return entropy, lbe_ops_numpy.batch_entropy_grad(
                x, *statistics, dx=dx, threads=threads
            )

        def results() -> Results:
            h, *dx = run()
            return float(h), dx[0] if dx else None

        return run, results

    return Variant("kernel alone", 0, prepare)


def torch_variant(name: str, compiled: bool, threads: int) -> Variant:
    """The formula of the PyTorch original."""

    def prepare(
        array: np.ndarray, gradient: bool
    ) -> tuple[Call, Callable[[], Results]]:
        try:
            import torch
        except ImportError as error:
            raise UnavailableError(str(error)) from error
        torch.set_num_threads(threads)
        entropy = formulas.pytorch_original()
        if compiled:
            torch.compiler.reset()
            entropy = torch.compile(entropy, dynamic=False)
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise UnavailableError(f"NumPy hands no {array.dtype} to torch")
        x = torch.from_numpy(array.copy()).requires_grad_(gradient)

        def run() -> torch.Tensor:
            x.grad = None
            h = entropy(x)
            if gradient:
                h.backward()
            return h

        def results() -> Results:
            try:
                h = run().item()
            except RuntimeError as error:  # of torch.compile: no compiler, for one
                raise UnavailableError(str(error).splitlines()[0]) from error
            return h, x.grad.numpy().copy() if gradient else None

        return lambda: run().item(), results

    return Variant(name, 1, prepare)


def variants(threads: int) -> dict[str, Variant]:
    listed = [
        tensorflow_variant("fused", lambda x: lbe_ops.batch_entropy(x, native=True)),
        fused_xla_variant(),
        kernel_variant(threads),
        tensorflow_variant(
            "pure graph", lambda x: lbe_ops.batch_entropy(x, native=False)
        ),
        tensorflow_variant(
            "pure XLA", lambda x: lbe_ops.batch_entropy(x, native=False), xla=True
        ),
        tensorflow_variant("port formula", formulas.tensorflow_port()),
        torch_variant("torch eager", compiled=False, threads=threads),
        torch_variant("torch compile", compiled=True, threads=threads),
    ]
    return {variant.name: variant for variant in listed}


def difference(found: Results, expected: tuple[float, np.ndarray]) -> float:
    """The larger relative difference of entropy and gradient."""
    worst = abs(found[0] - expected[0]) / abs(expected[0])
    if found[1] is not None:
        dx = expected[1]
        # Half precision cannot hold dx at all where it is below its smallest number.
        smallest = float(np.finfo(np.float16).smallest_subnormal)
        slack = smallest if found[1].dtype == np.float16 else 0.0
        error = np.abs(found[1].astype(np.float64) - dx).max() - slack
        worst = max(worst, error / np.abs(dx).max())
    return float(worst)


def measure(
    shape: tuple[int, int],
    dtype: str,
    gradient: bool,
    chosen: list[Variant],
    streams: Streams,
    rounds: int,
) -> dict[str, object]:
    """Checks, then times the variants on one shape; a row of the results."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32).astype(tf.as_dtype(dtype).as_numpy_dtype)
    expected = {
        ddof: (oracle.batch_entropy(x, ddof), oracle.batch_entropy_grad(x, ddof))
        for ddof in {variant.ddof for variant in chosen}
    }
    calls: dict[str, Call] = {}
    skipped: dict[str, str] = {}
    differences: dict[str, float] = {}
    for variant in chosen:
        try:
            calls[variant.name], results = variant.prepare(x, gradient)
            worst = difference(results(), expected[variant.ddof])
        except UnavailableError as error:
            calls.pop(variant.name, None)
            skipped[variant.name] = str(error)
            continue
        differences[variant.name] = worst
        if not worst <= TOLERANCES[dtype]:
            del calls[variant.name]
            skipped[variant.name] = f"differs from the oracle by {worst:.1e}"
    if "fused" not in calls:
        sys.exit(f"error: the fused op, {shape} {dtype}: {skipped['fused']}")
    plain = streams.calls(x.nbytes)
    moved = {"read": plain["read"], "copy": plain["copy"]}
    calls |= {name: call for name, (call, _) in moved.items()}
    seconds = round_robin(calls, rounds)

    def quantiles(values: np.ndarray) -> dict[str, float]:
        low, median, high = np.quantile(values, (0.1, 0.5, 0.9))
        return {"median": median, "q10": low, "q90": high}

    fused = seconds["fused"]
    timed = [name for name in calls if name not in moved]
    return {
        "shape": list(shape),
        "dtype": dtype,
        "pass": PASSES[gradient],
        "bytes": x.nbytes,
        # x once; for the gradient, x again and dx.
        "bytes_to_move": x.nbytes * (3 if gradient else 1),
        "seconds": {name: quantiles(seconds[name]) for name in timed},
        "times_fused": {name: quantiles(seconds[name] / fused) for name in timed},
        "difference_from_oracle": differences,
        "skipped": skipped,
        "same_size_GB_per_s": {
            name: size / float(np.median(seconds[name])) / 1e9
            for name, (_, size) in moved.items()
        },
    }


def empty_call(rounds: int) -> float:
    """Seconds of a call of a `tf.function` that does nothing."""
    run = tf.function(lambda x: tf.zeros([]), autograph=False)
    x = tf.zeros([2, 2])
    return float(np.median(round_robin({"": lambda: run(x).numpy()}, rounds)[""]))


def memory_bandwidth(streams: Streams, rounds: int) -> dict[str, float]:
    """GB/s on arrays that fit no cache."""
    plain = streams.calls(STREAM_BYTES)
    seconds = round_robin({name: call for name, (call, _) in plain.items()}, rounds)
    return {
        name: size / float(np.median(seconds[name])) / 1e9
        for name, (_, size) in plain.items()
    }


def parse_arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="three shapes, no PyTorch, no targets"
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="NxU")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    parser.add_argument("--variants", nargs="+", choices=variants(1), metavar="NAME")
    parser.add_argument("--rounds", type=int, help="default: 30, with --quick 10")
    parser.add_argument("--threads", type=int, default=cores, help=f"default: {cores}")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("results/benchmark")
    )
    arguments = parser.parse_args()
    if arguments.rounds is None:
        arguments.rounds = 10 if arguments.quick else 30
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if arguments.shapes is None:
        names = QUICK_SHAPES if arguments.quick else SHAPES
        arguments.shapes = [parse_shape(name) for name in names]
    if arguments.variants is None:
        arguments.variants = [
            name
            for name in variants(1)
            if not (arguments.quick and name.startswith("torch"))
        ]
    if "fused" not in arguments.variants:
        arguments.variants.insert(0, "fused")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    tf.get_logger().setLevel("ERROR")  # it warns of a new tf.function for each shape
    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    chosen = [variants(arguments.threads)[name] for name in arguments.variants]
    streams = Streams(arguments.threads)
    results: dict[str, object] = {
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "machine": describe(),
        "versions": info.collect(),
        "empty_call_seconds": empty_call(arguments.rounds),
        "memory_GB_per_s": memory_bandwidth(streams, arguments.rounds),
        "rows": [],
    }
    for shape in arguments.shapes:
        for gradient in (False, True):
            row = measure(
                shape, arguments.dtype, gradient, chosen, streams, arguments.rounds
            )
            results["rows"].append(row)
            report.print_progress(row)
            report.write(results, arguments.output)
    # The targets are those of the whole benchmark, on a machine that does nothing else.
    judged = [] if arguments.quick else report.targets(results)
    report.finish(results, arguments.output, report.cpu_notes(results), judged)


if __name__ == "__main__":
    main()
