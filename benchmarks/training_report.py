# SPDX-License-Identifier: Apache-2.0
"""Table, plot and targets of bench_training.py."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import report
import scipy.stats
from report import Judged, plt
from training_worker import VARIANTS, Net

Row = Mapping[str, Any]
BASE, _, FUSED = VARIANTS
# At most that many times what the net without LBE takes, on a CPU.
STEP_TARGETS = {
    ("graph", 500, 128): 1.00,
    ("graph", 500, 32): 1.00,
    ("graph", 100, 1024): 1.00,
    ("fit", 500, 128): 1.02,
    ("fit", 500, 32): 1.05,
    ("fit", 100, 1024): 1.02,
}
XLA_STEP_TARGET = 1.10
FIRST_STEP_TARGETS = {"graph": 1.05, "fit": 1.10}  # of 500 layers
MEMORY_TARGETS = {"graph": 1.02, "fit": 1.05}


def step_ratio(row: Row, base: Row) -> tuple[float, float, float]:
    """Median over the rounds of the ratio of two step times, and its 95 % interval.

    The interval is a percentile bootstrap over the rounds.
    """
    ratios = np.divide(row["step_seconds"], base["step_seconds"])
    if len(ratios) < 2 or np.ptp(ratios) == 0:
        return (float(np.median(ratios)),) * 3
    interval = scipy.stats.bootstrap(
        (ratios,), np.median, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(np.median(ratios)), float(interval.low), float(interval.high)


def first_step_ratio(row: Row, base: Row) -> float:
    """Ratio of the medians over all starts."""
    return float(
        np.median(row["first_step_seconds"]) / np.median(base["first_step_seconds"])
    )


def pairs(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Every row that was timed, and the one without LBE that it compares to."""
    base: Row = {}
    for row in rows:
        if row["variant"] == BASE:
            base = row
        if "skipped" not in row:
            yield row, base


def targets(rows: Sequence[Row]) -> list[Judged]:
    """What LBE is to cost at most, what it did, and whether that is little enough."""
    judged = []

    def judge(what: str, row: Row, ratio: float, most: float | None) -> None:
        if most is not None:
            name = f"{Net(**row['net']).name}, {row['loop']}: {what}"
            target = f"{name} at most {most:.2f} times that without LBE"
            judged.append((target, f"{ratio:.3f}", ratio <= most))

    for row, base in pairs(rows):
        if row["variant"] != FUSED:
            continue
        net, loop = row["net"], row["loop"]
        at_most = STEP_TARGETS.get((loop, net["depth"], net["width"]))
        if loop == "XLA":
            at_most = XLA_STEP_TARGET
        judge("step", row, step_ratio(row, base)[0], at_most)
        if net["depth"] == 500:
            first = first_step_ratio(row, base)
            judge("first step", row, first, FIRST_STEP_TARGETS.get(loop))
            memory = row["peak_memory_bytes"] / base["peak_memory_bytes"]
            judge("peak memory", row, memory, MEMORY_TARGETS.get(loop))
    return judged


def print_progress(rows: Sequence[Row]) -> None:
    """A line for every variant, as soon as a net is done in a loop."""
    for cells in _cells(rows):
        print("  ".join(cells), flush=True)


def finish(results: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Prints and writes the table, notes, targets and plot."""
    rows, machine = results["rows"], results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    skipped = [
        f"Not timed, {Net(**row['net']).name}, {row['loop']}, {row['variant']}: "
        f"{row['skipped']}."
        for row in rows
        if "skipped" in row
    ]
    notes = [
        f"{machine['cpu']}, {machine['cores']} cores, {results['threads']} threads; "
        f"{versions}. Command: {' '.join(results['command'])}",
        f"Step: milliseconds, median of {results['rounds']} interleaved rounds. In "
        "brackets, times no LBE in the same loop: for the step the median over the "
        "rounds and its 95 % bootstrap interval. First step: with the making and "
        "tracing of the model, without imports. Nodes: of the step's graph, with all "
        "functions that it calls. Memory: the most that the process had, its libraries "
        "included.",
        *skipped,
    ]
    report.conclude(
        folder,
        "Training with LBE, compared to the same net without",
        [["net", "loop", "variant", "step", "first step", "nodes", "memory"]]
        + _cells(rows),
        3,
        notes,
        targets(rows),
        lambda path: _plot(rows, path),
    )


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    cells = []
    for row, base in pairs(rows):
        step = f"{1e3 * np.median(row['step_seconds']):.1f}"
        first = f"{np.median(row['first_step_seconds']):.1f} s"
        memory = f"{row['peak_memory_bytes'] / 1e9:.2f} GB"
        if row is not base:
            ratio, low, high = step_ratio(row, base)
            step += f" ({ratio:.2f}x, {low:.2f} to {high:.2f})"
            first += f" ({first_step_ratio(row, base):.2f}x)"
            relative = row["peak_memory_bytes"] / base["peak_memory_bytes"]
            memory += f" ({relative:.2f}x)"
        name, nodes = Net(**row["net"]).name, f"{row.get('nodes', 0) or '-'}"
        cells.append([name, row["loop"], row["variant"], step, first, nodes, memory])
    return cells


def _plot(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Ratios of the step times, a panel for every loop."""
    loops = list(dict.fromkeys(row["loop"] for row in rows))
    figure, axes = plt.subplots(
        1, len(loops), figsize=(4 * len(loops), 4), sharey=True, squeeze=False
    )
    for axis, loop in zip(axes[0], loops, strict=True):
        shown = [pair for pair in pairs(rows) if pair[0]["loop"] == loop]
        nets = list(dict.fromkeys(Net(**row["net"]).name for row, _ in shown))
        for offset, variant in zip((-0.2, 0.2), VARIANTS[1:], strict=True):
            for row, base in shown:
                if row["variant"] != variant:
                    continue
                ratio, low, high = step_ratio(row, base)
                axis.bar(
                    nets.index(Net(**row["net"]).name) + offset,
                    ratio,
                    0.4,
                    yerr=[[ratio - low], [high - ratio]],
                    color=f"C{VARIANTS.index(variant)}",
                    label=variant,
                )
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xticks(range(len(nets)), nets, rotation=30, ha="right")
        axis.set_title(loop)
        axis.grid(alpha=0.3, axis="y")
        handles, labels = axis.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axis.legend(unique.values(), unique.keys(), loc="lower right")
    axes[0][0].set_ylabel("step time / that without LBE")
    figure.tight_layout()
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
