# SPDX-License-Identifier: Apache-2.0
"""The four plots of the TensorFlow port, and entropy over depth."""

from __future__ import annotations

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lbe_ops.experiments.results import NETS, RunFolder, replacing
from lbe_ops.experiments.tasks import Classification, Reconstruction

COLOURS = {"with_lbe": "tab:blue", "without_lbe": "tab:orange"}


def draw(
    folder: RunFolder, chance: float, task: Classification | Reconstruction
) -> None:
    """Draws what the folder holds, training and validation on the same axes.

    Args:
        folder: the run; the plots go there.
        chance: the score by chance, for a line to compare with.
        task: what the nets learn; it says what is drawn.

    Raises:
        OSError: a file cannot be read or written.
    """
    histories = {net: folder.net(net).history() for net in NETS}
    for name, (key, title, label) in task.curves.items():
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for net, rows in histories.items():
            for prefix, style in (("", "--"), ("val_", "-")):
                if rows and prefix + key in rows[0]:
                    axes.plot(
                        [row["epoch"] for row in rows],
                        [row[prefix + key] for row in rows],
                        style,
                        color=COLOURS[net],
                        label=_label(net, "validation" if prefix else "training"),
                    )
        if key == task.score:
            axes.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
            axes.set_ylim(task.limits)
        if key in ("lbe", "max_lbe"):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        if axes.lines:
            _save(folder, name, axes, title, "epoch", label)
    _draw_entropies(folder)


def _draw_entropies(folder: RunFolder) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    # The entropies of a net that passes nothing on fall over many decades.
    axes.set_yscale("symlog", linthresh=1e-6)
    for number, net in enumerate(NETS):
        # The nets begin alike: the dashes of one are in the gaps of the other.
        dashes = (4 * number, (4, 4))
        if folder.net(net).weights.exists():
            entropies = folder.net(net).entropies()
            for when, style in (("before", dashes), ("after", "-")):
                axes.plot(
                    range(1, len(entropies[when]) + 1),
                    entropies[when],
                    linestyle=style,
                    color=COLOURS[net],
                    label=_label(net, f"{when} training"),
                )
    if axes.lines:
        _save(folder, "entropy", axes, "Entropy over depth", "layer", "entropy [nats]")


def _label(net: str, what: str) -> str:
    return f"{net.replace('_lbe', ' LBE')}, {what}"


def _save(folder: RunFolder, name: str, axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(folder.path / f"{name}.png") as temporary:
        axes.figure.savefig(temporary, dpi=120)
