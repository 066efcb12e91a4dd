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
import os
import pathlib
import sys

import report
import training_report
from machine import describe
from training_worker import LOOPS, VARIANTS, Net, work
from workers import Worker, WorkerError, measure

NETS = {
    "500x32": Net("dense", 500, 32, 128),
    "500x128": Net("dense", 500, 128, 512),
    "100x1024": Net("dense", 100, 1024, 512),
    "cnn": Net("conv", 100, 8, 64),
    # Without a fused epilogue.
    "50x64-gelu": Net("dense", 50, 64, 128, "gelu"),
    "100x1024-gelu": Net("dense", 100, 1024, 512, "gelu"),
    "quick": Net("dense", 20, 32, 128),
}


def measure_net(
    net: Net, loop: str, variants: list[str], arguments: argparse.Namespace
) -> list[dict[str, object]]:
    """The rows of one net in one loop; the first variant is what others compare to.

    Raises:
        WorkerError: the net without LBE cannot be trained.
    """
    rows = [
        {"net": dataclasses.asdict(net), "loop": loop, "variant": variant}
        for variant in variants
    ]
    measure(
        rows,
        lambda variant: Worker(work, [(net, loop, variant, arguments.threads)]),
        arguments.rounds,
        arguments.starts,
    )
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
        help="processes of each variant, which are started one at a time and take "
        "turns (default: 1)",
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


def versions() -> dict[str, str]:
    """Of what was measured, where it is installed."""
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
        "versions": versions(),
        "rows": [],
    }
    for name in arguments.nets:
        for loop in arguments.loops:
            # The original's formula is PyTorch's only way.
            variants = list(VARIANTS[:2] if loop == "PyTorch" else VARIANTS)
            try:
                rows = measure_net(NETS[name], loop, variants, arguments)
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
