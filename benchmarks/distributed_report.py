# SPDX-License-Identifier: Apache-2.0
"""Table, plot and targets of bench_distributed.py."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import report
from distributed_worker import VARIANTS, Layout
from report import Judged, plt
from training_report import first_step_ratio, step_ratio
from training_worker import Net

Row = Mapping[str, Any]
PER_REPLICA, SYNCHRONISED = VARIANTS[1:3]
# At most that many times LBE per replica, on 2 replicas in one process.
TARGET_NET, TARGET_LAYOUT = (500, 128), Layout(1, 2)
STEP_TARGET = FIRST_STEP_TARGET = 1.05
HEADER = [
    *("net", "processes x replicas", "variant"),
    *("step", "times per replica", "first step", "times per replica"),
    *("collectives", "of logs", "KB of statistics", "KB of gradients", "nodes"),
]


def groups(rows: Sequence[Row]) -> Iterator[dict[str, Row]]:
    """The rows of each net in each layout that were timed, by their variant."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "skipped" not in row:
            key = f"{row['net']} {row['layout']}"
            found.setdefault(key, {})[row["variant"]] = row
    yield from found.values()


def counts(row: Row) -> tuple[int, int]:
    """Collectives of a replica in a step, and how many of them Keras' logs are."""
    logs = len(row["collectives"]["logs"])
    return sum(map(len, row["collectives"].values())) - logs, logs


def targets(rows: Sequence[Row]) -> list[Judged]:
    """What synchronisation is to cost at most, and what it did."""
    judged = []
    for group in groups(rows):
        row, base = group.get(SYNCHRONISED), group.get(PER_REPLICA)
        if row is None:
            continue
        net, layout = Net(**row["net"]), Layout(**row["layout"])
        where = f"{net.name}, {layout.name}"
        if layout.total > 1:
            number = counts(row)[0]
            enough = number == 2
            judged.append((f"{where}: 2 collectives", str(number), enough))
        if base is None or (net.depth, net.width) != TARGET_NET:
            continue
        if layout != TARGET_LAYOUT:
            continue
        for what, ratio, most in (
            ("step", step_ratio(row, base)[0], STEP_TARGET),
            ("first step", first_step_ratio(row, base), FIRST_STEP_TARGET),
        ):
            target = f"{where}: {what} at most {most:.2f} times LBE per replica"
            judged.append((target, f"{ratio:.3f}", ratio <= most))
    return judged


def print_progress(rows: Sequence[Row]) -> None:
    """A line for every variant, as soon as a net is done in a layout."""
    for cells in _cells(rows):
        print("  ".join(cells), flush=True)


def finish(results: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Prints and writes the table, notes, targets and plot."""
    rows, machine = results["rows"], results["machine"]
    named = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    ops = "plain TensorFlow" if results["native"] == "0" else "native ops"
    processes = [
        f"{row['variant']} "
        + ", ".join(f"{1e3 * x:.1f}" for x in row["process_seconds"])
        for row in rows
        if len(row.get("process_seconds", ())) > 1
    ]
    notes = [
        f"{machine['cpu']}, {machine['cores']} cores, {results['threads']} threads "
        f"shared by the processes; {named}; LBE by {ops}. All replicas are on this one "
        f"CPU: no GPU, no network. Command: {' '.join(results['command'])}",
        f"Step of `fit` with Adam: milliseconds, median of {results['rounds']} "
        f"interleaved rounds of {results['starts']} processes; in brackets times the "
        "net without LBE, and then times LBE per replica, each the median over the "
        "rounds with its 95 % bootstrap interval. First step: median of these "
        "processes, of which one starts at a time, with the making and tracing of the "
        "model, without imports.",
        *([f"Medians of each process: {'; '.join(processes)}."] if processes else []),
        "Collectives: of a replica in a step. KB: what they take from a replica, in "
        "thousands of bytes; in a ring of R each replica sends, and receives, "
        "2 (R - 1) / R times that. Statistics are those of LBE or of batch "
        "normalisation, forward and backward. Logs: Keras' mean of what a step "
        "returns, where there are several processes. Nodes: of the step's graph, for "
        "all replicas of a process.",
        *(
            f"Not timed, {Net(**row['net']).name}, {Layout(**row['layout']).name}, "
            f"{row['variant']}: {row['skipped']}."
            for row in rows
            if "skipped" in row
        ),
    ]
    report.conclude(
        folder,
        "Training on several replicas",
        [HEADER, *_cells(rows)],
        3,
        notes,
        targets(rows),
        lambda path: _plot(rows, path),
    )


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    cells = []
    for group in groups(rows):
        without = next(iter(group.values()))
        own = group.get(PER_REPLICA)
        for row in group.values():
            step = f"{1e3 * np.median(row['step_seconds']):.1f}"
            first = f"{np.median(row['first_step_seconds']):.1f} s"
            if row is not without:
                step += f" ({_interval(row, without)})"
                first += f" ({first_step_ratio(row, without):.2f}x)"
            relative = ["-", "-"]
            if own is not None and row is not own:
                relative = _interval(row, own), f"{first_step_ratio(row, own):.2f}x"
            number, logs = counts(row)
            bytes_of = row["collectives"]
            cells.append(
                [
                    Net(**row["net"]).name,
                    Layout(**row["layout"]).name,
                    row["variant"],
                    *(step, relative[0], first, relative[1]),
                    *(str(number), str(logs)),
                    f"{sum(bytes_of['statistics']) / 1e3:.1f}",
                    f"{sum(bytes_of['gradients']) / 1e3:.1f}",
                    str(row["nodes"]),
                ]
            )
    return cells


def _interval(row: Row, base: Row) -> str:
    ratio, low, high = step_ratio(row, base)
    return f"{ratio:.2f}x, {low:.2f} to {high:.2f}"


def _plot(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Step times and first steps, a bar for every variant of every net and layout."""
    found = list(groups(rows))
    figure, axes = plt.subplots(2, 1, figsize=(max(6, 1.5 * len(found)), 9))
    for axis, key, what in zip(
        axes,
        ("step_seconds", "first_step_seconds"),
        ("seconds of a step", "seconds to the end of the first step"),
        strict=True,
    ):
        for number, variant in enumerate(VARIANTS):
            places = [i for i, group in enumerate(found) if variant in group]
            heights = [np.median(found[i][variant][key]) for i in places]
            left = [place + 0.2 * number - 0.3 for place in places]
            axis.bar(left, heights, 0.2, label=variant, color=f"C{number}")
        names = []
        for group in found:
            row = next(iter(group.values()))
            names.append(f"{Net(**row['net']).name}\n{Layout(**row['layout']).name}")
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axis.set_yscale("log")
        axis.set_ylabel(what)
        axis.grid(alpha=0.3, axis="y")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
