# SPDX-License-Identifier: Apache-2.0
"""Training one net, epoch by epoch, so that it can stop and go on at any of them."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from lbe_ops.experiments import nets
from lbe_ops.experiments.data import Data
from lbe_ops.experiments.results import NetFolder, Progress
from lbe_ops.experiments.settings import LSUV, Settings
from lbe_ops.experiments.tasks import task_of
from lbe_ops.model import LossLogs

# Measured on 2 cores; only for telling the user how long to wait.
SECONDS_PER_LAYER = {False: 0.07, True: 0.12}

# Factors of the learning rate, by the share of the epochs that are done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "decay": lambda done: min(1.0, (1 - done) / 0.4),
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def train(
    settings: Settings,
    data: Data,
    folder: NetFolder,
    lbe: bool,
    say: Callable[[str], None],
    *,
    strategy: tf.distribute.Strategy | None = None,
    write: bool = True,
    resume: bool = True,
) -> None:
    """Trains a net to its last epoch, from where an earlier call left it.

    The order of the samples is a function of the seed and the epoch, and everything
    else that an epoch depends on is saved after each, so that a training interrupted
    anywhere ends with the same numbers as one that was not.

    Args:
        settings: what to train.
        data: what to train on; the test set validates.
        folder: where the results are, and go.
        lbe: with LBE or without.
        say: called with each line of progress.
        strategy: spreads each batch over replicas, with the numbers of one device.
        write: whether this process writes the results, of several workers one.
        resume: whether to go on from what the folder holds.
    """
    spread = strategy is not None
    with strategy.scope() if spread else contextlib.nullcontext():
        net = nets.build(settings, data.shape, data.classes, lbe, spread)
    task = task_of(settings)
    # An epoch has the seeds (seed, epoch), which NumPy completes with zeros.
    validation = task.pair(
        data.x_test, data.y_test, np.random.default_rng((settings.seed, 0, 1))
    )
    sample = keras.tree.map_structure(
        lambda array: array[: settings.batch_size], validation[0]
    )
    if settings.initializer == LSUV:
        nets.scale_layers(net, sample)
    entropies = nets.entropies(net, sample)
    before = entropies()
    progress = folder.restore(net) if resume else Progress()
    plateau = _plateau(settings, net, progress)
    first = len(progress.rows)
    if first:
        say(f"resuming after epoch {first}")
    if first < settings.epochs:
        seconds = settings.depth * SECONDS_PER_LAYER[lbe]
        say(
            f"building and tracing the graph of {settings.depth} layers, about "
            f"{duration(max(seconds, 1))}; then a line per epoch, training/validation"
        )
    callback = _FirstStep(say)
    for epoch in range(first, settings.epochs):
        started = time.perf_counter()
        if settings.schedule in SCHEDULES:
            factor = SCHEDULES[settings.schedule](epoch / settings.epochs)
            net.optimizer.learning_rate = settings.learning_rate * factor
        generator = np.random.default_rng((settings.seed, epoch))
        order = generator.permutation(len(data.x_train))
        history = net.fit(
            *task.pair(data.x_train[order], data.y_train[order], generator),
            batch_size=settings.batch_size,
            shuffle=False,
            validation_data=validation,
            verbose=0,
            callbacks=[callback],
        ).history
        logs = {name: values[0] for name, values in history.items()}
        if not lbe:  # what an LBEModel without LBE logs of it
            for name in LossLogs.NAMES:
                logs.pop(name, None), logs.pop(f"val_{name}", None)
        logs.setdefault("ce", logs["loss"])
        logs.setdefault("val_ce", logs["val_loss"])
        logs["learning_rate"] = float(net.optimizer.learning_rate.numpy())
        if plateau is not None:
            plateau.on_epoch_end(epoch, logs)
            progress.plateau = {"best": plateau.best, "wait": plateau.wait}
        logs["seconds"] = round(time.perf_counter() - started, 3)
        progress.rows.append({"epoch": epoch + 1, **logs})
        if write:
            folder.save(net, progress)
        # The first epoch of a process has traced the graph.
        timed = [row["seconds"] for row in progress.rows[first + 1 :]]
        say(_line(progress.rows[-1], settings.epochs, task.score, timed))
    if write:
        folder.write_history(progress.rows)
        folder.finish(net, before, entropies())


class _FirstStep(keras.callbacks.Callback):
    """Says how long the first step took, which is mostly tracing."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.say = say
        self.started = time.perf_counter()
        self.done = False

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if not self.done:
            self.done = True
            seconds = time.perf_counter() - self.started
            self.say(f"first step done after {duration(seconds)}")


def _plateau(
    settings: Settings, net: keras.Model, progress: Progress
) -> keras.callbacks.ReduceLROnPlateau | None:
    """The callback that reduces the learning rate, in the state it was left in."""
    if not settings.reduce_lr:
        return None
    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="val_loss",
        mode="min",
        patience=settings.reduce_lr_patience,
        factor=settings.reduce_lr_factor,
        min_lr=settings.reduce_lr_min,
    )
    plateau.set_model(net)
    plateau.on_train_begin()
    for name, value in progress.plateau.items():
        setattr(plateau, name, value)
    return plateau


def _line(row: dict, epochs: int, score: str, timed: list[float]) -> str:
    """An epoch, for people; `timed` has the seconds of those that tell what is left."""
    width = len(str(epochs))
    parts = [f"epoch {row['epoch']:{width}}/{epochs}"]
    for key, digits in ((score, 3), ("ce", 4), ("lbe", 4)):
        if key in row:
            training, validation = row[key], row[f"val_{key}"]
            parts.append(f"{key} {training:.{digits}f}/{validation:.{digits}f}")
    parts.append(f"{row['seconds']:.1f} s")
    left = epochs - row["epoch"]
    if left and timed:
        parts.append(f"({duration(left * statistics.median(timed[-5:]))} left)")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """About so long, for people."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min"
