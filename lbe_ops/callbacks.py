# SPDX-License-Identifier: Apache-2.0
"""`BatchEntropyLogger`: entropy, rank and more of every layer on a batch, each epoch.

To the history and the logs, to a CSV file, to TensorBoard, and drawn over depth and
over time. It works on any Keras model, with and without LBE.
"""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lbe_ops import ops
from lbe_ops.layers import Selection
from lbe_ops.measure import GRADIENT, Probe, as_tensors, check_measures

Path = str | os.PathLike
ENTROPY = "batch_entropy"
# How a picture names what it shows, and whether it can be negative.
LABELS = {
    ENTROPY: "batch entropy H (nats)",
    "effective_rank": "effective rank",
    "mean_cosine": "mean cosine",
    "rms": "root mean square",
    "deviation": "deviation from the mean",
    "dead_share": "share of dead units",
    GRADIENT: "norm of the gradient",
}
# A scale is logarithmic where the largest value is this many times the smallest.
LOGARITHMIC = 10.0


class BatchEntropyLogger(keras.callbacks.Callback):
    """Logs how a probe batch goes through the layers, after every epoch.

    Of each layer the batch entropy H in nats, the effective rank and the mean cosine;
    with `targets` the norm of the gradient too (see `lbe_ops.measure.Probe`). H tells
    whether the samples differ at all, rank and cosine whether they differ in more than
    one direction, the gradient whether the layer can learn.

    The logs (and so the progress bar, the History and CSVLogger) get three values:
    `h_avg` (mean over layers), `h_out` (the last layer) and `h_positive` (number of
    layers with H > 0). What was measured of every layer stands in `values` (H) and
    `measured` (all), in `history.history["batch_entropy"]`, `["effective_rank"]` and so
    on (one list per epoch), and in what `csv`, `tensorboard` and `plot` name.

    The probe is a forward pass for inference (`training=False`), compiled once: it
    changes no weight, no statistics and no random state.

    Args:
        data: the probe batch: inputs of the model for at least two samples, as an
            array (or the structure of arrays that the model takes).
        layers: which layers, as for `add_lbe`. None takes the layers with LBE; in a
            model that has none, every layer with a kernel.
        measures: what is logged beside the entropy, of `lbe_ops.measure.MEASURES`:
            effective_rank, mean_cosine, rms, deviation, dead_share. `()` for the
            entropy alone. Of 500 layers x 64 and 512 samples, the two by default take
            0.25 s an epoch beside 0.18 s for the entropy (two busy CPU cores).
        targets: of the probe batch. Adds gradient_norm: the gradient of the compiled
            loss, without LBE, by the weights of each layer. A backward pass an epoch.
        csv: file to append a line per epoch to: epoch, h_avg, h_out, h_positive, H of
            each layer, and then, in columns "layer/measure", everything else. A file
            that has entropies alone (of an earlier version) goes on as it is.
        tensorboard: folder for `tf.summary` scalars.
        plot: image file to draw at the end of training; needs matplotlib.
        ddof, scale, offset: as for `lbe_ops.batch_entropy`.

    Attributes:
        names: path of each layer observed, in the order of the forward pass; a layer
            that is called more than once appears more than once: "dense", "dense (2)".
        epochs: the epochs logged.
        values: H, `[epochs][layers]` floats.
        measured: the same for every measure, by its name; `values` is one of them.

    Raises:
        ValueError: no layer matches, or none is called by the model; an unknown
            measure; or the CSV file has other columns.

    Example:

    >>> logger = BatchEntropyLogger(x_val[:512], csv="health.csv", plot="health.png")
    >>> model.fit(x, y, callbacks=[logger])
    """

    def __init__(
        self,
        data: Any,
        layers: Selection | None = None,
        *,
        measures: Iterable[str] = ("effective_rank", "mean_cosine"),
        targets: Any = None,
        csv: Path | None = None,
        tensorboard: Path | None = None,
        plot: Path | None = None,
        ddof: int = 0,
        scale: float = ops.SCALE,
        offset: float = ops.OFFSET,
    ) -> None:
        super().__init__()
        self.names: list[str] = []
        self.epochs: list[int] = []
        measures = check_measures({ENTROPY, *check_measures(measures)})
        names = measures if targets is None else (*measures, GRADIENT)
        self.measured: dict[str, list[list[float]]] = {name: [] for name in names}
        self.values = self.measured[ENTROPY]
        self._data = as_tensors(data)
        if not (layers is None or callable(layers) or isinstance(layers, str | tuple)):
            layers = list(layers)  # an iterator serves once
        self._layers = layers
        self._csv = csv
        self._tensorboard = tensorboard
        self._plot = plot
        self._options = {
            "measures": measures,
            "targets": None if targets is None else as_tensors(targets),
            **ops.check_formula(ddof, scale, offset),
        }
        self._probe: Probe | None = None
        self._writer: tf.summary.SummaryWriter | None = None

    def set_model(self, model: keras.Model) -> None:
        """Called by Keras; another model gets a probe of its own."""
        if model is not self.model:
            self._probe = None
        super().set_model(model)

    def measure(self) -> np.ndarray:
        """H of every observed layer now, `[layers]`.

        Raises:
            ValueError: there is no model yet, or no layer to observe.
        """
        return self._measure()[ENTROPY]

    def _measure(self) -> dict[str, np.ndarray]:
        if self.model is None:
            raise ValueError(
                "measure() needs a model: pass the logger to fit(), or call "
                "set_model(model) before. Received: no model"
            )
        if self._probe is None:
            self._probe = Probe(self.model, self._data, self._layers, **self._options)
        measured = self._probe()
        self.names = self._probe.names
        return measured

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures, and writes to everything that was asked for."""
        measured = self._measure()
        values = measured[ENTROPY]
        self.epochs.append(epoch)
        for name, rows in self.measured.items():
            rows.append(measured[name].tolist())
        summary = {
            "h_avg": float(values.mean()),
            "h_out": float(values[-1]),
            "h_positive": int((values > 0).sum()),
        }
        if logs is not None:
            logs.update(summary)
        history = getattr(self.model, "history", None)
        if history is not None:
            for name, rows in self.measured.items():
                history.history.setdefault(name, []).append(rows[-1])
        if self._csv is not None:
            self._append_csv(pathlib.Path(self._csv), {"epoch": epoch, **summary})
        if self._tensorboard is not None:
            self._summarize(os.fspath(self._tensorboard), epoch, summary)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Draws, and closes what is open."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._plot is not None and self.values:
            self.plot(self._plot)

    def _append_csv(self, path: pathlib.Path, summary: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        columns, row = list(summary), list(summary.values())
        for measure, rows in self.measured.items():
            suffix = "" if measure == ENTROPY else f"/{measure}"
            columns += [name + suffix for name in self.names]
            row += rows[-1]
        only_entropy = columns[: len(summary) + len(self.names)]
        with path.open("a+", newline="") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
            if header not in (None, columns, only_entropy):
                raise ValueError(
                    f"{path} has other columns than these layers need: {columns}. "
                    "Write to another file, or give the layers the names that they "
                    f"had. Received: a file with the columns {header}"
                )
            writer = csv.writer(file)
            if header is None:
                writer.writerow(columns)
            writer.writerow(row[: len(header or columns)])

    def _summarize(self, folder: str, epoch: int, summary: dict[str, Any]) -> None:
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(folder)
        with self._writer.as_default(step=epoch):
            for name, value in summary.items():
                tf.summary.scalar(f"batch_entropy/{name}", value)
            for measure, rows in self.measured.items():
                for name, value in zip(self.names, rows[-1], strict=True):
                    tf.summary.scalar(f"{measure}/layers/{name}", value)
        self._writer.flush()

    def plot(self, path: Path) -> None:
        """Draws all that was measured, to an image file.

        A row of panels for each measure: over depth (first to last epoch) and over
        time. Scales are logarithmic where values span decades. The file appears as a
        whole or not at all.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing has been logged yet.
        """
        if not self.values:
            raise ValueError("Nothing to draw yet. Received: 0 epochs")
        from matplotlib.figure import Figure

        size = (11, 1 + 3 * len(self.measured))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(self.measured), 2, squeeze=False)
        for row, (name, values) in zip(panels, self.measured.items(), strict=True):
            self._draw(row[0], row[1], np.asarray(values), LABELS[name])
        panels[0, 0].legend()

        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            figure.savefig(temporary, dpi=120, format=path.suffix[1:] or "png")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _draw(self, depth: Any, time: Any, values: np.ndarray, label: str) -> None:
        """Draws `[epochs, layers]` over depth and over time."""
        from matplotlib.colors import LogNorm, Normalize

        shown = np.isfinite(values)
        positive = values[shown & (values > 0)]
        logarithmic = (
            not (values < 0).any()
            and positive.size > 0
            and positive.max() > LOGARITHMIC * positive.min()
        )
        if logarithmic:
            shown &= values > 0
            depth.set_yscale("log")
        values = np.ma.masked_array(values, ~shown)  # stays blank
        for epoch in sorted({0, len(values) // 2, len(values) - 1}):
            depth.plot(
                range(1, values.shape[1] + 1),
                values[epoch],
                marker="." if values.shape[1] < 50 else None,
                label=f"epoch {self.epochs[epoch] + 1}",
            )
        depth.set(xlabel="layer", ylabel=label, title=f"{label}, over depth")
        image = time.imshow(
            values.T,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            norm=(LogNorm if logarithmic else Normalize)(),
            extent=(0.5, len(values) + 0.5, 0.5, values.shape[1] + 0.5),
        )
        time.set(xlabel="epoch logged", ylabel="layer", title=f"{label}, over time")
        time.figure.colorbar(image, ax=time)
