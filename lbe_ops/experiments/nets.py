# SPDX-License-Identifier: Apache-2.0
"""Deep plain networks, dense and convolutional, with and without LBE."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import tensorflow as tf

import lbe_ops
from lbe_ops.experiments import settings as settings_module
from lbe_ops.experiments.errors import ExperimentError
from lbe_ops.experiments.settings import Settings
from lbe_ops.initializers import LooksLinear
from lbe_ops.layers import Conv2D_LBE, Dense_LBE
from lbe_ops.model import LBEModel
from lbe_ops.regularizer import LBERegularizer


def build(
    settings: Settings,
    shape: tuple[int, ...],
    classes: int,
    lbe: bool,
    spread: bool = False,
) -> keras.Model:
    """A compiled net: `depth` equal hidden layers, then logits.

    Dense nets flatten their input; convolutional ones pad to the same size and take
    the maximum over all positions at the end. The initial weights depend on the
    settings alone: they are the same with and without LBE.

    Args:
        settings: what to build.
        shape: the shape of one sample.
        classes: the number of logits.
        lbe: LBE layers in an `LBEModel`, or plain layers in a plain `keras.Model`.
        spread: whether replicas share each batch, in whose scope this is called. A
            plain net is an `LBEModel` then as well, which has the same variables and
            trains to the same bits: Keras itself counts all shares alike, however
            small, and its `fit` fails on several machines.

    Raises:
        ExperimentError: a convolutional net for samples that are no images.
        Exception: that of Keras, for names that do not fit; `check` finds them.
    """
    if settings.model == "conv" and len(shape) != 3:
        raise ExperimentError(
            f"--model conv needs images. Received: samples of shape {list(shape)}"
        )
    seeds = np.random.default_rng(settings.seed).integers(
        2**31, size=settings.depth + 1
    )
    inputs = keras.Input(shape)
    first = keras.layers.Flatten if settings.model == "dense" else keras.layers.Identity
    regularizer = _regularizer(settings) if lbe and settings.lbe_input else None
    x = first(activity_regularizer=regularizer, name="input", dtype=settings.dtype)(
        inputs
    )
    for number, seed in enumerate(seeds[:-1], start=1):
        x = _hidden(settings, lbe, number, int(seed))(x)
    if settings.model == "conv":
        x = keras.layers.GlobalMaxPooling2D(dtype=settings.dtype)(x)
    logits = keras.layers.Dense(
        classes,
        kernel_initializer=keras.initializers.GlorotUniform(int(seeds[-1])),
        name="logits",
        dtype="float64" if settings.dtype == "float64" else "float32",
    )(x)
    if lbe or spread:
        net = LBEModel(
            inputs,
            logits,
            LBE_strength=settings.lbe_strength,
            weigh_by_samples=spread,
        )
    else:
        net = keras.Model(inputs, logits)
    net.compile(
        optimizer=_optimizer(settings),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # An instance, not a name: a metric that Keras makes while it traces the
        # first step makes it trace that step twice.
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        steps_per_execution=settings.steps_per_execution,
        jit_compile=False,
    )
    net.optimizer.build(net.trainable_variables)
    return net


def check(settings: Settings, x: np.ndarray, classes: int) -> None:
    """Fails where such a net cannot be built, by building and calling a short one.

    Args:
        settings: of the net.
        x: a few samples.
        classes: the number of logits.

    Raises:
        ExperimentError: the initializer or the activation do not fit.
    """
    short = dataclasses.replace(settings, depth=min(settings.depth, 2))
    try:
        entropies(build(short, x.shape[1:], classes, lbe=False), x)
    except (
        ValueError,
        TypeError,
        KeyError,
        NotImplementedError,
        tf.errors.InvalidArgumentError,
    ) as error:
        reason = [*str(error).splitlines(), ""][0]
        raise ExperimentError(
            f"--initializer {settings.initializer} with --activation "
            f"{settings.activation} makes no {settings.model} net: "
            f"{type(error).__name__}: {reason}"
        ) from error


def entropies(net: keras.Model, x: np.ndarray) -> list[float]:
    """The batch entropy of each hidden layer on one batch, from first to last.

    Args:
        net: what `build` made.
        x: a batch of samples.

    Returns:
        A value for each hidden layer.
    """
    found = []
    for layer in net.layers[1:]:
        # Not layer(x), which would add its activity regularizer to the losses.
        x = layer.call(keras.ops.cast(x, layer.variable_dtype))
        if layer.name.startswith("hidden_"):
            found.append(float(lbe_ops.batch_entropy(x)))
    return found


def _regularizer(settings: Settings) -> keras.layers.Layer:
    return LBERegularizer(settings.lbe_alpha, settings.lbe_alpha_min, settings.lbe_beta)


def _hidden(
    settings: Settings, lbe: bool, number: int, seed: int
) -> keras.layers.Layer:
    arguments = {
        "activation": settings.activation,
        "kernel_initializer": _initializer(settings.initializer, number, seed),
        "name": f"hidden_{number}",
        "dtype": settings.dtype,
    }
    if lbe:
        dense, conv = Dense_LBE, Conv2D_LBE
        arguments |= {
            "LBE_alpha": settings.lbe_alpha,
            "LBE_alpha_min": settings.lbe_alpha_min,
            "LBE_beta": settings.lbe_beta,
        }
    else:
        dense, conv = keras.layers.Dense, keras.layers.Conv2D
    if settings.model == "dense":
        return dense(settings.width, **arguments)
    return conv(settings.width, settings.kernel_size, padding="same", **arguments)


def _initializer(name: str, number: int, seed: int) -> keras.initializers.Initializer:
    """The named initializer with a seed of its own, where it takes one."""
    if name == settings_module.LOOKS_LINEAR:
        return LooksLinear(first=number == 1, seed=seed)
    initializer = keras.initializers.get(name)
    config = initializer.get_config()
    if "seed" in config:
        config["seed"] = seed
    return type(initializer).from_config(config)


def _optimizer(settings: Settings) -> keras.optimizers.Optimizer:
    optimizer = _plain_optimizer(settings)
    if settings.dtype == "mixed_float16":
        # Keras itself does it only where the policy is that of the model as well.
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def _plain_optimizer(settings: Settings) -> keras.optimizers.Optimizer:
    arguments = {
        "learning_rate": settings.learning_rate,
        "global_clipnorm": settings.global_clipnorm or None,
        "clipnorm": settings.clipnorm or None,
    }
    if settings.optimizer == "sgd":
        return keras.optimizers.SGD(momentum=settings.momentum, **arguments)
    arguments |= {"beta_1": settings.beta_1, "epsilon": settings.epsilon}
    if settings.optimizer == "adamw":
        return keras.optimizers.AdamW(weight_decay=settings.weight_decay, **arguments)
    return keras.optimizers.Adam(**arguments)
