# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of the trainability map, with intervals.

Final values only, never the best of a run. Where a learning rate is chosen, every arm
chooses its own out of the same, by the mean over the seeds.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lbe_ops.experiments.results import replacing
from lbe_ops.experiments.trial import ARMS, Trial

Rows = Sequence[tuple[Trial, dict[str, float]]]

# The best mean over seeds of a net of three layers (the block `shallow`), and of a
# transformer of two blocks (`m7`).
SHALLOW_ACCURACY = {"digits": 0.975, "text": 0.369}
TRAINED = 0.9  # the share of that from which on a net counts as trained


def trained(trial: Trial, outcome: dict[str, float]) -> bool:
    """Whether a net has learnt nearly what a shallow one does."""
    return outcome["val_accuracy"] >= TRAINED * SHALLOW_ACCURACY[trial.data]


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share."""
    interval = stats.binomtest(successes, count).proportion_ci(method="wilson")
    return interval.low, interval.high


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean (Student's t); the mean itself for one value."""
    values = np.asarray(values, np.float64)
    mean, error = values.mean(), 0.0
    if len(values) > 1:
        error = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return float(mean - error), float(mean + error)


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of paired differences, under all flips of their signs."""
    return float(
        stats.permutation_test(
            (np.asarray(differences, np.float64),),
            np.mean,
            permutation_type="samples",
            n_resamples=np.inf,
        ).pvalue
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of hypotheses, adjusted by Holm's method."""
    order, adjusted, highest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        value = min(1.0, (len(p_values) - rank) * p_values[index])
        highest = max(highest, value)
        adjusted[index] = highest
    return adjusted


@dataclasses.dataclass(frozen=True)
class Cell:
    """Trials that differ in their seeds alone, at the best learning rate of the arm."""

    learning_rate: float
    accuracies: dict[int, float]  # of every seed
    trained: int

    @property
    def mean(self) -> float:
        """The mean final validation accuracy."""
        return float(np.mean(list(self.accuracies.values())))

    @property
    def trains(self) -> bool:
        """Whether at least 80 % of the seeds were trained."""
        return self.trained >= 0.8 * len(self.accuracies)


def cells(rows: Rows, axes: Iterable[str]) -> dict[tuple, dict[str, Cell]]:
    """For each combination of the axes, a cell for each arm."""
    axes = tuple(axes)
    by_rate: dict[tuple, dict[str, dict[float, list]]] = {}
    for trial, outcome in rows:
        place = tuple(getattr(trial, axis) for axis in axes)
        rates = by_rate.setdefault(place, {}).setdefault(trial.arm, {})
        rates.setdefault(trial.learning_rate, []).append((trial, outcome))
    return {
        place: {arm: _best(rates) for arm, rates in by_rate[place].items()}
        for place in sorted(by_rate)
    }


def _best(rates: dict[float, list]) -> Cell:
    found = [
        Cell(
            rate,
            {trial.seed: outcome["val_accuracy"] for trial, outcome in rows},
            sum(trained(*row) for row in rows),
        )
        for rate, rows in rates.items()
    ]
    return max(found, key=lambda cell: cell.mean)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    every = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every) + "\n"


LEGEND = """\
Final validation accuracy, mean of the seeds; in brackets how many of them were trained,
and the arm's learning rate. Differences are paired, with the 95 % interval of the mean.
"""


def table(rows: Rows, axes: Sequence[str]) -> str:
    """A line per combination of the axes: every arm, and its gain over the first."""
    found = cells(rows, axes)
    arms = [arm for arm in ARMS if any(trial.arm == arm for trial, _ in rows)]
    header = [*axes, *arms, *(f"{arm} - {arms[0]}" for arm in arms[1:])]
    lines = []
    for place in found:
        of_arms = found[place]
        line = [_value(value) for value in place]
        line += [_text(of_arms[arm]) if arm in of_arms else "" for arm in arms]
        line += [_difference(of_arms, arm, arms[0]) for arm in arms[1:]]
        lines.append(line)
    return f"{LEGEND}\n{markdown(header, lines)}"


MEASURED = (
    *("h_min", "h_out", "rank_out", "cosine_out"),
    *("gradient_first", "gradient_last", "gradient_max"),
)


def measurements(rows: Rows, axes: Sequence[str]) -> str:
    """A line per combination of the axes: nets that were not trained, medians of seeds.

    Of the hidden layers the least entropy, and the last one's entropy, effective rank
    and mean cosine; the norm of the gradient of the first, last and greatest kernel.
    """
    places: dict[tuple, list[dict[str, float]]] = {}
    for trial, outcome in rows:
        place = tuple(getattr(trial, axis) for axis in axes)
        places.setdefault(place, []).append(outcome)
    header = [*axes, *MEASURED]
    lines = []
    for place, outcomes in sorted(places.items()):
        values = [
            np.median([outcome[f"{name}_last"] for outcome in outcomes])
            for name in MEASURED
        ]
        lines.append([*map(str, place), *(f"{value:.2g}" for value in values)])
    return markdown(header, lines)


def _value(value: str | float) -> str:
    """A place on an axis; of learning rates, which are small, one digit."""
    if isinstance(value, str):
        return value
    if 0 < value < 0.1:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:g}"


def _text(cell: Cell) -> str:
    count = len(cell.accuracies)
    return f"{cell.mean:.3f} ({cell.trained}/{count}, {cell.learning_rate:.0e})"


def _difference(arms: dict[str, Cell], arm: str, base: str) -> str:
    if arm not in arms or base not in arms:
        return ""
    of_base = arms[base].accuracies
    pairs = [v - of_base[s] for s, v in arms[arm].accuracies.items() if s in of_base]
    if not pairs:
        return ""
    text = f"{np.mean(pairs):+.3f}"
    if len(pairs) > 1:
        low, high = mean_interval(pairs)
        text += f" [{low:+.3f}, {high:+.3f}]"
    return text


def trainable_depths(rows: Rows, chosen: Callable[[Trial], bool]) -> dict[str, int]:
    """For each activation the largest depth at which 80 % of the seeds train.

    With the best of the initializers and learning rates that `chosen` lets through.
    """
    found = cells(
        [row for row in rows if chosen(row[0])],
        ("activation", "initializer", "arm", "depth"),
    )
    depths: dict[str, int] = {}
    for (activation, _, arm, depth), arms in found.items():
        depths.setdefault(activation, 0)
        if arms[arm].trains:
            depths[activation] = max(depths[activation], depth)
    return depths


def draw(rows: Rows, path: pathlib.Path, y: str, x: str, panel: str) -> None:
    """Draws accuracies over two axes: without LBE, with it, and the difference."""
    found = cells(rows, (panel, y, x))
    panels = list(dict.fromkeys(place[0] for place in found))
    figure = Figure(figsize=(11, 0.6 + 1.9 * len(panels)), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(panels), 3, squeeze=False))
    images = []
    for row, name in enumerate(panels):
        places = [place for place in found if place[0] == name]
        ys = list(dict.fromkeys(place[1] for place in places))
        xs = sorted({place[2] for place in places})
        values = np.full((3, len(ys), len(xs)), np.nan)
        for place in places:
            at = ys.index(place[1]), xs.index(place[2])
            for layer, arm in enumerate(("none", "lbe")):
                if arm in found[place]:
                    values[layer][at] = found[place][arm].mean
        values[2] = values[1] - values[0]
        for column, title in enumerate(("without LBE", "with LBE", "difference")):
            one = axes[row, column]
            limits = (
                {"vmin": -1, "vmax": 1, "cmap": "RdBu"}
                if column == 2
                else {"vmin": 0, "vmax": 1, "cmap": "viridis"}
            )
            images.append(one.imshow(values[column], aspect="auto", **limits))
            one.set_xticks(range(len(xs)), [_value(each) for each in xs])
            one.set_yticks(range(len(ys)), [str(each) for each in ys])
            if column:
                one.set_yticklabels([])
            for (i, j), value in np.ndenumerate(values[column]):
                if np.isfinite(value):
                    dark = value < 0.5 if column < 2 else abs(value) > 0.6
                    one.text(
                        *(j, i, f"{round(value, 2) + 0.0:.2f}"),  # no -0.00
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if dark else "black",
                    )
            one.set_title(f"{name}, {title}" if column == 0 else title, fontsize=9)
    for one in axes[-1]:
        one.set_xlabel(x.replace("_", " "))
    figure.colorbar(images[0], ax=axes[:, :2], label="final validation accuracy")
    figure.colorbar(images[2], ax=axes[:, 2])
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


FEATURES = ("h_min", "rank_out", "gradient_first", "gradient_max")


def prediction(rows: Rows, held_out: str, steps: Sequence[int] = (0, 50)) -> dict:
    """How well measurements of the first steps tell which nets will be trained.

    A logistic regression on the logarithms of `FEATURES` is fitted to the trials of the
    other activations and asked about those of one that it has not seen.

    Args:
        rows: trials of several activations.
        held_out: the activation to predict.
        steps: when the features were measured.

    Returns:
        `auc`, and `auc_entropy` of the least entropy alone, in the same way; and the
        number of `trials` and of the `trained` ones among them. NaN where all of the
        activation's trials, or all others, have the same end.
    """
    y = np.array([trained(*row) for row in rows])
    held = np.array([trial.activation == held_out for trial, _ in rows])
    result = {"trials": int(held.sum()), "trained": int(y[held].sum())}
    if len(set(y[held])) < 2 or len(set(y[~held])) < 2:
        return {**result, "auc": math.nan, "auc_entropy": math.nan}
    for name, features in (("auc", FEATURES), ("auc_entropy", ("h_min",))):
        x = np.array(
            [
                [outcome[f"{feature}_{step}"] for feature in features for step in steps]
                for _, outcome in rows
            ]
        )
        # What is not finite has exploded, and what is 0 has vanished.
        x = np.log10(np.clip(np.nan_to_num(x, nan=1e30), 1e-30, 1e30))
        model = make_pipeline(StandardScaler(), LogisticRegression())
        model.fit(x[~held], y[~held])
        result[name] = float(roc_auc_score(y[held], model.predict_proba(x[held])[:, 1]))
    return result
