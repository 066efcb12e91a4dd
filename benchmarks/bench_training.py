# SPDX-License-Identifier: Apache-2.0
"""Times training with LBE against training the same net without it.

Variants: no LBE, LBE in plain TensorFlow as in the TensorFlow port (a scalar alpha and
a loss for each layer), and LBE by this package. Loops: a `tf.function` with a tape and
SGD (graph), the same compiled by XLA, Keras' `fit` with Adam, and where torch is
installed the loop of the PyTorch original.

Every net in every loop and variant trains in a process of its own, on one batch of
noise. The variants take turns, step by step in changing order, so that a disturbance
hits all of them: step times and their ratios come from the same seconds of one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import math
import multiprocessing
import os
import pathlib
import sys
from multiprocessing.connection import Connection

import numpy as np
import report
import training_report
from machine import describe
from training_worker import LOOPS, VARIANTS, Net, work

NETS = {
    "500x32": Net("dense", 500, 32, 128),
    "500x128": Net("dense", 500, 128, 512),
    "100x1024": Net("dense", 100, 1024, 512),
    "cnn": Net("conv", 100, 8, 64),
    "quick": Net("dense", 20, 32, 128),
}
TURN_SECONDS = 0.1  # at least, and after a step that does not count


class WorkerError(Exception):
    """A process that came to its end early; the message says why."""


class Worker:
    """A process that trains one variant, and how to let it go on."""

    def __init__(self, net: Net, loop: str, variant: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=work, args=(other, net, loop, variant, threads), daemon=True
        )
        self._process.start()
        other.close()
        self.first_step_seconds = self._receive()[0]
        self._steps = 2  # of a turn

    def turn(self) -> float:
        """Lets it train for one turn; the mean seconds of a step."""
        self._connection.send(1 + self._steps)
        seconds = float(np.mean(self._receive()[1:]))
        self._steps = max(2, math.ceil(TURN_SECONDS / seconds))
        return seconds

    def finish(self) -> dict[str, object]:
        """Ends it; graph nodes, peak memory and the last loss."""
        self._connection.send(0)
        figures = _received(self._connection)
        self.stop()
        if "error" in figures:
            raise WorkerError(figures["error"])
        if not np.isfinite(figures["loss"]):
            raise WorkerError(f"its loss is {figures['loss']}")
        return figures

    def stop(self) -> None:
        """Ends it whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self) -> list[float]:
        seconds = _received(self._connection)
        if isinstance(seconds, dict):
            self.stop()
            raise WorkerError(str(seconds["error"]))
        return seconds


def _received(connection: Connection) -> object:
    try:
        return connection.recv()
    except EOFError:
        raise WorkerError("the process died, perhaps out of memory") from None


def measure(
    net: Net, loop: str, variants: list[str], threads: int, rounds: int, starts: int
) -> list[dict[str, object]]:
    """The rows of one net in one loop; the first variant is what others compare to.

    Raises:
        WorkerError: the net without LBE cannot be trained.
    """
    workers: dict[str, Worker] = {}
    first: dict[str, list[float]] = {variant: [] for variant in variants}
    rows = [
        {"net": dataclasses.asdict(net), "loop": loop, "variant": variant}
        for variant in variants
    ]

    def start(row: dict[str, object]) -> Worker | None:
        if "skipped" in row:
            return None
        try:
            return Worker(net, loop, row["variant"], threads)
        except WorkerError as error:
            if row is rows[0]:
                raise
            row["skipped"] = str(error)
            return None

    order = np.random.default_rng(0)
    # With nothing else around: whoever comes last would find the machine in another
    # state than whoever comes first.
    for _ in range(starts):
        for index in order.permutation(len(rows)):
            worker = start(rows[index])
            if worker is not None:
                first[rows[index]["variant"]].append(worker.first_step_seconds)
                worker.stop()
    try:
        for row in rows:
            worker = start(row)
            if worker is not None:
                workers[row["variant"]] = worker
        seconds = {variant: np.empty(rounds) for variant in workers}
        for worker in workers.values():
            worker.turn()  # to find out how long a step takes
        for index in range(rounds):
            for variant in order.permutation(list(workers)):
                seconds[variant][index] = workers[variant].turn()
        for row in rows:
            if "skipped" in row:
                continue
            variant = row["variant"]
            try:
                row |= workers[variant].finish()
            except WorkerError as error:
                if variant == variants[0]:
                    raise
                row["skipped"] = str(error)
                continue
            row["first_step_seconds"] = first[variant]
            row["step_seconds"] = seconds[variant].tolist()
    finally:
        for worker in workers.values():
            worker.stop()
    return rows


def parse_arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nets",
        nargs="+",
        choices=NETS,
        metavar="NAME",
        help=f"of {', '.join(NETS)} (default: all but quick)",
    )
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument(
        "--rounds", type=int, default=20, help="turns of each variant (default: 20)"
    )
    parser.add_argument(
        "--starts",
        type=int,
        default=1,
        help="processes of each variant, one at a time, for the time to the first "
        "step; another one takes turns (default: 1)",
    )
    parser.add_argument("--threads", type=int, default=cores, help=f"default: {cores}")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("results/training")
    )
    arguments = parser.parse_args()
    if arguments.nets is None:
        arguments.nets = [name for name in NETS if name != "quick"]
    if min(arguments.rounds, arguments.starts, arguments.threads) < 1:
        parser.error("--rounds, --starts and --threads must be at least 1")
    return arguments


def _versions() -> dict[str, str]:
    found = {}
    for name in ("lbe_ops", "tensorflow", "tensorflow-cpu", "keras", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    arguments = parse_arguments()
    # For the processes to come.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["LBE_OPS_NATIVE"] = "1"
    results: dict[str, object] = {
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "machine": describe(),
        "versions": _versions(),
        "rows": [],
    }
    for name in arguments.nets:
        for loop in arguments.loops:
            # The original's formula is PyTorch's only way.
            variants = list(VARIANTS[:2] if loop == "PyTorch" else VARIANTS)
            try:
                rows = measure(
                    NETS[name],
                    loop,
                    variants,
                    arguments.threads,
                    arguments.rounds,
                    arguments.starts,
                )
            except WorkerError as error:
                print(f"{NETS[name].name}, {loop}: not timed: {error}", flush=True)
                continue
            results["rows"] += rows
            training_report.print_progress(rows)
            report.write(results, arguments.output)
    if not results["rows"]:
        sys.exit("error: nothing was timed")
    training_report.finish(results, arguments.output)


if __name__ == "__main__":
    main()
