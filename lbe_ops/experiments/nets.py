# SPDX-License-Identifier: Apache-2.0
"""The nets, with and without LBE: plain, residual, autoencoders, a transformer.

All are made of the same hidden layers, `hidden_1` and so on: weights, normalization,
the activation, and LBE on what comes out of that.

- `dense`, `conv`: one hidden layer after the other, then logits. Dense nets flatten
  their input; convolutional ones pad to the same size and take the maximum over all
  positions at the end.
- `residual`, `residual_conv`: the same with shortcuts. From the third on, every second
  hidden layer adds, before its activation, the output of the second one before it
  (blocks as in He et al., arXiv 1512.03385).
- `autoencoder`, `vae`: one half of the hidden layers, `latent` linear units, the other
  half, and linear outputs. The vae (Kingma & Welling, arXiv 1312.6114) has a mean and
  a variance for each of the latent units, of which its second input makes a sample.
- `transformer`: blocks of causal attention and of one hidden layer, each in a branch
  whose output is added to its input; logits for each next character.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lbe_ops.callbacks import BatchEntropyLogger
from lbe_ops.experiments import settings as settings_module
from lbe_ops.experiments.errors import ExperimentError
from lbe_ops.experiments.settings import Settings
from lbe_ops.experiments.tasks import task_of
from lbe_ops.initializers import DeltaOrthogonal, LooksLinear, critical_gain, lsuv
from lbe_ops.layers import Conv2D_LBE, Dense_LBE
from lbe_ops.model import LBEModel
from lbe_ops.regularizer import LBERegularizer

HIDDEN, WEIGHTS = "hidden_", "weights_"

# One integral for a net, not one for each of its layers.
_gain = functools.cache(critical_gain)


def build(
    settings: Settings,
    shape: tuple[int, ...],
    classes: int,
    lbe: bool,
    spread: bool = False,
) -> keras.Model:
    """A compiled net of `depth` hidden layers; see `network`."""
    net = network(settings, shape, classes, lbe, spread)
    task = task_of(settings)
    net.compile(
        optimizer=_optimizer(settings),
        loss=task.loss(),
        # Instances, not names: a metric that Keras makes while it traces the first
        # step makes it trace that step twice.
        metrics=task.metrics(),
        steps_per_execution=settings.steps_per_execution,
        jit_compile=False,
    )
    net.optimizer.build(net.trainable_variables)
    return net


def network(
    settings: Settings,
    shape: tuple[int, ...],
    classes: int,
    lbe: bool,
    spread: bool = False,
) -> keras.Model:
    """A net of `depth` hidden layers.

    The initial weights depend on the settings alone: they are the same with and
    without LBE.

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
    if settings.model in CONVOLUTIONAL and len(shape) != 3:
        raise ExperimentError(
            f"--model {settings.model} needs images. "
            f"Received: samples of shape {list(shape)}"
        )
    body = BODIES.get(settings.model, _plain)
    inputs, outputs = body(_Layers(settings, lbe, spread), shape, classes)
    if not (lbe or spread):
        return keras.Model(inputs, outputs)
    return LBEModel(
        inputs,
        outputs,
        LBE_strength=settings.lbe_strength,
        weigh_by_samples=spread,
    )


def check(settings: Settings, x: np.ndarray, classes: int) -> None:
    """Fails where such a net cannot be built, by building and calling a short one.

    Args:
        settings: of the net.
        x: a few samples.
        classes: the number of logits.

    Raises:
        ExperimentError: the initializer or the activation do not fit.
    """
    short = dataclasses.replace(settings, depth=min(settings.depth, 3))
    try:
        net = build(short, x.shape[1:], classes, lbe=False)
        inputs, _ = task_of(settings).pair(x, x, np.random.default_rng(0))
        net(inputs)
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


def entropies(net: keras.Model, x: Any) -> Callable[[], list[float]]:
    """Measures the batch entropy of each hidden layer on one batch, whenever called.

    It is that of a forward pass for inference: batch normalization has the statistics
    that it gathered in training, before which it changes nothing.

    Args:
        net: what `build` made.
        x: a batch of inputs.

    Returns:
        A function, which traces the net when it is called first, and returns a value
        for each hidden layer, from first to last.
    """
    logger = BatchEntropyLogger(x, lambda layer: layer.name.startswith(HIDDEN))
    logger.set_model(net)
    return lambda: logger.measure().tolist()


class _Layers:
    """Makes the layers of one net and calls them: their names, seeds and LBE."""

    def __init__(self, settings: Settings, lbe: bool, spread: bool) -> None:
        self.settings = settings
        self.lbe = lbe
        self.spread = spread
        self.count = 0  # of hidden layers
        self.norms = 0
        self._generator = np.random.default_rng(settings.seed)

    def seed(self) -> int:
        """Another one for each layer with weights."""
        return int(self._generator.integers(2**31))

    def regularizer(self) -> LBERegularizer | None:
        """One for a layer, in a net with LBE."""
        s = self.settings
        if not self.lbe:
            return None
        return LBERegularizer(
            s.lbe_alpha, s.lbe_alpha_min, s.lbe_beta, variant=s.lbe_variant
        )

    def input(self, layer: type[keras.layers.Layer], *args: Any, **kwargs: Any) -> Any:
        """The first layer, with LBE if that is asked for."""
        regularizer = self.regularizer() if self.settings.lbe_input else None
        kwargs |= {"activity_regularizer": regularizer, "dtype": self.settings.dtype}
        return layer(*args, name="input", **kwargs)

    def hidden(
        self,
        x: Any,
        *,
        units: int | None = None,
        pairs: bool = True,
        norm: str | None = None,
        shortcut: Any = None,
    ) -> Any:
        """The next hidden layer.

        Args:
            x: its input.
            units: its units or filters; None for the width.
            pairs: whether its input is a hidden layer, as of the second on.
            norm: its normalization; None for that of the settings.
            shortcut: what is added before the activation, if anything.
        """
        self.count += 1
        s = self.settings
        number, norm = self.count, s.norm if norm is None else norm
        arguments = {
            "kernel_initializer": initializer(
                s.initializer, s.activation, number if pairs else 1, self.seed()
            ),
            "dtype": s.dtype,
            # Batch normalization takes a bias away again: its gradient would be
            # rounding alone, which Adam makes steps of.
            "use_bias": norm != "batch",
        }
        last = {
            "activation": s.activation,
            "activity_regularizer": self.regularizer(),
            "name": f"{HIDDEN}{number}",
        }
        in_one = norm == "none" and shortcut is None
        arguments |= last if in_one else {"name": f"{WEIGHTS}{number}"}
        dense, conv = keras.layers.Dense, keras.layers.Conv2D
        if in_one and self.lbe:
            dense, conv = Dense_LBE, Conv2D_LBE
        if s.model in CONVOLUTIONAL:
            layer = conv(s.width, s.kernel_size, padding="same", **arguments)
        else:
            layer = dense(units or s.width, **arguments)
        x = layer(x)
        if in_one:
            return x
        x = self.norm(x, norm)
        if shortcut is not None:
            x = keras.layers.Add(dtype=s.dtype)([x, shortcut])
        return keras.layers.Activation(**last, dtype=s.dtype)(x)

    def norm(self, x: Any, kind: str) -> Any:
        """Normalization of that kind, if it is one."""
        arguments = {"name": f"norm_{self.norms + 1}", "dtype": self.settings.dtype}
        if kind == "batch":
            # Its statistics follow the net within tens of steps, not hundreds.
            layer = keras.layers.BatchNormalization(
                momentum=0.9, synchronized=self.spread, **arguments
            )
        elif kind == "layer":
            layer = keras.layers.LayerNormalization(**arguments)
        else:
            return x
        self.norms += 1
        return layer(x)

    def linear(self, x: Any, units: int, name: str, dtype: str = "") -> Any:
        """A dense layer that is not hidden; its dtype is the one for outputs."""
        wide = "float64" if self.settings.dtype == "float64" else "float32"
        return keras.layers.Dense(
            units,
            kernel_initializer=keras.initializers.GlorotUniform(self.seed()),
            name=name,
            dtype=dtype or wide,
        )(x)


def _plain(layers: _Layers, shape: tuple[int, ...], classes: int) -> tuple[Any, Any]:
    model = layers.settings.model
    conv, residual = model in CONVOLUTIONAL, model.startswith("residual")
    inputs = keras.Input(shape)
    first = keras.layers.Identity if conv else keras.layers.Flatten
    x = layers.input(first)(inputs)
    outputs: list[Any] = []
    for number in range(1, layers.settings.depth + 1):
        adds = residual and number > 1 and number % 2
        x = layers.hidden(x, shortcut=outputs[-2] if adds else None)
        outputs.append(x)
    if conv:
        x = keras.layers.GlobalMaxPooling2D(dtype=layers.settings.dtype)(x)
    return inputs, layers.linear(x, classes, "logits")


def _autoencoder(
    layers: _Layers, shape: tuple[int, ...], classes: int
) -> tuple[Any, Any]:
    s = layers.settings
    inputs = keras.Input(shape)
    x = layers.input(keras.layers.Flatten)(inputs)
    encoder = s.depth // 2
    for _ in range(encoder):
        x = layers.hidden(x)
    if s.model == "autoencoder":
        x = layers.linear(x, s.latent, "latent")
    else:
        noise = keras.Input((s.latent,))
        inputs = [inputs, noise]
        x = layers.linear(x, 2 * s.latent, "latent")
        mean, log_variance = keras.ops.split(x, 2, axis=-1)
        variance = keras.ops.exp(log_variance)
        x = mean + keras.ops.sqrt(variance) * noise
        divergence = keras.ops.square(mean) + variance - log_variance - 1
        divergence = keras.ops.sum(divergence, axis=-1, keepdims=True) / 2
    for number in range(s.depth - encoder):
        x = layers.hidden(x, pairs=number > 0)
    outputs = layers.linear(x, math.prod(shape), "reconstruction")
    if s.model == "vae":
        outputs = keras.ops.concatenate([outputs, divergence], axis=-1)
    return inputs, outputs


def _transformer(
    layers: _Layers, shape: tuple[int, ...], classes: int
) -> tuple[Any, Any]:
    s = layers.settings
    before = "layer" if s.norm == "layer" else "none"
    after = "layer" if s.norm == "post_layer" else "none"

    def attention(x: Any) -> Any:
        name = f"attention_{layers.count + 1}"
        x = layers.linear(x, 3 * s.width, f"{name}_in", s.dtype)
        x = keras.layers.Reshape((*shape, 3, s.heads, s.width // s.heads))(x)
        x = keras.ops.dot_product_attention(
            *keras.ops.unstack(x, 3, axis=2), is_causal=True
        )
        x = keras.layers.Reshape((*shape, s.width))(x)
        return layers.linear(x, s.width, f"{name}_out", s.dtype)

    def perceptron(x: Any) -> Any:
        x = layers.hidden(x, units=4 * s.width, pairs=False, norm="none")
        return layers.linear(x, s.width, f"perceptron_{layers.count}_out", s.dtype)

    inputs = keras.Input(shape, dtype="int32")
    # An embedding of characters and one of positions, whose sum has unit variance.
    normal = [keras.initializers.RandomNormal(0, 0.5**0.5, layers.seed()) for _ in "12"]
    x = layers.input(
        keras.layers.EinsumDense,
        "btc,cd->btd",
        (*shape, s.width),
        bias_axes="td",
        kernel_initializer=normal[0],
        bias_initializer=normal[1],
    )(keras.ops.one_hot(inputs, classes))
    for _ in range(s.depth):
        for branch in (attention, perceptron):
            x = layers.norm(x + branch(layers.norm(x, before)), after)
    return inputs, layers.linear(layers.norm(x, before), classes, "logits")


CONVOLUTIONAL = ("conv", "residual_conv")
BODIES = {
    "autoencoder": _autoencoder,
    "vae": _autoencoder,
    "transformer": _transformer,
}


def initializer(
    name: str, activation: str, number: int, seed: int
) -> keras.initializers.Initializer:
    """The named initializer with a seed of its own, where it takes one.

    Args:
        name: one of `OWN_INITIALIZERS` or of Keras.
        activation: of the layer.
        number: of the layer, from 1 on; of the first the input is no hidden layer.
        seed: of its kernel.
    """
    if name == settings_module.LOOKS_LINEAR:
        return LooksLinear(number == 1, seed, _gain(activation, pairs=True))
    if name == settings_module.CRITICAL_ORTHOGONAL:
        return DeltaOrthogonal(_gain(activation), seed)
    if name == settings_module.LSUV:
        return DeltaOrthogonal(seed=seed)  # and `scale_layers` when all are built
    found = keras.initializers.get(name)
    config = found.get_config()
    if "seed" in config:
        config["seed"] = seed
    return type(found).from_config(config)


def hidden_kernels(net: keras.Model) -> list[keras.Variable]:
    """The kernels of the hidden layers, from first to last."""
    return [layer.kernel for layer in net.layers if _is_hidden(layer)]


def scale_layers(net: keras.Model, x: Any) -> None:
    """Scales the kernels of the hidden layers by `lsuv`, on a batch of inputs."""
    lsuv(net, x, layers=_is_hidden)


def _is_hidden(layer: keras.layers.Layer) -> bool:
    """Whether these are the weights of a hidden layer."""
    named = layer.name.startswith((HIDDEN, WEIGHTS))
    return named and getattr(layer, "kernel", None) is not None


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
