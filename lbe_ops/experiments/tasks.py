# SPDX-License-Identifier: Apache-2.0
"""What a net learns from the data, and how well: its targets, loss, score and plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lbe_ops.experiments.data import Data
from lbe_ops.experiments.settings import Settings

# By file: the value drawn (its key in the history), a title, and a label of the axis.
Curves = dict[str, tuple[str, str, str]]
# CE is the loss without LBE, whatever it is, by which an LBEModel multiplies.
LBE_CURVES: Curves = {
    "LBE_loss": ("lbe", "Mean LBE over the layers x CE", "mean LBE x CE"),
    "Max_LBE_loss": ("max_lbe", "Maximal LBE of a layer x CE", "maximal LBE x CE"),
}


@dataclasses.dataclass(frozen=True)
class Classification:
    """The label of a sample, or of each of its positions.

    Attributes:
        score: the metric that counts, by its key in the history.
        best: which of two scores is the better one.
        limits: of the axis of its plot; None where it has none.
        by_chance: what `chance` is the score of, for people.
        curves: what is drawn over the epochs, the score first.
    """

    score: str = "accuracy"
    best: Callable[..., Any] = max
    limits: tuple[float, float] | None = (0, 1)
    by_chance: str = "validation accuracy by chance"
    curves: Curves = dataclasses.field(
        default_factory=lambda: {
            "accuracies": ("accuracy", "Accuracy", "accuracy"),
            "crossentropy": ("ce", "Cross-entropy", "cross-entropy [nats]"),
            **LBE_CURVES,
        }
    )

    def pair(
        self, x: np.ndarray, y: np.ndarray, generator: np.random.Generator
    ) -> tuple[Any, np.ndarray]:
        """Inputs and targets of a net, for samples of the data."""
        return x, y

    def loss(self) -> keras.losses.Loss:
        """What is minimized beside LBE."""
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def metrics(self) -> list[keras.metrics.Metric]:
        """What is logged; the score is among it."""
        return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]

    def chance(self, data: Data) -> float:
        """The best validation score of a net that answers always the same."""
        return data.chance


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The (flattened) input itself; attributes as of `Classification`.

    Attributes:
        noise: how many values of it a sample has as a second input; 0: none.
        kl_weight: factor of the last output, a divergence, in the loss.
    """

    noise: int = 0
    kl_weight: float = 0.0
    score: str = "mse"
    best: Callable[..., Any] = min
    limits: tuple[float, float] | None = None
    by_chance: str = "validation mse of the mean sample"
    curves: Curves = dataclasses.field(
        default_factory=lambda: {
            "reconstruction": ("mse", "Reconstruction error", "mean squared error"),
            "loss": ("ce", "Loss without LBE", "loss"),
            **LBE_CURVES,
        }
    )

    def pair(
        self, x: np.ndarray, y: np.ndarray, generator: np.random.Generator
    ) -> tuple[Any, np.ndarray]:
        """Inputs and targets of a net; the noise is part of the inputs.

        So the numbers do not depend on the devices that share a batch, and a training
        that goes on has no state of a generator to restore.
        """
        flat = x.reshape(len(x), -1)
        if not self.noise:
            return x, flat
        noise = generator.standard_normal((len(x), self.noise), np.float32)
        return [x, noise], flat

    def loss(self) -> keras.losses.Loss:
        """The mean squared error, and the divergence for each of the values in it.

        This is the squared error summed over the values plus `kl_weight` times the
        divergence, both divided by the number of values.
        """
        return _ReconstructionLoss(self.kl_weight)

    def metrics(self) -> list[keras.metrics.Metric]:
        """What is logged; the score is among it."""
        metrics = [keras.metrics.MeanMetricWrapper(_squared_error, name="mse")]
        if self.noise:
            metrics.append(keras.metrics.MeanMetricWrapper(_divergence, name="kl"))
        return metrics

    def chance(self, data: Data) -> float:
        """The best validation score of a net that answers always the same."""
        return float(data.x_test.var(axis=0, dtype=np.float64).mean())


def task_of(settings: Settings) -> Classification | Reconstruction:
    """What nets of these settings learn."""
    if settings.model == "autoencoder":
        return Reconstruction()
    if settings.model == "vae":
        return Reconstruction(noise=settings.latent, kl_weight=settings.kl_weight)
    return Classification()


class _ReconstructionLoss(keras.losses.Loss):
    def __init__(self, kl_weight: float) -> None:
        super().__init__(name="reconstruction")
        self.kl_weight = kl_weight

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """The loss of each sample."""
        loss = _squared_error(y_true, y_pred)
        if not self.kl_weight:
            return loss
        return loss + self.kl_weight / y_true.shape[-1] * _divergence(y_true, y_pred)


def _squared_error(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """That of each sample, without outputs that are no values of it."""
    values = y_pred[:, : y_true.shape[-1]]
    y_true = tf.cast(y_true, values.dtype)
    return keras.ops.mean(keras.ops.square(values - y_true), axis=-1)


def _divergence(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    return y_pred[:, -1]
