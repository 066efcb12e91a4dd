# SPDX-License-Identifier: Apache-2.0
"""`lbe-ops map`: which deep plain nets train, with and without LBE.

Runs the trials of a block (see `BLOCKS`), appends a line per trial to a CSV file, and
draws the map. A block that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import errno
import io
import itertools
import math
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lbe_ops.experiments import ending, lock
from lbe_ops.experiments.errors import ExperimentError, require_installed
from lbe_ops.experiments.results import replacing
from lbe_ops.experiments.trial import ARMS, Trial

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

DESCRIPTION = """\
Trains many small nets that differ in activation, initializer, depth, learning rate and
seed, each with and without LBE from the same weights and on the same batches, and maps
which of them train. Every process trains on one core. A line per trial goes to
DIR/BLOCK.csv, tables and pictures beside it. The same command continues after an
interruption.
"""

INITIALIZERS = {
    "relu": (
        "glorot_uniform",
        "he_normal",
        "critical_orthogonal",
        "lsuv",
        "looks_linear",
    ),
    **dict.fromkeys(
        ("gelu", "tanh", "sigmoid", "linear"),
        ("glorot_uniform", "he_normal", "critical_orthogonal", "lsuv"),
    ),
}
RATES = (1e-4, 3e-4, 1e-3)


def grid(**axes: Any) -> list[Trial]:
    """Every combination of the values; a single value need not be in a sequence."""
    values = [
        (axis,) if isinstance(axis, str | int | float) else tuple(axis)
        for axis in axes.values()
    ]
    return [
        Trial(**dict(zip(axes, each, strict=True)))
        for each in itertools.product(*values)
    ]


def _of(initializers: Iterable[tuple[str, Any]], **axes: Any) -> list[Trial]:
    """The combinations for every activation with its initializers."""
    return [
        trial
        for activation, names in initializers
        for trial in grid(activation=activation, initializer=names, **axes)
    ]


def _scales(**axes: Any) -> list[Trial]:
    return grid(
        activation="relu",
        initializer="he_normal",
        gain=(0.5, 0.71, 0.85, 1.0, 1.15, 1.4),
        **axes,
    )


def _mirrored(*activations: str, **axes: Any) -> list[Trial]:
    """From `looks_linear`; of sigmoid, a little above the gain that keeps the scale."""
    return [
        trial
        for activation in activations
        for trial in grid(
            activation=activation,
            initializer="looks_linear",
            gain=1.1 if activation == "sigmoid" else 1.0,
            **axes,
        )
    ]


ANCHORS = (("relu", "glorot_uniform"), ("relu", "he_normal"), ("gelu", "he_normal"))


# Those of `m1` that keep the scale, and GELU's from Keras.
DEEP = (
    ("relu", ("looks_linear", "lsuv")),
    ("gelu", ("he_normal", "lsuv")),
    ("tanh", "critical_orthogonal"),
    ("sigmoid", "lsuv"),
)

BOTH = ("none", "lbe")
FASTER: dict[str, Any] = {"learning_rate": (3e-4, 1e-3), "arm": BOTH}
CONV: dict[str, Any] = {
    "model": "conv",
    "width": 16,
    "learning_rate": 1e-3,
    "steps": 600,
}
VERY_DEEP: dict[str, Any] = {
    "depth": 500,
    "learning_rate": (1e-4, 3e-4),
    "arm": BOTH,
    "seed": (1, 2, 3),
}
BLOCKS: dict[str, Callable[[], list[Trial]]] = {
    # Mechanics alone, for tests.
    "smoke": lambda: grid(
        activation=("relu", "gelu"),
        initializer=("glorot_uniform", "lsuv"),
        depth=(2, 6),
        width=16,
        learning_rate=1e-3,
        arm=BOTH,
        seed=1,
        steps=60,
    ),
    # What shows without any training.
    "m0": lambda: _of(
        INITIALIZERS.items(),
        depth=(10, 50, 500),
        learning_rate=1e-3,
        arm="none",
        seed=(1, 2, 3),
        steps=0,
    ),
    # Exploration, with a seed that no other block has.
    "m1_lite": lambda: _of(
        INITIALIZERS.items(), depth=(20, 50), learning_rate=1e-3, arm=BOTH, seed=100
    ),
    # Nets that everybody can train, to compare with.
    "shallow": lambda: _of(
        INITIALIZERS.items(), depth=3, learning_rate=RATES, arm=BOTH, seed=(1, 2, 3)
    ),
    "m1": lambda: _of(
        INITIALIZERS.items(),
        depth=(10, 20, 50, 100),
        learning_rate=(3e-4, 1e-3),
        arm=BOTH,
        seed=(1, 2, 3),
    ),
    # Five more seeds where something is claimed.
    "m1_claims": lambda: _of(
        [(activation, INITIALIZERS[activation]) for activation in ("relu", "gelu")],
        depth=(10, 20, 50, 100),
        learning_rate=(3e-4, 1e-3),
        arm=BOTH,
        seed=range(4, 9),
    ),
    # Deeper, from what may train there.
    "m1_200": lambda: _of(
        DEEP, depth=200, learning_rate=(1e-4, 3e-4), arm=BOTH, seed=(1, 2, 3)
    ),
    # Deeper still, from what trains at 200.
    "m1_500": lambda: [
        *_mirrored("relu", "gelu", "sigmoid", **VERY_DEEP),
        *grid(activation="tanh", initializer="critical_orthogonal", **VERY_DEEP),
    ],
    "m2": lambda: _scales(
        depth=(30, 100), learning_rate=1e-3, arm=BOTH, seed=range(1, 9)
    ),
    "m3": lambda: _of(
        ANCHORS, depth=100, learning_rate=1e-3, arm=ARMS, seed=range(1, 9)
    ),
    # Whether what was best in m3 is so for other seeds, and for shallower nets.
    "m3_confirm": lambda: _of(
        (ANCHORS[0], ANCHORS[2]),
        depth=(50, 100),
        learning_rate=(3e-4, 1e-3),
        arm=("lbe", "lbe_one_sided", "lbe_std_hinge"),
        seed=range(9, 17),
    ),
    "m4": lambda: grid(
        activation="relu",
        initializer=("glorot_uniform", "he_normal", "looks_linear"),
        depth=100,
        learning_rate=[10 ** (half / 2) for half in range(-10, -3)],
        arm=BOTH,
        seed=(1, 2, 3),
    ),
    # Other nets: residual ones with and without normalization, convolutions.
    "m5": lambda: [
        *grid(
            model="residual",
            norm=("none", "batch"),
            activation=("relu", "gelu"),
            initializer="he_normal",
            depth=(20, 50, 100),
            learning_rate=(3e-4, 1e-3),
            arm=BOTH,
            seed=(1, 2, 3),
        ),
        *grid(
            activation=("relu", "gelu"),
            initializer=("glorot_uniform", "he_normal", "lsuv"),
            depth=(20, 50),
            arm=BOTH,
            seed=(1, 2, 3),
            **CONV,
        ),
    ],
    # Transformers with and without normalization: what pre-LN is for.
    "m7": lambda: grid(
        data="text",
        model="transformer",
        norm=("none", "layer"),
        activation="gelu",
        initializer="he_normal",
        depth=(2, 12),
        width=32,
        batch_size=64,
        learning_rate=(3e-4, 2e-3),
        arm=BOTH,
        seed=(1, 2, 3),
        steps=300,
    ),
    # Kernels that were made for ReLU, with other activations.
    "m8": lambda: [
        *_mirrored("gelu", "silu", "sigmoid", depth=50, seed=range(1, 9), **FASTER),
        *_mirrored("gelu", "silu", "sigmoid", depth=200, seed=(1, 2, 3), **FASTER),
        *_mirrored("gelu", depth=50, seed=(1, 2, 3), arm="none", **CONV),
    ],
    # Those of sigmoid that did not train in m8 and m1_500, at lower rates.
    "m8_sigmoid": lambda: [
        trial
        for depth, rate in ((200, 1e-4), (500, 3e-5))
        for trial in _mirrored(
            "sigmoid", depth=depth, learning_rate=rate, arm=BOTH, seed=(1, 2, 3)
        )
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run` to a parser."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "blocks", nargs="+", choices=BLOCKS, metavar="BLOCK", help=", ".join(BLOCKS)
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="results/map",
        help="folder of the results (default: %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="at once (default: one per core)",
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no trial after that"
    )
    parser.add_argument("--dry-run", action="store_true", help="only count the trials")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status as that of `lbe-ops train`."""

    def work() -> None:
        if arguments.processes < 1:
            raise ExperimentError(
                f"--processes must be at least 1. Received: {arguments.processes}"
            )
        require_installed("matplotlib", "scipy", "sklearn")
        until = time.monotonic() + 60 * arguments.minutes
        for block in arguments.blocks:
            path = pathlib.Path(arguments.output) / f"{block}.csv"
            # Others may run other blocks in the same folder.
            mine = lock.exclusive(path.with_name(f".lock-{block}"), path)
            with contextlib.nullcontext() if arguments.dry_run else mine:
                _run_block(block, path, arguments, until)

    return ending.exit_status(work, "the same command goes on from here")


def _run_block(
    block: str, path: pathlib.Path, arguments: argparse.Namespace, until: float
) -> None:
    trials = BLOCKS[block]()
    done = {trial for trial, _ in read(path)} if path.exists() else set()
    missing = [trial for trial in trials if trial not in done]
    print(f"{block}: {len(trials)} trials, {len(missing)} to run", flush=True)
    if arguments.dry_run:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with replacing(path) as temporary:
            temporary.write_text("".join(_whole_lines(path)))
    total, covered = _cost(missing), 0.0
    started = shown = time.monotonic()
    for number, (trial, outcome) in enumerate(
        _outcomes(chunks(missing, arguments.processes), arguments.processes, until), 1
    ):
        _append(path, trial, outcome)
        covered += trial.cost()
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            left = (shown - started) * (total / covered - 1)
            print(
                f"{block}: {number}/{len(missing)}, {left / 60:.0f} min left",
                flush=True,
            )
    print(f"{block}: {(time.monotonic() - started) / 60:.1f} min", flush=True)
    _report(block, path)


# The axes of a block's table, and of its picture (vertical, horizontal, each panel), if
# it is of LBE on and off.
CELL = ("activation", "initializer", "depth")
REPORTS: dict[str, tuple[tuple[str, ...], tuple[str, str, str] | None]] = {
    "m0": (CELL, None),
    "m1_200": (CELL, None),
    "m1_500": (CELL, None),
    "m2": (("depth", "gain"), ("depth", "gain", "activation")),
    "m3": (CELL, None),
    "m3_confirm": (CELL, None),
    "m4": ((*CELL, "learning_rate"), ("initializer", "learning_rate", "activation")),
    "m5": (("model", "norm", *CELL), None),
    "m7": (("model", "norm", *CELL), None),
    "m8": (("model", *CELL), None),
    "m8_sigmoid": (CELL, None),
}


def _report(block: str, path: pathlib.Path) -> None:
    from lbe_ops.experiments import map_report

    rows = read(path) if path.exists() else []
    if not rows:
        print(f"{block}: no trial was run, nothing is drawn")
        return
    axes, picture = REPORTS.get(block, (CELL, ("initializer", "depth", "activation")))
    trained = any(trial.steps for trial, _ in rows)
    table = map_report.table if trained else map_report.measurements
    with replacing(path.with_suffix(".md")) as temporary:
        temporary.write_text(table(rows, axes))
    if picture is not None:
        map_report.draw(rows, path.with_suffix(".png"), *picture)


def chunks(trials: Sequence[Trial], processes: int) -> list[list[Trial]]:
    """What one process runs with one graph; the longest first."""
    by_graph: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        by_graph.setdefault(trial.graph(), []).append(trial)
    # Enough to keep all processes busy to the end, and each for longer than it takes to
    # start and to build the net.
    longest = max(60.0, _cost(trials) / (4 * processes))
    chunks = []
    for same in by_graph.values():
        pieces = min(len(same), max(1, round(_cost(same) / longest)))
        size = -(-len(same) // pieces)
        chunks += [same[at : at + size] for at in range(0, len(same), size)]
    return sorted(chunks, key=_cost, reverse=True)


def _cost(trials: Sequence[Trial]) -> float:
    return sum(trial.cost() for trial in trials)


def _outcomes(
    chunks: list[list[Trial]], processes: int, until: float
) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """What the trials give, as they end; a new process for every chunk."""
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, Any] = {}
    waiting = list(reversed(chunks))
    try:
        while running or (waiting and time.monotonic() < until):
            while waiting and len(running) < processes and time.monotonic() < until:
                receiver, sender = context.Pipe(duplex=False)
                left = until - time.monotonic()
                process = context.Process(
                    target=_work, args=(sender, waiting.pop(), left), daemon=True
                )
                process.start()
                sender.close()
                running[receiver] = process
            for receiver in multiprocessing.connection.wait(list(running)):
                try:
                    trial, outcome = receiver.recv()
                except EOFError:
                    process = running.pop(receiver)
                    process.join()
                    if process.exitcode:
                        # Killed: by the system, where memory is short.
                        raise ExperimentError(
                            "a process of the map has failed (see above). "
                            f"Received: exit code {process.exitcode}"
                        ) from None
                    continue
                if isinstance(outcome, str):
                    raise ExperimentError(f"{trial}: {outcome}")
                yield trial, outcome
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _work(sender: Connection, trials: list[Trial], seconds: float) -> None:
    """What a process does: sends `(trial, outcome)` for one trial after the other.

    The outcome is a text, and the last, where the system fails.
    """
    until = time.monotonic() + seconds
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's, which ends this
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    from lbe_ops.experiments.trainer import Trainer

    trial = trials[0]
    try:
        trainer = Trainer(trial)
        for trial in trials:
            if time.monotonic() > until:
                break
            sender.send((trial, trainer.run(trial)))
    except ending.FAILURES as error:
        with contextlib.suppress(OSError):  # the parent is gone
            sender.send((trial, ending.reason(error)))


def read(path: pathlib.Path) -> list[tuple[Trial, dict[str, float]]]:
    """The trials of a CSV file with their outcomes.

    Raises:
        ExperimentError: the file cannot be read, or has other columns.
    """
    fields = {field.name: field.type for field in dataclasses.fields(Trial)}
    convert = {"str": str, "int": int, "float": float}
    rows = []
    try:
        for row in csv.DictReader(_whole_lines(path)):
            trial = {n: convert[kind](row.pop(n)) for n, kind in fields.items()}
            rows.append((Trial(**trial), {k: float(v) for k, v in row.items()}))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ExperimentError(f"{path} is not a file of this map: {error}") from error
    return rows


def _whole_lines(path: pathlib.Path) -> list[str]:
    """The lines of a file but for one that was not written to its end."""
    lines = path.read_text().splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _append(path: pathlib.Path, trial: Trial, outcome: dict[str, float]) -> None:
    """Adds a line to a file that ends with a whole one, or leaves it as it was.

    Raises:
        OSError: the file cannot be written.
    """
    row = dataclasses.asdict(trial)
    row |= {name: f"{value:.6g}" for name, value in outcome.items()}
    text = io.StringIO()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        writer = csv.DictWriter(text, row, lineterminator="\n")
        if size == 0:
            writer.writeheader()
        writer.writerow(row)
        line = text.getvalue().encode()
        try:
            written = file.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        if written != len(line):  # as much as the disk had room for
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
