# SPDX-License-Identifier: Apache-2.0
"""What determines the numbers of an experiment, with presets and checks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import keras

from lbe_ops.experiments.errors import ExperimentError

MODELS = ("dense", "conv")
SCALINGS = ("unit", "symmetric")
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "decay", "cosine")
NATIVE_MODES = {"auto": None, "require": True, "never": False}
LOOKS_LINEAR = "looks_linear"  # see looks_linear.py
DTYPES = ("float32", "float64", "mixed_float16", "mixed_bfloat16")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that determines the numbers of a run; the defaults are `mnist`.

    The strength is that of `LBEModel`, which does not divide it by the batch size.
    """

    data: str = "mnist"
    scaling: str = "unit"
    model: str = "dense"
    depth: int = 500
    width: int = 128
    kernel_size: int = 3
    activation: str = "relu"
    initializer: str = LOOKS_LINEAR
    dtype: str = "float32"
    lbe_alpha: float = 3.0
    lbe_alpha_min: float = 0.3
    lbe_beta: float = 1.0
    lbe_strength: float = 0.003
    lbe_input: bool = False
    native: str = "auto"
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    beta_1: float = 0.9
    epsilon: float = 1e-7
    momentum: float = 0.9
    weight_decay: float = 4e-3
    global_clipnorm: float = 1.0
    clipnorm: float = 0.0
    schedule: str = "cosine"
    reduce_lr: bool = False
    reduce_lr_patience: int = 10
    reduce_lr_factor: float = 0.5
    reduce_lr_min: float = 1e-7
    batch_size: int = 512
    epochs: int = 15
    seed: int = 1
    steps_per_execution: int = 1

    def __post_init__(self) -> None:
        for name in ("depth", "width", "kernel_size", "epochs", "steps_per_execution"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("reduce_lr_patience", self.reduce_lr_patience >= 1, "at least 1")
        self._require("batch_size", self.batch_size >= 2, "at least 2 for an entropy")
        self._require("seed", self.seed >= 0, "at least 0")
        for field in dataclasses.fields(self):
            if field.type == "float":
                value = getattr(self, field.name)
                self._require(
                    field.name, math.isfinite(value) and value >= 0, "finite and >= 0"
                )
        self._require("learning_rate", self.learning_rate > 0, "positive")
        self._require("epsilon", self.epsilon > 0, "positive")
        self._require("beta_1", self.beta_1 < 1, "below 1")
        self._require("momentum", self.momentum <= 1, "at most 1")
        self._require("reduce_lr_factor", self.reduce_lr_factor < 1, "below 1")
        if self.clipnorm and self.global_clipnorm:
            raise ExperimentError(
                "--clipnorm and --global-clipnorm exclude each other; switch one off "
                "with 0"
            )
        if self.reduce_lr and self.schedule != "constant":
            raise ExperimentError("--reduce-lr needs --schedule constant")
        for name, known in (
            ("scaling", SCALINGS),
            ("model", MODELS),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("native", tuple(NATIVE_MODES)),
            ("dtype", DTYPES),
        ):
            value = getattr(self, name)
            self._require(name, value in known, f"one of {', '.join(known)}")
        for name, get, example in (
            ("activation", keras.activations.get, "relu"),
            ("initializer", keras.initializers.get, "he_normal"),
        ):
            value = getattr(self, name)
            if (name, value) == ("initializer", LOOKS_LINEAR):
                continue
            try:
                get(value)
            except (ValueError, TypeError, KeyError):
                self._require(name, False, f"one that Keras knows, such as {example}")

    def _require(self, name: str, fulfilled: bool, what: str) -> None:
        if not fulfilled:
            raise ExperimentError(
                f"--{name.replace('_', '-')} must be {what}. "
                f"Received: {getattr(self, name)}"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Those of the values that are settings; the others are ignored."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: values[name] for name in names if name in values})

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, in the order of their definition."""
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that must stay the same when a run continues.

        Data sets may move, and a run may be prolonged unless the learning rate
        depends on where it ends.
        """
        values = {**self.as_dict(), "data": stem(self.data)}
        if self.schedule == "constant":
            del values["epochs"]
        return values

    def default_name(self) -> str:
        """A name for the results: a preset's, or one that only these settings have."""
        for preset, values in PRESETS.items():
            if self.identity() == Settings(**values).identity():
                return preset
        text = json.dumps(self.identity(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:6]
        size = f"{self.model}-{self.depth}x{self.width}"
        return f"{stem(self.data)}-{size}-{digest}"


def stem(data: str) -> str:
    """The name of a data set, or that of a file without folder and ending."""
    return pathlib.PurePath(data).stem


PRESETS: dict[str, dict[str, Any]] = {
    # The best recipe so far for 500 layers; see benchmarks/results/mnist.
    "mnist": {},
    # Small, without a download, and an initializer with which only LBE trains.
    "demo": {
        "data": "digits",
        "depth": 200,
        "width": 64,
        "initializer": "glorot_uniform",
        "learning_rate": 3e-4,
        "schedule": "decay",
        "batch_size": 128,
        "epochs": 150,
    },
    # The TensorFlow port's own setting. Keras 2 divided its strength of 1.5 by the
    # batch size.
    "port-mnist": {
        "initializer": "glorot_uniform",
        "lbe_strength": 1.5 / 512,
        "lbe_input": True,
        "beta_1": 0.95,
        "schedule": "constant",
        "reduce_lr": True,
        "epochs": 50,
    },
}
