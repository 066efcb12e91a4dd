# SPDX-License-Identifier: Apache-2.0
"""Batch entropy in plain TensorFlow operations, differentiated by TensorFlow.

The fallback wherever the native library cannot be used, and the formula that
gives the native op its second derivative. The same maths stands in
`cc/batch_entropy.h`; the definitions are those of Peer et al., "Improving the
Trainability of Deep Neural Networks through Layerwise Batch-Entropy
Regularization", TMLR 2022 (arXiv 2208.01134).
"""

from __future__ import annotations

import math

import tensorflow as tf


def result_dtype(dtype: tf.DType) -> tf.DType:
    """float64 for float64, float32 for every other supported dtype."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def check_sizes(x: tf.Tensor) -> tf.Tensor:
    """x, or an `InvalidArgumentError` if it has fewer than 2 samples or no unit.

    At once where the sizes are known, else when the graph runs. XLA drops assertions:
    there only known sizes are checked.
    """
    message = (
        "batch_entropy needs a batch of at least 2 samples, since the variance of a "
        "single one is undefined, and at least one unit. Received: x of shape "
    )
    sizes = x.shape.as_list() if x.shape.rank is not None else []
    if sizes and (sizes[0] in (0, 1) or 0 in sizes[1:]):
        raise tf.errors.InvalidArgumentError(None, None, f"{message}{x.shape}")
    if x.shape.is_fully_defined():
        return x
    if x.shape.rank is None:
        rank = tf.debugging.assert_rank_at_least(
            x, 1, "x must have shape [batch, ...]. Received: a scalar"
        )
        with tf.control_dependencies([rank]):
            x = tf.identity(x)
    shape = tf.shape(x)
    enough = (shape[0] >= 2) & (tf.size(x) >= 1)
    with tf.control_dependencies([tf.debugging.Assert(enough, [message, shape])]):
        return tf.identity(x)


def moments(x: tf.Tensor, ddof: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance over the first axis, in float32 (float64 for float64).

    Two passes, `M2 / (N - ddof)` with `M2 = sum_n (x_n - mean)^2`. Where `N <= ddof`
    the divisor is 1, so that the variance is 0 and not NaN.
    """
    x = tf.cast(x, result_dtype(x.dtype))
    n = tf.cast(tf.shape(x, out_type=tf.int64)[0], x.dtype)
    # Relative to the first sample, so that a unit that does not vary has a variance of
    # exactly 0: the sum of N equal numbers, divided by N, may be another number. The
    # mean does not depend on what it is relative to, and neither does its gradient.
    first = tf.stop_gradient(x[:1])
    total = tf.reduce_sum(x - first, axis=0)
    mean = tf.reduce_sum(first, axis=0) + total / tf.maximum(n, 1)
    m2 = tf.reduce_sum(tf.square(x - mean), axis=0)
    return mean, m2 / tf.maximum(n - ddof, 1)


def unit_entropy(variance: tf.Tensor, scale: float, offset: float) -> tf.Tensor:
    """Entropy of each unit: `1/2 ln(scale * variance + offset)`.

    Written with `log1p` where `offset > 0`, since `log(1 + tiny)` loses small
    variances.
    """
    if offset > 0:
        return 0.5 * (math.log(offset) + tf.math.log1p(variance * (scale / offset)))
    return 0.5 * tf.math.log(scale * variance)


def batch_entropy(x: tf.Tensor, *, ddof: int, scale: float, offset: float) -> tf.Tensor:
    """`mean_u 1/2 ln(scale * v_u + offset)`; see `lbe_ops.batch_entropy`."""
    x = check_sizes(x)
    return tf.reduce_mean(unit_entropy(moments(x, ddof)[1], scale, offset))


def batch_entropy_or_zero(
    x: tf.Tensor, *, ddof: int, scale: float, offset: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """`(entropy, valid)`; see `lbe_ops.ops.batch_entropy_or_zero`."""
    shape = tf.shape(x, out_type=tf.int64)
    enough = (shape[0] >= 2) & (tf.reduce_prod(shape[1:]) >= 1)
    # Not even a NaN in a sample that does not count may reach the gradient.
    variance = moments(tf.where(enough, x, tf.zeros_like(x)), ddof)[1]
    # Both branches must be finite for their gradients to be: log(0) and the mean
    # of no units are not.
    safe = tf.where(enough, variance, tf.ones_like(variance))
    entropy = tf.math.divide_no_nan(
        tf.reduce_sum(unit_entropy(safe, scale, offset)),
        tf.cast(tf.size(variance), variance.dtype),
    )
    return tf.where(enough, entropy, 0), tf.cast(enough, variance.dtype)


def unit_statistics(
    x: tf.Tensor, *, ddof: int, scale: float, offset: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`(mean, variance, entropy)` of each unit; see `lbe_ops.unit_statistics`."""
    x = check_sizes(x)
    mean, variance = moments(x, ddof)
    return mean, variance, unit_entropy(variance, scale, offset)


# Activations of an epilogue, and their derivatives written with y = activation(z):
# functions of (z or y, slope). The same maths stands in `cc/activations.h`.
ACTIVATIONS = {
    "linear": lambda z, slope: z,
    "relu": lambda z, slope: tf.nn.relu(z),
    # Not tf.nn.leaky_relu, whose slope has 32 bits.
    "leaky_relu": lambda z, slope: tf.where(z < 0, slope * z, z),
    "elu": lambda z, slope: tf.where(z < 0, slope * tf.nn.elu(z), z),
    "selu": lambda z, slope: tf.nn.selu(z),
    "tanh": lambda z, slope: tf.tanh(z),
    "sigmoid": lambda z, slope: tf.sigmoid(z),
    "softplus": lambda z, slope: tf.math.softplus(z),
}
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
DERIVATIVES = {
    "linear": lambda y, slope: tf.ones_like(y),
    "relu": lambda y, slope: tf.where(y > 0, tf.ones_like(y), 0),
    "leaky_relu": lambda y, slope: tf.where(y > 0, tf.ones_like(y), slope),
    "elu": lambda y, slope: tf.where(y < 0, y + slope, 1),
    "selu": lambda y, slope: tf.where(
        y < 0, y + _SELU_SCALE * _SELU_ALPHA, _SELU_SCALE
    ),
    "tanh": lambda y, slope: 1 - tf.square(y),
    "sigmoid": lambda y, slope: y * (1 - y),
    "softplus": lambda y, slope: -tf.math.expm1(-y),
}


def activate(
    z: tf.Tensor, bias: tf.Tensor | None, activation: str, slope: float
) -> tf.Tensor:
    """`activation(z + bias)`; see `lbe_ops.ops.epilogue`."""
    if bias is not None:
        z = z + bias
    return ACTIVATIONS[activation](z, slope)
