# SPDX-License-Identifier: Apache-2.0
"""What a benchmark leaves behind: results.json, table.md and plot.png.

The table is printed as Markdown where nobody looks (the output is no terminal) and
without rich; without matplotlib, there is no plot.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# A GPU machine may have neither, and reach no package registry.
try:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
except ImportError:
    plt = None
try:
    from rich.console import Console
    from rich.table import Table
except ImportError:
    Console = Table = None

Results = Mapping[str, Any]
Row = Mapping[str, Any]
# What is to be reached, what was, and whether that is enough.
Judged = tuple[str, str, bool]


def fraction(row: Row, bandwidth: Mapping[str, float], name: str = "fused") -> float:
    """How close a variant comes to reading and copying at `bandwidth` (GB/s).

    What is read and has no counterpart that is written, x of a forward pass, is judged
    by reads, and all the rest by copies.
    """
    read = row.get("bytes_only_read", row["bytes"])
    copied = row["bytes_to_move"] - read
    ideal = (read / bandwidth["read"] + copied / bandwidth["copy"]) / 1e9
    return ideal / row["seconds"][name]["median"]


def gigabytes_per_second(row: Row) -> float:
    """Bytes that must move / time of the fused op."""
    return row["bytes_to_move"] / row["seconds"]["fused"]["median"] / 1e9


def targets(results: Results) -> list[Judged]:
    """What the op is to reach, what it did, and whether that is enough.

    Only those that the shapes, the dtype and the variants of a run allow to judge.
    """
    judged = []
    rows = results["rows"]
    for name, least in (("pure graph", 9), ("pure XLA", 3)):
        for row in rows:
            large = row["shape"] == [4096, 4096] and row["dtype"] == "float32"
            ratio = row["times_fused"].get(name)
            if large and row["pass"] == "forward+gradient" and ratio:
                judged.append(
                    (
                        f"4096 x 4096 forward+gradient: at least {least}x {name}",
                        f"{ratio['median']:.1f}x",
                        ratio["median"] >= least,
                    )
                )
    large = [
        row for row in rows if row["pass"] == "forward" and row["bytes"] >= 16 * 2**20
    ]
    for name, what in (("fused", "with its call"), ("kernel alone", "kernel alone")):
        shares = [
            fraction(row, results["memory_GB_per_s"], name)
            for row in large
            if name in row["seconds"]
        ]
        if shares:
            judged.append(
                (
                    "forward from 16 MB: at least 85 % of the memory's read bandwidth "
                    f"({what})",
                    f"{min(shares):.0%}",
                    min(shares) >= 0.85,
                )
            )
    ratios = [
        (ratio["median"], name, row)
        for row in rows
        for name, ratio in row["times_fused"].items()
        if name.startswith("pure")
    ]
    if ratios:
        least, name, row = min(ratios, key=lambda ratio: ratio[0])
        judged.append(
            (
                "never slower than plain TensorFlow, graph or XLA",
                f"at worst {least:.2f}x {name} ({label(row)}, {row['pass']})",
                least >= 1,
            )
        )
    return judged


def label(row: Row) -> str:
    """The shape as text."""
    return " x ".join(map(str, row["shape"]))


def _cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """The table's header and rows: microseconds, and how often slower than fused."""
    rows = results["rows"]
    names = dict.fromkeys(name for row in rows for name in row["seconds"])
    others = [name for name in names if name != "fused"]
    predicted = any(row.get("predicted_seconds") for row in rows)
    header = ["shape", "pass", "fused"]
    header += ["predicted", "fused/predicted"] if predicted else []
    header += [*others, "GB/s", "of memory", "of same size"]
    body = []
    for row in rows:
        fused = row["seconds"].get("fused")
        cells = [label(row), row["pass"], _microseconds(fused) if fused else "-"]
        if predicted:
            cells += _predicted(row)
        for name in others:
            if name in row["seconds"]:
                cells.append(_microseconds(row["seconds"][name]))
                if name in row["times_fused"]:
                    ratio = row["times_fused"][name]["median"]
                    cells[-1] += f" ({ratio:.1f}x)"
            else:
                cells.append("-")
        if fused:
            cells.append(f"{gigabytes_per_second(row):.1f}")
            memory = row.get("memory_GB_per_s") or results["memory_GB_per_s"]
            cells.append(f"{fraction(row, memory):.0%}")
            cells.append(f"{fraction(row, row['same_size_GB_per_s']):.0%}")
        else:
            cells += ["-"] * 3
        body.append(cells)
    return header, body


def _predicted(row: Row) -> list[str]:
    """What the model says, and how often as long the kernels took."""
    seconds = row.get("predicted_seconds")
    if not seconds:
        return ["-", "-"]
    text = _microseconds({"median": seconds})
    if "fused" not in row["seconds"]:
        return [text, "-"]
    return [text, f"{row['seconds']['fused']['median'] / seconds:.2f}"]


def _microseconds(seconds: Mapping[str, float]) -> str:
    time = 1e6 * seconds["median"]
    return f"{time:.1f}" if time < 10 else f"{time:.0f}"


def cpu_notes(results: Results) -> list[str]:
    """What a reader must know of bench_op.py's table."""
    machine, memory = results["machine"], results["memory_GB_per_s"]
    versions = results["versions"]
    return [
        f"{machine['cpu']}, {results['threads']} threads, TensorFlow "
        f"{versions['tensorflow']}, SIMD {versions['simd']}; medians of "
        f"{results['rounds']} rounds.",
        "fused: the op, fused XLA: compiled by XLA; kernel alone: what it runs, called "
        "without TensorFlow; pure graph, pure XLA: the same in plain TensorFlow; port "
        "formula: that of the TensorFlow port; torch: that of the PyTorch original.",
        "Microseconds a call, and how often as long as fused. Included: the call "
        f"(an empty one takes {1e6 * results['empty_call_seconds']:.0f}) and the "
        "allocation of the results.",
        f"Memory: read {memory['read']:.1f} GB/s, copy {memory['copy']:.1f}, triad "
        f"{memory['triad']:.1f}. GB/s of fused: x read once for forward; x read twice "
        "and dx written for forward+gradient. Beside it, the share of what plain reads "
        "and copies reach in memory, and on arrays of the same size (which may fit a "
        "cache).",
    ]


def gpu_notes(results: Results) -> list[str]:
    """What a reader must know of bench_gpu.py's tables."""
    gpu, build = results["gpu"], results["build"]
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    memory = [
        row["memory_GB_per_s"] for row in results["rows"] if "memory_GB_per_s" in row
    ]
    notes = [
        f"{gpu['name']}, driver for CUDA {gpu.get('driver', 'none')}; built with "
        f"{build['cuda']}; {versions}. Command: {' '.join(results['command'])}",
        "Microseconds for one tensor, and how often as long as fused; medians of "
        f"{results['rounds']} rounds. Fused is replayed as a CUDA graph, fused eager "
        "launched from Python call by call; torch by events on its stream; JAX, one "
        "jitted function over all tensors of a turn, and TensorFlow by the host's "
        "clock, their calls included. The L2 cache holds nothing of the tensors before "
        "each turn; in forward+gradient, the gradient may find there what the forward "
        "pass has read. Rows in L2 take one tensor again and again.",
    ]
    if memory:
        copied, read = ([rate[kind] for rate in memory] for kind in ("copy", "read"))
        notes.append(
            f"Copies of 1 GiB, in turn with the variants: {min(copied):.0f} to "
            f"{max(copied):.0f} GB/s, reads and writes counted; reads of 1 GiB, by "
            f"{gpu['read_by']}: {min(read):.0f} to {max(read):.0f}. GB/s of fused: "
            "what a pass has to read and to write, each array once. Beside it, its "
            "share of what such copies and reads reach (reads for x of a forward pass, "
            "copies for the rest), and those of the tensor's own size."
        )
    if results.get("model"):
        notes.append(
            f"Predicted: by gpu_model.py for {results['model']['name']}, from bytes, "
            "instructions and launches, before anything was measured; for "
            "forward+gradient both passes, one after the other, with nothing in L2."
        )
    return notes


def gpu_targets(results: Results) -> list[Judged]:
    """As `targets`, of bench_gpu.py."""
    shares = [
        (fraction(row, row["memory_GB_per_s"]), f"{label(row)}, {row['pass']}")
        for row in results["rows"]
        if row["bytes"] >= 100e6 and "fused" in row["seconds"]
    ]
    if not shares:
        return []
    least, where = min(shares)
    target = "from 100 MB: at least 88 % of the bandwidth of reads and copies of 1 GiB"
    return [(target, f"at least {least:.0%} ({where})", least >= 0.88)]


def _skipped(results: Results) -> list[str]:
    reasons = {
        f"{name}: {reason}"
        for row in results["rows"]
        for name, reason in row["skipped"].items()
    }
    return [f"Not timed, {reason}." for reason in sorted(reasons)]


def print_progress(row: Row) -> None:
    """One line, as soon as a row is measured."""
    times = ", ".join(
        f"{name} {_microseconds(seconds)}" for name, seconds in row["seconds"].items()
    )
    predicted = row.get("predicted_seconds")
    if predicted:
        times += f"; predicted {_microseconds({'median': predicted})}"
    if "fused" in row["skipped"]:
        times += f"; fused: {row['skipped']['fused']}"
    what = f"{label(row)} {row['dtype']} {row['pass']}"
    print(f"{what}, microseconds: {times}", flush=True)


def write(results: Results, folder: pathlib.Path) -> None:
    """results.json alone; a run that is interrupted leaves what it has."""
    text = json.dumps(results, indent=1) + "\n"
    _replace(folder / "results.json", lambda path: path.write_text(text))


def finish(
    results: Results,
    folder: pathlib.Path,
    notes: Sequence[str],
    judged_targets: Sequence[Judged],
    aloud: bool = True,
) -> None:
    """Writes what bench_op.py or bench_gpu.py has measured, and prints it.

    Not `aloud`, it writes table.md alone: for a run that may not come to its end.
    """
    header, body = _cells(results)
    conclude(
        folder,
        f"Batch entropy, {results['rows'][0]['dtype']}",
        [header, *body],
        2,
        [*notes, *_skipped(results)],
        judged_targets,
        (lambda path: _plot(results["rows"], path)) if aloud else None,
    )


def conclude(
    folder: pathlib.Path,
    title: str,
    rows: Sequence[Sequence[str]],
    labels: int,
    notes: Sequence[str],
    judged_targets: Sequence[Judged],
    plot: Callable[[pathlib.Path], object] | None,
) -> None:
    """Prints the table, notes and targets; writes table.md and plot.png if it can.

    Args:
        folder: where they go.
        title: of the table.
        rows: its cells, the header first.
        labels: how many of the first columns are text.
        notes: what a reader must know.
        judged_targets: each with what was found, and whether that is enough.
        plot: writes the plot to a file; None to write table.md and nothing else.
    """
    header, *body = rows
    lines = [header, ["---"] * labels + ["---:"] * (len(header) - labels), *body]
    markdown = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    judged = [
        f"{'met   ' if enough else 'missed'}  {target}: {found}"
        for target, found, enough in judged_targets
    ]
    text = "\n\n".join([markdown, *notes, *judged]) + "\n"
    _replace(folder / "table.md", lambda path: path.write_text(text))
    if plot is None:
        return
    if Table is None or not sys.stdout.isatty():
        print(f"{title}\n\n{markdown}\n")
    else:
        table = Table(title=title)
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index < labels else "right")
        for cells in body:
            table.add_row(*cells)
        Console(width=max(120, 22 * len(header))).print(table)
    print("\n".join([*notes, *judged]))
    picture = folder / "plot.png"
    if plt is None:
        picture.unlink(missing_ok=True)  # that of an earlier run
        print("No plot: pip install matplotlib")
    else:
        _replace(picture, plot)
    print(f"Results: {folder}")


def _plot(rows: Sequence[Row], path: pathlib.Path) -> None:
    rows = [row for row in rows if row["seconds"]]
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    across = min(max(len(passes), 1), 4)
    down = max(1, -(-len(passes) // across))
    figure, grid = plt.subplots(
        down, across, figsize=(6 * across, 4 * down), sharey=True, squeeze=False
    )
    for axis in grid.flat[len(passes) :]:
        axis.set_visible(False)
    for axis, kind in zip(grid.flat, passes, strict=False):
        shown = [row for row in rows if row["pass"] == kind]
        for name in names:
            points = [
                (index, 1e6 * row["seconds"][name]["median"])
                for index, row in enumerate(shown)
                if name in row["seconds"]
            ]
            if not points:
                continue
            width = 2.5 if name == "fused" else 1.2
            axis.plot(*zip(*points, strict=True), "o-", label=name, linewidth=width)
        axis.set_xticks(range(len(shown)), map(label, shown), rotation=30, ha="right")
        axis.set_yscale("log")
        axis.set_title(f"{kind}, {shown[0]['dtype']}")
        axis.grid(alpha=0.3)
    grid[0][0].set_ylabel("microseconds a call")
    if rows:
        grid[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def _replace(path: pathlib.Path, write_to: Callable[[pathlib.Path], object]) -> None:
    """Writes a file beside `path`, then puts it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    write_to(draft)
    draft.replace(path)
