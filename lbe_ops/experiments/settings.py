# SPDX-License-Identifier: Apache-2.0
"""What determines the numbers of an experiment, with presets and checks."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from lbe_ops.experiments.errors import ExperimentError
from lbe_ops.regularizer import ON_UNITS, VARIANTS

MODELS = (
    *("dense", "conv", "residual", "residual_conv"),
    *("autoencoder", "vae", "transformer"),
)
NORMS = ("none", "batch", "layer", "post_layer")
TEXT = "text"  # see data.py
SCALINGS = ("unit", "symmetric")
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "decay", "cosine")
NATIVE_MODES = {"auto": None, "require": True, "never": False}
LOOKS_LINEAR, CRITICAL_ORTHOGONAL, LSUV = "looks_linear", "critical_orthogonal", "lsuv"
OWN_INITIALIZERS = (LOOKS_LINEAR, CRITICAL_ORTHOGONAL, LSUV)  # see initializers.py
NO_OP = "one that the compiled op has (entropy, one_sided) with --native require"
DTYPES = ("float32", "float64", "mixed_float16", "mixed_bfloat16")


def _setting(
    default: Any,
    help: str = "",
    choices: Sequence[str] = (),
    group: str = "",
    added: bool = False,
) -> Any:
    """A field of `Settings` and what the command line says of it.

    Args:
        default: value of the field.
        help: text of the argument.
        choices: all that it may be; empty where the values cannot be listed.
        group: title of the group of arguments that begins with this one; empty where
            the group of the field before goes on.
        added: whether there are runs from before this setting; its default is what
            they did, and no part of the names that were given to them.
    """
    metadata = {"help": help, "choices": choices, "group": group, "added": added}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that determines the numbers of a run; the defaults are `mnist`.

    The strength is that of `LBEModel`, which does not divide it by the batch size.
    """

    data: str = _setting(
        "mnist",
        "mnist, digits (offline), fashion_mnist, cifar10, cifar100, an .npz with "
        "x_train, y_train, x_test, y_test, or text (sources of Python's library, "
        "offline; for the transformer)",
        group="data",
    )
    scaling: str = _setting(
        "unit",
        "unit: uint8 to [0, 1], floats as they are; symmetric: uint8 to [-1, 1], and "
        "floats from [0, 1], where they must lie",
        SCALINGS,
    )

    context: int = _setting(64, "characters of a sample of text", added=True)

    model: str = _setting("dense", "kind of net", MODELS, group="network")
    depth: int = _setting(
        500, "hidden layers; of a transformer blocks, which have one each"
    )
    width: int = _setting(
        128,
        "units or filters of each; of a transformer those between the blocks (its "
        "hidden layers have four times as many)",
    )
    norm: str = _setting(
        "none",
        "normalization before each activation; in a transformer layer is that at the "
        "start of its branches (pre-LN), post_layer that after their sums (post-LN)",
        NORMS,
        added=True,
    )
    latent: int = _setting(10, "units between encoder and decoder", added=True)
    kl_weight: float = _setting(
        1.0,
        "of a vae: factor of the divergence, beside the squared error summed over the "
        "values of a sample",
        added=True,
    )
    heads: int = _setting(4, "of each attention of a transformer", added=True)
    kernel_size: int = _setting(3, "of convolutions")
    activation: str = _setting("gelu", "any of Keras")
    initializer: str = _setting(
        LOOKS_LINEAR,
        f"of the hidden layers' kernels: {', '.join(OWN_INITIALIZERS)}, or any that "
        "Keras has",
    )
    dtype: str = _setting("float32", "dtype policy", DTYPES)

    lbe_variant: str = _setting(
        "entropy", "what LBE is; see LBERegularizer", VARIANTS, group="LBE", added=True
    )
    lbe_alpha: float = _setting(3.0, "entropy to aim at, trained from this value")
    lbe_alpha_min: float = _setting(0.3, "its lower bound")
    lbe_beta: float = _setting(1.0, "factor of each layer's LBE")
    lbe_strength: float = _setting(
        0.003, "factor of the mean LBE; not divided by the batch size"
    )
    lbe_input: bool = _setting(
        False, "LBE on the (flattened or embedded) input as well"
    )
    native: str = _setting("auto", "use of the compiled op", tuple(NATIVE_MODES))

    optimizer: str = _setting("adam", choices=OPTIMIZERS, group="optimization")
    learning_rate: float = _setting(1e-4)
    beta_1: float = _setting(0.9, "of adam and adamw")
    epsilon: float = _setting(1e-7, "of adam and adamw")
    momentum: float = _setting(0.9, "of sgd")
    weight_decay: float = _setting(4e-3, "of adamw")
    global_clipnorm: float = _setting(
        1.0, "limit of all gradients' norm together; 0: none"
    )
    clipnorm: float = _setting(0.0, "limit of each gradient's norm; 0: none")
    schedule: str = _setting(
        "cosine",
        "learning rate: constant; decay: that for 60 % of the epochs, then linearly "
        "to 0; cosine: half a cosine down to 0; both change it between epochs",
        SCHEDULES,
    )
    reduce_lr: bool = _setting(False, "reduce the learning rate when val_loss stalls")
    reduce_lr_patience: int = _setting(10, "epochs without progress until then")
    reduce_lr_factor: float = _setting(0.5, "factor of the reduction")
    reduce_lr_min: float = _setting(1e-7, "lowest learning rate")
    batch_size: int = _setting(512)
    epochs: int = _setting(15)
    seed: int = _setting(1, "of the weights and of the order of the samples")
    steps_per_execution: int = _setting(
        1, "training steps for each call into TensorFlow"
    )

    def __post_init__(self) -> None:
        for name in (
            *("depth", "width", "kernel_size", "epochs", "steps_per_execution"),
            *("context", "latent", "heads"),
        ):
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
        choices = {f.name: f.metadata["choices"] for f in dataclasses.fields(self)}
        for name in (
            *("scaling", "model", "norm", "lbe_variant"),
            *("optimizer", "schedule", "native", "dtype"),
        ):
            value, known = getattr(self, name), choices[name]
            self._require(name, value in known, f"one of {', '.join(known)}")
        if self.native == "require":
            self._require("lbe_variant", self.lbe_variant not in ON_UNITS, NO_OP)
        self._check_transformer()
        for name, module, own, example in (
            ("activation", keras.activations, (), "relu"),
            ("initializer", keras.initializers, OWN_INITIALIZERS, "he_normal"),
        ):
            value = getattr(self, name)
            if value in own:
                continue
            try:
                module.get(value)
            except (ValueError, TypeError, KeyError):
                known = [n for n in dir(module) if n.islower() and n != value]
                (example,) = difflib.get_close_matches(value, known, 1) or [example]
                own_or = f"{', '.join(own)} or " if own else ""
                what = f"{own_or}one that Keras knows, such as {example}"
                self._require(name, False, what)

    def _check_transformer(self) -> None:
        transformer = self.model == "transformer"
        if transformer != (self.data == TEXT):
            raise ExperimentError(
                "--model transformer needs --data text, and --data text that model. "
                f"Received: --model {self.model} --data {self.data}"
            )
        if transformer:
            self._require("norm", self.norm != "batch", "none, layer or post_layer")
            self._require("heads", self.width % self.heads == 0, "a divisor of --width")
        else:
            self._require("norm", self.norm != "post_layer", "none, batch or layer")

    def _require(self, name: str, fulfilled: bool, what: str) -> None:
        if not fulfilled:
            raise ExperimentError(
                f"--{name.replace('_', '-')} must be {what}. "
                f"Received: {getattr(self, name)}"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Those of the values that are settings; the others are ignored.

        Raises:
            ExperimentError: a value is of another type than its setting, or does not
                fit.
        """
        found: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name not in values:
                continue
            value, kind = values[field.name], type(field.default)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ExperimentError(
                    f"--{field.name.replace('_', '-')} must be of type "
                    f"{kind.__name__}. Received: {value!r}"
                )
            found[field.name] = value
        return cls(**found)

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
        added = {
            field.name: field.default
            for field in dataclasses.fields(self)
            if field.metadata["added"]
        }
        named = {
            name: value
            for name, value in self.identity().items()
            if name not in added or value != added[name]
        }
        text = json.dumps(named, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:6]
        size = f"{self.model}-{self.depth}x{self.width}"
        return f"{stem(self.data)}-{size}-{digest}"


def stem(data: str) -> str:
    """The name of a data set, or that of a file without folder and ending."""
    return pathlib.PurePath(data).stem


PRESETS: dict[str, dict[str, Any]] = {
    # The best recipe so far for 500 layers; see benchmarks/results/mnist.
    "mnist": {},
    # Small, without a download; glorot_uniform and he_normal do not keep the scale of
    # GELU at this depth. Orthogonal kernels of the critical gain do, without LBE.
    "demo": {
        "data": "digits",
        "depth": 50,
        "width": 64,
        "initializer": "he_normal",
        "lbe_alpha": 1.0,
        "lbe_alpha_min": 0.05,
        "lbe_strength": 0.1,
        "learning_rate": 1e-3,
        "batch_size": 128,
        "epochs": 100,
    },
    # Some minutes each, and no download.
    "vae": {
        "data": "digits",
        "model": "vae",
        "depth": 20,
        "width": 64,
        "activation": "relu",
        "initializer": "glorot_uniform",
        "learning_rate": 1e-3,
        "batch_size": 128,
        "epochs": 60,
    },
    "transformer": {
        "data": "text",
        "model": "transformer",
        "norm": "layer",
        "depth": 4,
        "width": 64,
        "initializer": "he_normal",
        "learning_rate": 2e-3,
        "batch_size": 64,
        "epochs": 5,
    },
    # The TensorFlow port's own setting. Keras 2 divided its strength of 1.5 by the
    # batch size.
    "port-mnist": {
        "activation": "relu",
        "initializer": "glorot_uniform",
        "lbe_strength": 1.5 / 512,
        "lbe_input": True,
        "beta_1": 0.95,
        "schedule": "constant",
        "reduce_lr": True,
        "epochs": 50,
    },
}
