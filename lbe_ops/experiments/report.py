# SPDX-License-Identifier: Apache-2.0
"""`lbe-ops report`: runs side by side, in the table that each of them ends with."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lbe_ops.experiments.ending import exit_status
from lbe_ops.experiments.errors import ExperimentError, require_installed
from lbe_ops.experiments.results import NETS, RunFolder, write_json
from lbe_ops.experiments.settings import Settings, stem
from lbe_ops.experiments.tasks import Classification, Reconstruction, task_of

DESCRIPTION = """\
Compares runs of `lbe-ops train`: a column for each net, first the settings, data and
versions that are not the same in all runs, then the figures of the last epoch. A net
that is not finished has the number of its epochs as `3 of 15`.
"""

# A line of a table: its title, and a text for each column.
Row = tuple[str, Sequence[str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run` to a parser."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "folders",
        nargs="+",
        type=pathlib.Path,
        metavar="DIR",
        help="a folder that `lbe-ops train` has written",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status as that of `lbe-ops train`."""
    return exit_status(lambda: _report(arguments.folders), "nothing was changed")


def summarize(
    folder: RunFolder, chance: float, task: Classification | Reconstruction
) -> None:
    """Writes summary.json, the final figures of each net, and prints it as a table.

    Args:
        folder: the run, with a net that has finished an epoch.
        chance: the score by chance, to compare with.
        task: what the nets learn.

    Raises:
        OSError: the file cannot be written.
    """
    figures = {net: _figures(folder.net(net).history(), task) for net in NETS}
    figures = {net: values for net, values in figures.items() if values}
    write_json(folder.path / "summary.json", {"chance": chance, **figures})
    show(
        [title(net) for net in figures],
        [_rows(list(figures.values()))],
        f"{task.by_chance}: {chance:.3f}",
    )


def title(net: str) -> str:
    """The name of a net, for people."""
    return net.replace("_lbe", " LBE")


def show(
    columns: Sequence[str], sections: Sequence[Sequence[Row]], caption: str = ""
) -> None:
    """Prints a table.

    Args:
        columns: their titles.
        sections: rows, with a line between one section and the next.
        caption: stands below.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", *map(escape, columns), caption=escape(caption) or None)
    for rows in sections:
        for name, cells in rows:
            table.add_row(escape(name), *map(escape, cells))
        table.add_section()
    console = Console()
    if not console.is_terminal:  # a file or a pipe takes lines of any length
        console = Console(width=10_000)
    console.print(table)


def _report(folders: Sequence[pathlib.Path]) -> None:
    require_installed("rich")
    runs = [_Run(path) for path in dict.fromkeys(folders)]
    nets = [(run, net) for run in runs for net in run.figures]
    names = _names([run.path for run in runs])
    differing = [
        (name, [_text(run.facts.get(name)) for run, _ in nets])
        for name in dict.fromkeys(name for run in runs for name in run.facts)
        if len({_text(run.facts.get(name)) for run in runs}) > 1
    ]
    show(
        [f"{names[run.path]}\n{title(net)}" for run, net in nets],
        [differing, _rows([run.figures[net] for run, net in nets])],
    )


class _Run:
    """What a folder says of its run.

    Args:
        path: the folder.

    Attributes:
        facts: settings, data and versions.
        figures: those of each net that has finished an epoch.

    Raises:
        ExperimentError: it is not the folder of a run, or no epoch is finished.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        folder = RunFolder(path)
        config = folder.config()
        if config is None:
            what = "has no config.json" if path.is_dir() else "is no folder"
            raise ExperimentError(
                f"{path} {what}; a run of `lbe-ops train` was asked for"
            )
        try:
            self.facts, self.figures = self._read(folder, config)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ExperimentError(
                f"{path} does not hold what a run writes: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not self.figures:
            raise ExperimentError(f"{path} holds no finished epoch")

    @staticmethod
    def _read(
        folder: RunFolder, config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        settings = Settings.from_mapping(config["settings"])
        # The epochs are among the figures. Data are known by their checksum, wherever
        # they are.
        given = {**settings.as_dict(), "data": stem(settings.data)}
        del given["epochs"]
        facts = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
        for part in ("data", "environment"):
            facts |= {f"{part}: {name}": value for name, value in config[part].items()}
        task = task_of(settings)
        chance = folder.chance()
        figures = {}
        for net in NETS:
            found: dict[str, Any] = _figures(folder.net(net).history(), task)
            if found:
                if not folder.net(net).finished(settings.epochs):
                    found["epochs"] = f"{found['epochs']} of {settings.epochs}"
                if chance is not None:
                    found[task.by_chance] = chance
                figures[net] = found
        return facts, figures


def _names(paths: Sequence[pathlib.Path]) -> dict[pathlib.Path, str]:
    """The last part of each path, or all of it where that is not enough."""
    last = {path: path.resolve().name for path in paths}
    if len({*last.values()}) == len(paths):
        return last
    return {path: str(path) for path in paths}


def _rows(columns: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row for every figure that a column has, in the order of the fullest one."""
    fullest = max(columns, key=len)
    names = dict.fromkeys([*fullest, *(name for each in columns for name in each)])
    return [
        (
            name.replace("_", " ").replace("val ", "validation "),
            [_text(each.get(name)) for each in columns],
        )
        for name in names
    ]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _figures(
    rows: list[dict[str, float]], task: Classification | Reconstruction
) -> dict[str, float]:
    """The final figures of a history; empty for a net that was not trained."""
    if not rows:
        return {}
    names = (task.score, "kl", "ce", "lbe", "max_lbe")
    final = {
        key: rows[-1][key]
        for name in names
        for key in (name, f"val_{name}")
        if key in rows[-1]
    }
    score = f"val_{task.score}"
    known = [row for row in rows if not math.isnan(row[score])] or rows
    best = task.best(known, key=lambda row: row[score])
    return {
        "epochs": len(rows),
        **final,
        f"best_{score}": best[score],
        "best_epoch": best["epoch"],
        "seconds": round(sum(row["seconds"] for row in rows), 1),
    }
