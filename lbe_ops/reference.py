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
    mean, difference = _mean_and_difference(x)
    return mean, _mean_square(difference, ddof)


def _mean_and_difference(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    x = tf.cast(x, result_dtype(x.dtype))
    # Relative to the first sample, so that a unit that does not vary has a variance of
    # exactly 0: the sum of N equal numbers, divided by N, may be another number. The
    # mean does not depend on what it is relative to, and neither does its gradient.
    first = tf.stop_gradient(x[:1])
    total = tf.reduce_sum(x - first, axis=0)
    mean = tf.reduce_sum(first, axis=0) + total / tf.maximum(_rows(x), 1)
    return mean, x - mean


def _mean_square(difference: tf.Tensor, ddof: int) -> tf.Tensor:
    m2 = tf.reduce_sum(tf.square(difference), axis=0)
    return m2 / tf.maximum(_rows(difference) - ddof, 1)


def _rows(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.shape(x, out_type=tf.int64)[0], x.dtype)


def unit_entropy(variance: tf.Tensor, scale: float, offset: float) -> tf.Tensor:
    """Entropy of each unit: `1/2 ln(scale * variance + offset)`.

    Written with `log1p` where `offset > 0`, since `log(1 + tiny)` loses small
    variances.
    """
    if offset > 0:
        return 0.5 * (math.log(offset) + tf.math.log1p(variance * (scale / offset)))
    return 0.5 * tf.math.log(scale * variance)


# The first sample's deviation above which a unit's deviations are made smaller, and how
# much smaller.
_FAR, _SHRINK = 2.0**30, 2.0**-20


def _entropies(
    x: tf.Tensor,
    ddof: int,
    scale: float,
    offset: float,
    enough: tf.Tensor | bool = True,
) -> tf.Tensor:
    """`unit_entropy` of each unit of x, with a gradient that does not underflow.

    TensorFlow multiplies the factors of a gradient from the entropy back to x. For
    activations of 1e18 the product of the first ones, `1 / (U (N - ddof) v)`, is too
    small for float32, and the gradient is not: so the deviations of such a unit are
    divided by a constant first, and its logarithm is added. Then the entropy is that of
    a smaller unit with a smaller offset. Where x has not `enough` samples or units,
    nothing counts.
    """
    _, difference = _mean_and_difference(x)
    far = tf.reduce_any(tf.abs(difference[:1]) > _FAR, axis=0)
    shrink = tf.where(far, tf.constant(_SHRINK, difference.dtype), 1)
    variance = _mean_square(difference * shrink, ddof)
    # Finite, as their gradients must be, where they do not count: log(0) is not.
    counts = tf.logical_and(enough, ~far)
    near = unit_entropy(tf.where(counts, variance, 1), scale, offset)
    small = tf.where(far, scale * variance + offset * _SHRINK**2, 1)
    return tf.where(far, 0.5 * tf.math.log(small) - math.log(_SHRINK), near)


def batch_entropy(x: tf.Tensor, *, ddof: int, scale: float, offset: float) -> tf.Tensor:
    """`mean_u 1/2 ln(scale * v_u + offset)`; see `lbe_ops.batch_entropy`."""
    return tf.reduce_mean(_entropies(check_sizes(x), ddof, scale, offset))


def batch_entropy_or_zero(
    x: tf.Tensor, *, ddof: int, scale: float, offset: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """`(entropy, valid)`; see `lbe_ops.ops.batch_entropy_or_zero`."""
    shape = tf.shape(x, out_type=tf.int64)
    enough = (shape[0] >= 2) & (tf.reduce_prod(shape[1:]) >= 1)
    # Not even a NaN in a sample that does not count may reach the gradient.
    x = tf.where(enough, x, tf.zeros_like(x))
    entropies = _entropies(x, ddof, scale, offset, enough)
    entropy = tf.math.divide_no_nan(
        tf.reduce_sum(entropies), tf.cast(tf.size(entropies), entropies.dtype)
    )
    return tf.where(enough, entropy, 0), tf.cast(enough, entropies.dtype)


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
