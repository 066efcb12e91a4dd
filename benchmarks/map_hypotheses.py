# SPDX-License-Identifier: Apache-2.0
"""What the trainability map says of the hypotheses that were written down before it.

    python benchmarks/map_hypotheses.py benchmarks/results/map

reads the CSV files of `lbe-ops map` in the folder, tests each hypothesis of its README
by the rule that stands there, and writes `verdicts.md` beside them; and the cells of
which `m1` and `m1_claims` have eight seeds together, to `eight_seeds.md`.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from lbe_ops.experiments import map as trainability
from lbe_ops.experiments import map_report
from lbe_ops.experiments.map_report import (
    Cell,
    cells,
    holm,
    mean_interval,
    prediction,
    sign_flip,
    trainable_depths,
    wilson,
)
from lbe_ops.experiments.results import replacing
from lbe_ops.experiments.trial import Trial

MARGIN = 0.02
DEFAULTS = ("glorot_uniform", "he_normal")
Rows = list[tuple[Trial, dict[str, float]]]


class Verdict(NamedTuple):
    """Of one hypothesis; p is None where it is about an interval or a depth."""

    name: str
    holds: bool | None
    evidence: str
    p: float | None = None


def paired(first: Cell, second: Cell) -> list[float]:
    """Differences of accuracies, first minus second, of the seeds that both have."""
    both = sorted(first.accuracies.keys() & second.accuracies.keys())
    return [first.accuracies[seed] - second.accuracies[seed] for seed in both]


def gains(rows: Rows, arm: str = "lbe", base: str = "none") -> list[float]:
    """Paired differences of two arms, over all cells and seeds."""
    axes = ("model", "norm", "activation", "initializer", "depth", "gain")
    found = cells(rows, axes).values()
    return [
        d
        for arms in found
        if {arm, base} <= arms.keys()
        for d in paired(arms[arm], arms[base])
    ]


def of(rows: Rows, **values: object) -> Rows:
    """The trials with these values; a tuple names several."""

    def fits(trial: Trial) -> bool:
        return all(
            getattr(trial, name) in (value if isinstance(value, tuple) else (value,))
            for name, value in values.items()
        )

    return [row for row in rows if fits(row[0])]


def depth(rows: Rows, **values: object) -> int:
    """The trainable depth of the best of these trials; 0 where none is trained."""
    return max(
        trainable_depths(of(rows, **values), lambda trial: True).values(), default=0
    )


def span(values: list[float]) -> str:
    """A mean with its interval."""
    low, high = mean_interval(values)
    return f"{np.mean(values):+.3f} [{low:+.3f}, {high:+.3f}], n = {len(values)}"


def inside(values: list[float]) -> bool:
    """Whether the interval of the mean lies within the margin of no difference."""
    low, high = mean_interval(values)
    return low >= -MARGIN and high <= MARGIN


def unchanged(name: str, found: dict[str, list[float]]) -> Verdict:
    """Whether the differences of all places lie within the margin."""
    text = "; ".join(f"{place}: {span(each)}" for place, each in found.items())
    return Verdict(name, all(map(inside, found.values())), text)


def h0(rows: Rows) -> Verdict:
    """Shallow nets."""
    found = {
        activation: gains(of(rows, depth=3, activation=activation))
        for activation in trainability.INITIALIZERS
    }
    return unchanged("H0", found)


def h1(rows: Rows) -> Verdict:
    """GELU from the initializers that Keras' users take."""
    gelu = of(rows, activation="gelu", initializer=DEFAULTS)
    without, with_lbe = depth(gelu, arm="none"), depth(gelu, arm="lbe")
    best: dict[tuple[int, str], Cell] = {}
    for (layers, _), arms in cells(gelu, ("depth", "initializer")).items():
        for arm, cell in arms.items():
            key = (layers, arm)
            if key not in best or cell.mean > best[key].mean:
                best[key] = cell
    most = max(
        (layers for layers, _ in best),
        key=lambda layers: best[layers, "lbe"].mean - best[layers, "none"].mean,
    )
    differences = paired(best[most, "lbe"], best[most, "none"])
    p = sign_flip(differences)
    text = (
        f"{with_lbe} layers with LBE, {without} without; at {most}: {span(differences)}"
    )
    return Verdict(
        "H1", with_lbe >= 2 * without and with_lbe > 0 and p <= 0.05, text, p
    )


def h2(rows: Rows) -> Verdict:
    """GELU against initializers that know the scale."""
    gelu = of(rows, activation="gelu")
    ours = depth(gelu, initializer="he_normal", arm="lbe")
    rivals = {
        name: depth(gelu, initializer=name, arm="none")
        for name in ("lsuv", "critical_orthogonal")
    }
    text = f"he_normal with LBE {ours}, without LBE: {rivals}"
    return Verdict("H2", all(ours >= each for each in rivals.values()), text)


def h3(rows: Rows) -> Verdict:
    """ReLU, scale gone."""
    relu = of(rows, activation="relu")
    arms = cells(of(relu, initializer="glorot_uniform", depth=50), ("depth",))[50,]
    shares = {
        arm: (arms[arm].trained, len(arms[arm].accuracies)) for arm in ("none", "lbe")
    }
    # Newcombe's interval of a difference of shares.
    (a, n), (b, m) = shares["lbe"], shares["none"]
    low = a / n - b / m - np.hypot(a / n - wilson(a, n)[0], wilson(b, m)[1] - b / m)
    linear = cells(of(relu, initializer="looks_linear", depth=100), ("depth",))[100,]
    ours = cells(of(relu, initializer="glorot_uniform", depth=100), ("depth",))[100,]
    behind = paired(linear["none"], ours["lbe"])
    p = sign_flip(paired(arms["lbe"], arms["none"]))
    text = (
        f"trained at 50: {a}/{n} with LBE, {b}/{m} without, lift at least {low:+.2f}; "
        f"looks_linear without LBE minus LBE at 100: {span(behind)}"
    )
    return Verdict(
        "H3", a / n - b / m >= 0.5 and mean_interval(behind)[0] >= MARGIN, text, p
    )


def h4(rows: Rows) -> Verdict:
    """ReLU, rank gone."""
    inits = ("he_normal", "critical_orthogonal", "lsuv")
    found = gains(of(rows, activation="relu", initializer=inits, depth=100, gain=1.0))
    return Verdict("H4", mean_interval(found)[0] <= 0, span(found))


def h5(rows: Rows) -> Verdict:
    """Isometries."""
    pairs = (("relu", "looks_linear"), ("tanh", "critical_orthogonal"))
    found = {
        f"{activation} {layers}": gains(
            of(rows, activation=activation, initializer=initializer, depth=layers)
        )
        for activation, initializer in pairs
        for layers in (10, 20, 50, 100)
    }
    return unchanged("H5", found)


def h6(rows: Rows) -> Verdict:
    """Sigmoid."""
    sigmoid = of(rows, activation="sigmoid")
    without, with_lbe = depth(sigmoid, arm="none"), depth(sigmoid, arm="lbe")
    text = f"{with_lbe} layers with LBE, {without} without"
    return Verdict("H6", with_lbe >= 2 * without and with_lbe > 0, text)


def h7(rows: Rows) -> Verdict:
    """Too large a scale."""
    found = gains(of(rows, gain=(1.15, 1.4)))
    return Verdict("H7", mean_interval(found)[0] > 0, span(found))


def h8(rows: Rows) -> Verdict:
    """LBE for the first steps alone."""
    found = gains(rows, "lbe_until_200", "lbe")
    return Verdict("H8", mean_interval(found)[1] >= -MARGIN, span(found))


def h9(rows: Rows) -> Verdict:
    """Measurement predicts."""
    found = {name: prediction(rows, name) for name in ("gelu", "relu", "tanh")}
    text = "; ".join(
        f"{name}: {each['trained']} of {each['trials']} trained, "
        f"AUC {each['auc']:.3f}, of entropy alone {each['auc_entropy']:.3f}, "
        f"before step 0 alone {prediction(rows, name, steps=(0,))['auc']:.3f}"
        for name, each in found.items()
    )
    auc = found["gelu"]["auc"]
    return Verdict("H9", None if np.isnan(auc) else auc >= 0.9, text)


def h10(rows: Rows) -> Verdict:
    """Variants."""
    found = {
        f"{name}, {activation} {initializer}": gains(
            of(rows, activation=activation, initializer=initializer), name, "lbe"
        )
        for activation, initializer in trainability.ANCHORS
        for name in ("lbe_one_sided", "lbe_units", "lbe_std_hinge")
    }
    text = "; ".join(f"{name}: {span(each)}" for name, each in found.items())
    above = [mean_interval(each)[0] > MARGIN for each in found.values()]
    return Verdict("H10", not any(above), text)


def h11(rows: Rows) -> Verdict:
    """Residual nets with normalization."""
    found = gains(of(rows, model="residual", norm="batch"))
    return Verdict("H11", inside(found), span(found))


def h12(rows: Rows) -> Verdict:
    """Residual nets without normalization."""
    found = gains(of(rows, model="residual", norm="none", depth=100))
    return Verdict("H12", mean_interval(found)[0] <= 0, span(found))


def h13(rows: Rows) -> Verdict:
    """Convolutions of GELU."""
    chosen = {"activation": "gelu", "initializer": "he_normal", "depth": 50}
    rows = of(rows, model="conv", **chosen)
    found = gains(rows)
    (arms,) = cells(rows, ("depth",)).values()
    lift = (arms["lbe"].trained - arms["none"].trained) / len(arms["lbe"].accuracies)
    text = f"lift of the share trained {lift:+.2f}; {span(found)}"
    return Verdict("H13", mean_interval(found)[0] > 0 and lift >= 0.5, text)


def confirmed(rows: Rows, name: str, variant: str) -> Verdict:
    """A variant on other seeds: above LBE at 100 layers of GELU, below it nowhere."""
    found = {
        (activation, layers): gains(
            of(rows, activation=activation, depth=layers), variant, "lbe"
        )
        for activation in ("relu", "gelu")
        for layers in (50, 100)
    }
    lows = {place: mean_interval(each)[0] for place, each in found.items()}
    text = "; ".join(f"{a} {d}: {span(each)}" for (a, d), each in found.items())
    holds = lows["gelu", 100] > MARGIN and min(lows.values()) >= -MARGIN
    return Verdict(name, holds, text)


def h15(rows: Rows) -> Verdict:
    """The hinge on standard deviations."""
    return confirmed(rows, "H15", "lbe_std_hinge")


def h16(rows: Rows) -> Verdict:
    """One-sided LBE."""
    return confirmed(rows, "H16", "lbe_one_sided")


def h17(rows: Rows) -> Verdict:
    """Transformers without normalization."""
    found = gains(of(rows, model="transformer", norm="none", depth=12))
    return Verdict("H17", mean_interval(found)[0] <= 0, span(found))


def trained_without(rows: Rows, name: str) -> Verdict:
    """Whether all cells train without LBE."""
    found = {
        place: arms["none"]
        for place, arms in cells(of(rows, arm="none"), trainability.CELL).items()
    }
    text = "; ".join(
        f"{activation} {layers}: {cell.trained}/{len(cell.accuracies)}"
        for (activation, _, layers), cell in found.items()
    )
    return Verdict(name, all(cell.trains for cell in found.values()), text)


def h18(rows: Rows) -> Verdict:
    """Kernels that were made for ReLU, with other activations."""
    return trained_without(of(rows, model="dense"), "H18")


def h19(rows: Rows) -> Verdict:
    """The best of GELU's initializers against LBE."""
    rows = of(rows, activation="gelu", depth=50, model="dense")
    found = cells(rows, ("initializer",))
    differences = paired(found["looks_linear",]["none"], found["he_normal",]["lbe"])
    p = sign_flip(differences)
    return Verdict("H19", mean_interval(differences)[0] > 0, span(differences), p)


def h20(rows: Rows) -> Verdict:
    """LBE on top of them."""
    found = {
        activation: gains(of(rows, activation=activation))
        for activation in ("gelu", "silu", "sigmoid")
    }
    return unchanged("H20", found)


def h21(rows: Rows) -> Verdict:
    """Nets of 500 layers."""
    return trained_without(rows, "H21")


def h22(rows: Rows) -> Verdict:
    """LBE on top of them."""
    found = gains(rows)
    return Verdict("H22", inside(found), span(found))


def h23(rows: Rows) -> Verdict:
    """Convolutions."""
    return trained_without(of(rows, model="conv"), "H23")


def h24(rows: Rows) -> Verdict:
    """Sigmoid at lower rates."""
    return trained_without(rows, "H24")


# What each needs: its blocks, all of whose trials must have been run.
HYPOTHESES: dict[Callable[[Rows], Verdict], tuple[str, ...]] = {
    h0: ("shallow",),
    **dict.fromkeys((h1, h2, h3, h4, h5, h6), ("m1", "m1_claims")),
    h7: ("m2",),
    h8: ("m3",),
    h9: ("m1",),
    h10: ("m3",),
    **dict.fromkeys((h11, h12, h13), ("m5",)),
    **dict.fromkeys((h15, h16), ("m3_confirm",)),  # H14: plasticity.py
    h17: ("m7",),
    h18: ("m8",),
    h19: ("m1", "m1_claims", "m8"),
    h20: ("m8",),
    **dict.fromkeys((h21, h22), ("m1_500",)),
    h23: ("m8",),
    h24: ("m8_sigmoid",),
}


def read(folder: pathlib.Path, block: str) -> tuple[Rows, int]:
    """The trials of a block, and how many of them are missing."""
    path = folder / f"{block}.csv"
    found = trainability.read(path) if path.exists() else []
    wanted = set(trainability.BLOCKS[block]())
    rows = [row for row in found if row[0] in wanted]
    return rows, len(wanted - {trial for trial, _ in rows})


def verdicts(folder: pathlib.Path) -> Iterator[Verdict]:
    """The verdict on each hypothesis, in their order."""
    blocks = {block for needed in HYPOTHESES.values() for block in needed}
    found = {block: read(folder, block) for block in blocks}
    for hypothesis, needed in HYPOTHESES.items():
        rows = [row for block in needed for row in found[block][0]]
        missing = sum(found[block][1] for block in needed)
        if missing:
            name, text = hypothesis.__name__.upper(), f"{missing} trials are missing"
            yield Verdict(name, None, text)
        else:
            yield hypothesis(rows)


def table(found: Iterable[Verdict]) -> str:
    """All verdicts; p-values of several tests are adjusted by Holm's method."""
    found = list(found)
    tested = [verdict for verdict in found if verdict.p is not None]
    adjusted = dict(
        zip((v.name for v in tested), holm([v.p for v in tested]), strict=True)
    )
    lines = ["| | | evidence | p (Holm) |", "|---|---|---|---|"]
    for verdict in found:
        says = {True: "holds", False: "**refuted**", None: "open"}[verdict.holds]
        p = adjusted.get(verdict.name)
        number = "" if p is None else f"{p:.3g}"
        lines.append(f"| {verdict.name} | {says} | {verdict.evidence} | {number} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    texts = {"verdicts.md": table(verdicts(folder))}
    claims, missing = read(folder, "m1_claims")
    if not missing:
        claimed = tuple({trial.activation for trial, _ in claims})
        rows = of(read(folder, "m1")[0], activation=claimed) + claims
        texts["eight_seeds.md"] = map_report.table(rows, trainability.CELL)
    for name, text in texts.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text)
        print(text, end="")


if __name__ == "__main__":
    main()
