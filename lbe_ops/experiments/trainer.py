# SPDX-License-Identifier: Apache-2.0
"""`Trainer`: runs the trials of the trainability map that share a graph.

Building and tracing hundreds of layers takes longer than training them for a thousand
steps. So a `Trainer` builds a net once, and each of its trials assigns the initial
weights, the learning rate and what its arm asks for, in one and the same graph: the
arms of a cell have the same weights and batches to the bit, and differ in the
coefficient of LBE alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lbe_ops.experiments import data as data_module
from lbe_ops.experiments import nets
from lbe_ops.experiments.settings import LSUV, Settings
from lbe_ops.experiments.trial import ARMS, Trial
from lbe_ops.measure import as_tensors, effective_rank, mean_cosine
from lbe_ops.ops import batch_entropy
from lbe_ops.targets import AT_LEAST, default_arguments

PROBE = 512  # samples that a net is measured on
MEASURED = (0, 50, 200)  # the steps before which it is, beside the last


class Trainer:
    """A net and the graph that trains it, for all trials that share them.

    Adam has one variable, of all the weights in a row: it is the same to the rounding
    as one for each weight, since neither Adam nor the limit of the norm of all
    gradients tells them apart, and it takes a third of the time at 100 layers.

    Args:
        trial: any of the trials.

    Attributes:
        net: the `LBEModel`, with the weights that the last trial has left.
        data: what it is trained on.
    """

    def __init__(self, trial: Trial) -> None:
        self.data = data_module.load(trial.data)
        self._x, self._y = as_tensors((self.data.x_train, self.data.y_train))
        self._validation = as_tensors((self.data.x_test, self.data.y_test))
        self._graph_of = trial.graph()
        # Of the trial that runs.
        self._rate = tf.Variable(0.0)
        self._steps = tf.Variable(1.0)
        self._alpha_trained = tf.Variable(1.0)
        self._strength = tf.Variable(0.0)
        self._until = tf.Variable(0.0)
        self._cosine = tf.Variable(0.0)
        self.net = self._network(trial, lbe=True)
        self.net.LBE_strength = _Schedule(self._strength_at)
        layer = keras.layers.Dense(1, trial.activation)
        self._default_alpha = default_arguments(layer)["lbe_alpha"]
        hidden = [
            layer for layer in self.net.layers if layer.name.startswith(nets.HIDDEN)
        ]
        self._features = keras.Model(
            self.net.input, [*(layer.output for layer in hidden), self.net.output]
        )
        self._kernels = nets.hidden_kernels(self.net)
        self._ce = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self._weights = self.net.trainable_variables
        self._sizes = [math.prod(each.shape) for each in self._weights]
        self._is_alpha = np.concatenate(
            [
                np.full(size, each is self.net.lbe_loss.alphas, np.float32)
                for each, size in zip(self._weights, self._sizes, strict=True)
            ]
        )
        self._vector = keras.Variable(np.zeros(sum(self._sizes), np.float32))
        self._adam = keras.optimizers.Adam(
            _Schedule(self._rate_at),
            epsilon=trial.epsilon,
            global_clipnorm=trial.global_clipnorm or None,
        )
        self._adam.build([self._vector])
        self.net.compile(self._adam, self._ce)
        self._train = tf.function(
            self._train_on,
            input_signature=[tf.TensorSpec([None, trial.batch_size], tf.int32)],
            autograph=False,
        )
        self._measure = tf.function(self._measure_now, autograph=False)
        self._score = tf.function(self._score_now, autograph=False)
        self._train(tf.zeros([0, trial.batch_size], tf.int32))  # traces, and no more

    def run(self, trial: Trial) -> dict[str, Any]:
        """Trains and returns the outcome: what a line of the CSV ends with.

        Args:
            trial: one with the `graph()` that this was made for.

        Returns:
            `train_ce`, `train_accuracy`, `val_ce`, `val_accuracy` after the last step,
            `seconds`, and for the steps of `MEASURED` and the last what `_summary`
            makes of the layers.
        """
        if trial.graph() != self._graph_of:
            raise ValueError(f"Another graph is needed. Received: {trial}")
        started = time.perf_counter()
        self._initialize(trial)
        batches = self.batches(trial)
        outcome: dict[str, Any] = {}
        done = 0
        for step in (*(s for s in MEASURED if s < trial.steps), trial.steps):
            if step > done:
                self._train(tf.constant(batches[done:step]))
                done = step
            name = "last" if step == trial.steps else str(step)
            outcome |= {
                f"{key}_{name}": value for key, value in self._summary().items()
            }
        scores: dict[str, Any] = {}
        for name, (x, y) in (("train", (self._x, self._y)), ("val", self._validation)):
            ce, accuracy = self._score(x, y)
            scores |= {f"{name}_ce": float(ce), f"{name}_accuracy": float(accuracy)}
        return {**scores, "seconds": time.perf_counter() - started, **outcome}

    def _network(self, trial: Trial, lbe: bool) -> keras.Model:
        return nets.network(
            self._settings(trial), self.data.shape, self.data.classes, lbe
        )

    def _settings(self, trial: Trial) -> Settings:
        names = (
            *("data", "model", "norm", "activation", "initializer"),
            *("depth", "width", "seed"),
        )
        lbe = {
            "lbe_variant": ARMS[trial.arm].variant,
            # Each arm sets its own.
            "lbe_alpha": AT_LEAST,
            "lbe_alpha_min": AT_LEAST,
        }
        return Settings(**{name: getattr(trial, name) for name in names}, **lbe)

    def _initialize(self, trial: Trial) -> None:
        """Gives all weights the values that `lbe-ops train` begins with."""
        fresh = self._network(trial, lbe=False)
        weights = [w for w in self.net.weights if w is not self.net.lbe_loss.alphas]
        for weight, value in zip(weights, fresh.weights, strict=True):
            weight.assign(value)
        for kernel in self._kernels:
            kernel.assign(trial.gain * kernel)
        if trial.initializer == LSUV:
            nets.scale_layers(self.net, self._x[:PROBE])
        arm = ARMS[trial.arm]
        alpha = self._default_alpha if arm.alpha is None else arm.alpha
        self.net.lbe_loss.alphas.assign(tf.fill(self.net.lbe_loss.alphas.shape, alpha))
        self._vector.assign(
            tf.concat([tf.reshape(each, [-1]) for each in self._weights], 0)
        )
        for variable in self._adam.variables:
            variable.assign(tf.zeros_like(variable))
        self._rate.assign(trial.learning_rate)
        self._steps.assign(float(trial.steps))
        self._alpha_trained.assign(float(arm.trained))
        self._strength.assign(arm.strength)
        self._until.assign(float(arm.until or math.inf))
        self._cosine.assign(float(arm.cosine))

    def batches(self, trial: Trial) -> np.ndarray:
        """Indices `[steps, batch]`, in every epoch in another order."""
        per_epoch = len(self._x) // trial.batch_size
        rows = [np.zeros([0, trial.batch_size], np.int32)]
        for epoch in range(-(-trial.steps // per_epoch)):
            order = np.random.default_rng((trial.seed, epoch)).permutation(len(self._x))
            used = order[: per_epoch * trial.batch_size]
            rows.append(used.reshape(per_epoch, trial.batch_size))
        return np.concatenate(rows)[: trial.steps].astype(np.int32)

    def _train_on(self, batches: tf.Tensor) -> None:
        def step(number: tf.Tensor) -> tf.Tensor:
            self._train_step(batches[number])
            return number + 1

        count = tf.shape(batches)[0]
        tf.while_loop(lambda number: number < count, step, [0])

    def _train_step(self, indices: tf.Tensor) -> None:
        x, y = tf.gather(self._x, indices), tf.gather(self._y, indices)
        with tf.GradientTape() as tape:
            logits = self.net(x, training=True)
            loss = self.net.compute_loss(x, y, logits)
        gradients = tape.gradient(loss, self._weights)
        gradient = tf.concat([tf.reshape(each, [-1]) for each in gradients], 0)
        gradient *= 1 + self._is_alpha * (self._alpha_trained - 1)
        self._adam.apply([gradient], [self._vector])
        parts = tf.split(self._vector.value, self._sizes)
        for weight, part in zip(self._weights, parts, strict=True):
            weight.assign(tf.reshape(part, weight.shape))

    def _rate_at(self, step: tf.Tensor) -> tf.Tensor:
        return self._rate * self._half_cosine(step)

    def _strength_at(self, step: tf.Tensor) -> tf.Tensor:
        strength = self._strength * tf.cast(step < self._until, tf.float32)
        return strength * (1 + self._cosine * (self._half_cosine(step) - 1))

    def _half_cosine(self, step: tf.Tensor) -> tf.Tensor:
        return (1 + tf.cos(math.pi * step / self._steps)) / 2

    def _score_now(self, x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        logits = self.net(x)
        right = tf.equal(tf.argmax(logits, -1, tf.int32), y)
        return self._ce(y, logits), tf.reduce_mean(tf.cast(right, tf.float32))

    def _measure_now(self) -> tuple[tf.Tensor, ...]:
        x, y = self._x[:PROBE], self._y[:PROBE]
        kernels = [kernel.value for kernel in self._kernels]
        with tf.GradientTape() as tape:
            *hidden, logits = self._features(x)
            ce = self._ce(y, logits)
        gradients = tape.gradient(ce, kernels)
        return (
            tf.stack([batch_entropy(each) for each in hidden]),
            tf.stack([effective_rank(each) for each in hidden]),
            tf.stack([mean_cosine(each) for each in hidden]),
            tf.stack([tf.norm(each) for each in gradients]),
        )

    def _summary(self) -> dict[str, float]:
        """The least entropy and rank of a layer, the last layer's, and gradients.

        The norms of the gradients of the hidden kernels are those of the first, of the
        last and the greatest.
        """
        entropy, rank, cosine, norms = (each.numpy() for each in self._measure())
        return {
            "h_min": float(entropy.min()),
            "h_out": float(entropy[-1]),
            "rank_min": float(rank.min()),
            "rank_out": float(rank[-1]),
            "cosine_out": float(cosine[-1]),
            "gradient_first": float(norms[0]),
            "gradient_last": float(norms[-1]),
            "gradient_max": float(norms.max()),
        }


class _Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A function of the step whose numbers are variables: one graph serves trials."""

    def __init__(self, function: Callable[[tf.Tensor], tf.Tensor]) -> None:
        self._function = function

    def __call__(self, step: Any) -> tf.Tensor:
        return self._function(tf.cast(step, tf.float32))
