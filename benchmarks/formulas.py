# SPDX-License-Identifier: Apache-2.0
"""Batch entropy as others compute it: the formulas that the benchmarks compare with.

Each function imports its framework itself, since no machine needs to have all of them,
and raises an ImportError where it is missing. It returns the formula as a function,
so that no import is a part of what is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def tensorflow_port() -> Callable[[Any], Any]:
    """The TensorFlow port's: github.com/Spinkk/BatchEntropyRegularization."""
    import tensorflow as tf

    def entropy(x: tf.Tensor) -> tf.Tensor:
        std = tf.math.reduce_std(tf.reshape(x, [tf.shape(x)[0], -1]), axis=0)
        return tf.reduce_mean(0.5 * tf.math.log(math.pi * math.e * std**2 + 1))

    return entropy


def pytorch_original() -> Callable[[Any], Any]:
    """The authors' own, in PyTorch: github.com/peerdavid/layerwise-batch-entropy."""
    import torch

    def entropy(x: torch.Tensor) -> torch.Tensor:
        std = torch.std(x.flatten(1), dim=0)
        return torch.log(math.pi * math.e * std**2 + 1).mul(0.5).mean()

    return entropy


def jax_variance() -> Callable[[Any], Any]:
    """The same of x [N, U] from the variance, as JAX code; none is published."""
    import jax
    import jax.numpy as jnp

    def entropy(x: jax.Array) -> jax.Array:
        variance = jnp.var(x.astype(jnp.float32), axis=0)
        return 0.5 * jnp.log(math.pi * math.e * variance + 1).mean()

    return entropy
