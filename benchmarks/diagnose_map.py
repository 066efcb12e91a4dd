# SPDX-License-Identifier: Apache-2.0
"""What `lbe_ops.diagnose` says of untrained nets of the map, and how these ended.

    python benchmarks/diagnose_map.py benchmarks/results/map

Diagnoses the initial net of every trial without LBE in DIR/m1.csv, and sets beside it
whether the net was trained at the learning rate that was best for its cell. The numbers
that its thresholds are about go to DIR/diagnosis.csv, the counts to DIR/diagnosis.md.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import pathlib
from collections import Counter
from typing import Any

import numpy as np

import lbe_ops
from lbe_ops.diagnose import (
    FINE,
    REMEDIES,
    growth_backwards,
    layers_without_rank,
)
from lbe_ops.experiments import data, map_report, nets
from lbe_ops.experiments import map as trainability
from lbe_ops.experiments.results import replacing
from lbe_ops.experiments.settings import LSUV, Settings
from lbe_ops.experiments.trial import Trial

SAMPLES = 512


def features(diagnosis: lbe_ops.Diagnosis) -> dict[str, float]:
    """The numbers that the thresholds of `lbe_ops/diagnose.py` are about."""
    *judged, head = diagnosis.layers
    gradients = [row.gradient_norm or 0.0 for row in judged]
    ranks = [row.effective_rank for row in judged]
    with np.errstate(all="ignore"):
        return {
            "scale": judged[-1].deviation / max(row.deviation for row in judged),
            "gradient": np.divide(gradients[0], head.gradient_norm),
            "rank": ranks[-1],
            "rank_max": max(ranks),
            "layers_without_rank": layers_without_rank(ranks),
            "growth": np.divide(judged[-1].rms, judged[0].rms),
            "gradient_growth": growth_backwards(gradients),
        }


def diagnose(trial: Trial, digits: data.Data) -> lbe_ops.Diagnosis:
    """Of the net that the trial begins with."""
    names = {field.name for field in dataclasses.fields(Settings)}
    values = {k: v for k, v in dataclasses.asdict(trial).items() if k in names}
    net = nets.build(Settings(**values), digits.shape, digits.classes, lbe=False)
    x, y = digits.x_train[:SAMPLES], digits.y_train[:SAMPLES]
    if trial.initializer == LSUV:
        nets.scale_layers(net, x)
    return lbe_ops.diagnose(net, x, y, print_fn=None)


def table(rows: list[dict[str, Any]]) -> str:
    """For every activation how many nets of each illness were trained, out of how many.

    Nets that need no cure are those that are trained without any.
    """
    header = ["activation", *REMEDIES, "right", "right of the trained, of the others"]
    lines = []
    for activation in [*trainability.INITIALIZERS, "all"]:
        of = [r for r in rows if activation in ("all", r["activation"])]
        counts = Counter((row["illness"], row["trained"]) for row in of)
        right = Counter(row["trained"] for row in of if _is_right(row))
        total = Counter(row["trained"] for row in of)
        shares = [f"{right[each]}/{total[each]}" for each in (1, 0)]
        lines.append(
            [activation]
            + [
                f"{counts[illness, 1]}/{counts[illness, 1] + counts[illness, 0]}"
                for illness in REMEDIES
            ]
            + [f"{sum(right.values())}/{len(of)}", ", ".join(shares)]
        )
    return map_report.markdown(header, lines)


def _is_right(row: dict[str, Any]) -> bool:
    return (row["illness"] == FINE) == bool(row["trained"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    digits = data.load("digits")
    found = trainability.read(folder / "m1.csv")
    axes = ("activation", "initializer", "depth")
    cells = map_report.cells(found, axes)
    rows = []
    for trial, outcome in found:
        place = tuple(getattr(trial, axis) for axis in axes)
        if trial.arm != "none":
            continue
        if trial.learning_rate != cells[place]["none"].learning_rate:
            continue
        diagnosis = diagnose(trial, digits)
        rows.append(
            {axis: getattr(trial, axis) for axis in (*axes, "seed")}
            | {"trained": int(map_report.trained(trial, outcome))}
            | {"illness": diagnosis.illness}
            | {name: f"{value:.4g}" for name, value in features(diagnosis).items()}
        )
        print(*rows[-1].values(), flush=True)
    with (
        replacing(folder / "diagnosis.csv") as temporary,
        temporary.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = table(rows)
    with replacing(folder / "diagnosis.md") as temporary:
        temporary.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
