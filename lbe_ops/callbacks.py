# SPDX-License-Identifier: Apache-2.0
"""`BatchEntropyLogger`: every layer's batch entropy on a fixed batch, each epoch.

To the history and the logs, to a CSV file, to TensorBoard, and drawn over depth and
over time. It works on any Keras model, with and without LBE.
"""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lbe_ops import ops
from lbe_ops.layers import Selection, select_layers
from lbe_ops.loss import find_regularizers

Path = str | os.PathLike


class BatchEntropyLogger(keras.callbacks.Callback):
    """Logs the batch entropy H of each layer on a probe batch after every epoch.

    The logs (and so the progress bar, the History and CSVLogger) get three values:
    `h_avg` (mean over layers), `h_out` (the last layer) and `h_positive` (number of
    layers with H > 0). The H of every layer, in nats, stand in `values`, in
    `history.history["batch_entropy"]` (one list per epoch), and in what `csv`,
    `tensorboard` and `plot` name.

    The probe is a forward pass for inference (`training=False`), compiled once: it
    changes no weight, no statistics and no random state.

    Args:
        data: the probe batch: inputs of the model for at least two samples, as an
            array (or the structure of arrays that the model takes).
        layers: which layers, as for `add_lbe`. None takes the layers with LBE; in a
            model that has none, every layer with a kernel.
        csv: file to append a line per epoch to: epoch, h_avg, h_out, h_positive, and
            H of each layer.
        tensorboard: folder for `tf.summary` scalars.
        plot: image file to draw at the end of training; needs matplotlib.
        ddof, scale, offset: as for `lbe_ops.batch_entropy`.

    Attributes:
        names: path of each layer observed, in the order of the forward pass; a layer
            that is called more than once appears more than once.
        epochs: the epochs logged.
        values: `[epochs][layers]` floats.

    Raises:
        ValueError: no layer matches, or none is called by the model; or the CSV file
            has other columns.

    Example:

    >>> logger = BatchEntropyLogger(x_val[:512], csv="entropy.csv", plot="entropy.png")
    >>> model.fit(x, y, callbacks=[logger])
    """

    def __init__(
        self,
        data: Any,
        layers: Selection | None = None,
        *,
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
        self.values: list[list[float]] = []
        self._data = keras.tree.map_structure(tf.convert_to_tensor, data)
        if not (layers is None or callable(layers) or isinstance(layers, str | tuple)):
            layers = list(layers)  # an iterator serves once
        self._layers = layers
        self._csv = csv
        self._tensorboard = tensorboard
        self._plot = plot
        self._formula = ops.check_formula(ddof, scale, offset)
        self._probe: Callable[[Any], tf.Tensor] | None = None
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
        if self.model is None:
            raise ValueError(
                "measure() needs a model: pass the logger to fit(), or call "
                "set_model(model) before. Received: no model"
            )
        if self._probe is None:
            self._probe = (
                self._entropies
                if self.model.run_eagerly
                else tf.function(self._entropies, autograph=False)
            )
        return self._probe(self._data).numpy()

    def _entropies(self, data: Any) -> tf.Tensor:
        names, entropies = [], []

        def observer(layer: keras.layers.Layer) -> Callable[[tf.Tensor], tf.Tensor]:
            def observe(x: tf.Tensor) -> tf.Tensor:
                names.append(layer.path or layer.name)
                entropies.append(
                    tf.cast(ops.batch_entropy(x, **self._formula), tf.float32)
                )
                return tf.zeros(())

            return observe

        observed = self._observed()
        places = [_place_of_regularizer(layer) for layer in observed]
        regularizers = [
            vars(layer)[place] for layer, place in zip(observed, places, strict=True)
        ]
        try:
            # Past __setattr__: the layers' own regularizers stay tracked.
            for layer, place in zip(observed, places, strict=True):
                vars(layer)[place] = observer(layer)
            self.model(data, training=False)
        finally:
            for layer, place, regularizer in zip(
                observed, places, regularizers, strict=True
            ):
                vars(layer)[place] = regularizer
        if not entropies:
            raise ValueError(
                "The model calls none of the layers to observe. Received: layers="
                f"{[layer.name for layer in observed]}"
            )
        self.names = names
        return tf.stack(entropies)

    def _observed(self) -> list[keras.layers.Layer]:
        if self._layers is not None:
            return select_layers(self.model, self._layers)
        lbe = find_regularizers(self.model)
        with_lbe = [layer for layers in lbe.values() for layer in layers]
        return with_lbe or select_layers(
            self.model, lambda layer: getattr(layer, "kernel", None) is not None
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures, and writes to everything that was asked for."""
        values = self.measure()
        self.epochs.append(epoch)
        self.values.append(values.tolist())
        summary = {
            "h_avg": float(values.mean()),
            "h_out": float(values[-1]),
            "h_positive": int((values > 0).sum()),
        }
        if logs is not None:
            logs.update(summary)
        history = getattr(self.model, "history", None)
        if history is not None:
            history.history.setdefault("batch_entropy", []).append(self.values[-1])
        if self._csv is not None:
            self._append_csv({"epoch": epoch, **summary})
        if self._tensorboard is not None:
            self._summarize(epoch, summary)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Draws, and closes what is open."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._plot is not None and self.values:
            self.plot(self._plot)

    def _append_csv(self, summary: dict[str, Any]) -> None:
        path = pathlib.Path(self._csv)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = [*summary, *self.names]
        with path.open("a+", newline="") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
            if header not in (None, columns):
                raise ValueError(
                    f"{path} has other columns than these layers need: {columns}. "
                    "Write to another file, or give the layers the names that they "
                    f"had. Received: a file with the columns {header}"
                )
            writer = csv.writer(file)
            if header is None:
                writer.writerow(columns)
            writer.writerow([*summary.values(), *self.values[-1]])

    def _summarize(self, epoch: int, summary: dict[str, Any]) -> None:
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(os.fspath(self._tensorboard))
        with self._writer.as_default(step=epoch):
            for name, value in summary.items():
                tf.summary.scalar(f"batch_entropy/{name}", value)
            for name, value in zip(self.names, self.values[-1], strict=True):
                tf.summary.scalar(f"batch_entropy/layers/{name}", value)
        self._writer.flush()

    def plot(self, path: Path) -> None:
        """Draws H over depth (first to last epoch) and over time, to an image file.

        The file appears as a whole or not at all.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing has been logged yet.
        """
        if not self.values:
            raise ValueError("Nothing to draw yet. Received: 0 epochs")
        from matplotlib.figure import Figure

        values = np.asarray(self.values)  # [epochs, layers]
        figure = Figure(figsize=(11, 4), layout="constrained")
        depth, time = figure.subplots(1, 2)
        chosen = sorted({0, len(values) // 2, len(values) - 1})
        for row in chosen:
            depth.plot(
                range(1, values.shape[1] + 1),
                values[row],
                marker="." if values.shape[1] < 50 else None,
                label=f"epoch {self.epochs[row] + 1}",
            )
        depth.set(xlabel="layer", ylabel="batch entropy H (nats)", title="over depth")
        depth.legend()
        image = time.imshow(
            values.T,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            extent=(0.5, len(values) + 0.5, 0.5, values.shape[1] + 0.5),
        )
        time.set(xlabel="epoch logged", ylabel="layer", title="over time")
        figure.colorbar(image, ax=time, label="H (nats)")

        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            figure.savefig(temporary, dpi=120, format=path.suffix[1:] or "png")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _place_of_regularizer(layer: keras.layers.Layer) -> str:
    """The attribute that holds a layer's activity regularizer."""
    here = "activity_regularizer" in vars(layer)
    return "activity_regularizer" if here else "lbe_regularizer"  # of layers.py
