# SPDX-License-Identifier: Apache-2.0
"""`lbe-ops train --dry-run`: what a training takes, measured in its first steps.

Memory and time depend on the machine and on how TensorFlow lays out a graph: so the
nets are built and traced as in the training, make a few steps, and are thrown away.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from typing import Any

import keras
import numpy as np

from lbe_ops.experiments import nets
from lbe_ops.experiments.data import Data
from lbe_ops.experiments.settings import Settings
from lbe_ops.experiments.tasks import task_of

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

STEPS = 3  # in each of two short epochs, of which the first one traces


@dataclasses.dataclass(frozen=True)
class Cost:
    """What training a net takes.

    Attributes:
        parameters: the numbers that are trained.
        saved_bytes: the size of a checkpoint, of which two are there for a while.
        start_seconds: for building the net and tracing its graph.
        epoch_seconds: for an epoch, with validation.
    """

    parameters: int
    saved_bytes: int
    start_seconds: float
    epoch_seconds: float


def measure(settings: Settings, data: Data, lbe: bool) -> Cost:
    """Builds a net and makes a few steps on one device.

    Args:
        settings: what would be trained.
        data: what it would be trained on.
        lbe: with LBE or without.

    Raises:
        MemoryError: there is not enough for it.
        tensorflow.errors.ResourceExhaustedError: likewise.
    """
    started = time.perf_counter()
    net = nets.build(settings, data.shape, data.classes, lbe)
    task, generator = task_of(settings), np.random.default_rng(0)
    per_call = settings.batch_size * settings.steps_per_execution
    size = STEPS * per_call
    inputs, targets = task.pair(data.x_train[:size], data.y_train[:size], generator)
    times = _Times()
    net.fit(
        inputs,
        targets,
        batch_size=settings.batch_size,
        epochs=2,
        shuffle=False,
        validation_data=task.pair(data.x_test[:size], data.y_test[:size], generator),
        verbose=0,
        callbacks=[times],
    )
    return Cost(
        parameters=sum(math.prod(each.shape) for each in net.trainable_variables),
        saved_bytes=sum(
            math.prod(variable.shape) * np.dtype(variable.dtype).itemsize
            for variable in [*net.weights, *net.optimizer.variables]
        ),
        start_seconds=times.first_epoch - started,
        epoch_seconds=sum(
            math.ceil(len(x) / per_call) * _typical(seconds)
            for x, seconds in (
                (data.x_train, times.training),
                (data.x_test, times.validation),
            )
        ),
    )


def memory() -> int | None:
    """The most bytes that this process has had in memory; None where nobody knows."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _typical(seconds: list[float]) -> float:
    """That of the second epoch."""
    return statistics.median(seconds[len(seconds) // 2 :])


class _Times(keras.callbacks.Callback):
    """How long each call into TensorFlow takes, and when the first epoch ends."""

    def __init__(self) -> None:
        super().__init__()
        self.training: list[float] = []
        self.validation: list[float] = []
        self.first_epoch = 0.0
        self._started = 0.0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.training.append(time.perf_counter() - self._started)

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._started = time.perf_counter()

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self.validation.append(time.perf_counter() - self._started)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == 0:
            self.first_epoch = time.perf_counter()
