# SPDX-License-Identifier: Apache-2.0
"""Times training on several replicas, with LBE and without, on this machine's CPU.

Variants: no LBE, LBE of each replica's own samples (`synchronized=False`), LBE of the
whole batch, and for comparison Keras' `BatchNormalization(synchronized=True)` behind
every layer of the same net without LBE. Layouts are processes x replicas of each: one
process is a `MirroredStrategy` of logical devices of the CPU, more are a
`MultiWorkerMirroredStrategy` that talks over the loopback interface.

All of them train by Keras' `fit` with Adam, on a distributed dataset that repeats one
batch of noise. The variants of a net in a layout are in processes of their own and take
turns, step by step in changing order, so that ratios come from the same seconds; while
one of them starts, the others wait. Collectives, and the bytes that they take, are
read in the graph of the step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pathlib
import sys

import distributed_report
import report
from bench_training import NETS, versions
from distributed_worker import VARIANTS, Layout, work
from machine import describe
from training_worker import Net
from workers import Worker, WorkerError, measure

NETS = {
    "500x128": NETS["500x128"],
    "500x32": NETS["500x32"],
    "100x128": Net("dense", 100, 128, 512),
    "quick": Net("dense", 4, 16, 32),
}
LAYOUTS = {
    f"{each.processes}x{each.replicas}": each
    for each in (Layout(1, 1), Layout(1, 2), Layout(1, 4), Layout(2, 1))
}


def measure_net(
    net: Net, layout: Layout, arguments: argparse.Namespace
) -> list[dict[str, object]]:
    """The rows of one net in one layout.

    Raises:
        WorkerError: the net without LBE cannot be trained.
    """
    rows = [
        {
            "net": dataclasses.asdict(net),
            "layout": dataclasses.asdict(layout),
            "variant": variant,
        }
        for variant in arguments.variants
    ]

    def start(variant: str) -> Worker:
        common = net, layout, variant, arguments.threads
        clusters = layout.clusters()
        return Worker(work, [(*common, each) for each in clusters], arguments.limit)

    measure(rows, start, arguments.rounds, arguments.starts)
    return rows


def parse_arguments() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = functools.partial(parser.add_argument, metavar="NAME", nargs="+")
    named = [name for name in NETS if name != "quick"]
    add("--nets", choices=NETS, default=named, help=f"of {', '.join(NETS)}")
    add(
        "--layouts",
        choices=LAYOUTS,
        default=list(LAYOUTS),
        help=f"processes x replicas of each, of {', '.join(LAYOUTS)} (default: all)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="the first is what others compare to",
    )
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
    parser.add_argument(
        "--limit",
        type=float,
        default=600.0,
        help="seconds that a start or a turn may take; a variant that takes longer is "
        "left out with that reason (default: 600)",
    )
    parser.add_argument("--threads", type=int, default=cores, help=f"default: {cores}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small net on two replicas: to see that it runs, not to measure",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("results/distributed")
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.nets, arguments.rounds, arguments.starts = ["quick"], 3, 1
        if arguments.layouts == list(LAYOUTS):
            arguments.layouts = ["1x2"]
    if min(arguments.rounds, arguments.threads, arguments.starts) < 1:
        parser.error("--rounds, --starts and --threads must be at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    # For the processes to come.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    native = os.environ.setdefault("LBE_OPS_NATIVE", "1")
    results: dict[str, object] = {
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "native": native,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "starts": arguments.starts,
        "machine": describe(),
        "versions": versions(),
        "rows": [],
    }
    for name in arguments.nets:
        for layout in map(LAYOUTS.get, arguments.layouts):
            try:
                rows = measure_net(NETS[name], layout, arguments)
            except WorkerError as error:
                what = f"{NETS[name].name}, {layout.name}"
                print(f"{what}: not timed: {error}", flush=True)
                continue
            results["rows"] += rows
            distributed_report.print_progress(rows)
            report.write(results, arguments.output)
    if not results["rows"]:
        sys.exit("error: nothing was timed")
    distributed_report.finish(results, arguments.output)


if __name__ == "__main__":
    main()
