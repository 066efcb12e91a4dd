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


def check_sizes(x: tf.Tensor) -> list[tf.Operation]:
    """Raises (or returns assertions that raise) where the batch is too small.

    Raises `InvalidArgumentError` at once where the sizes are known.
    """
    shape = tf.shape(x, out_type=tf.int64)
    units = tf.reduce_prod(shape[1:])
    checks = [
        tf.debugging.assert_greater_equal(
            shape[0],
            tf.constant(2, tf.int64),
            message="batch_entropy needs a batch of at least 2 samples: the "
            "variance of a single one is undefined. Received a first dimension of",
        ),
        tf.debugging.assert_greater_equal(
            units,
            tf.constant(1, tf.int64),
            message="batch_entropy needs at least one unit: every dimension of x "
            "after the first must be positive. Received a number of units of",
        ),
    ]
    return [check for check in checks if check is not None]


def moments(x: tf.Tensor, ddof: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance over the first axis, in float32 (float64 for float64).

    Two passes, `M2 / (N - ddof)` with `M2 = sum_n (x_n - mean)^2`. Where `N <= ddof`
    the divisor is 1, so that the variance is 0 and not NaN.
    """
    x = tf.cast(x, result_dtype(x.dtype))
    n = tf.cast(tf.shape(x, out_type=tf.int64)[0], x.dtype)
    mean = tf.reduce_sum(x, axis=0) / tf.maximum(n, 1)
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


def batch_entropy(
    x: tf.Tensor, *, ddof: int, scale: float, offset: float
) -> tf.Tensor:
    """`mean_u 1/2 ln(scale * v_u + offset)`; see `lbe_ops.batch_entropy`."""
    with tf.control_dependencies(check_sizes(x)):
        x = tf.identity(x)
    return tf.reduce_mean(unit_entropy(moments(x, ddof)[1], scale, offset))


def batch_entropy_or_zero(
    x: tf.Tensor, *, ddof: int, scale: float, offset: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """`(entropy, valid)`; see `lbe_ops.ops.batch_entropy_or_zero`."""
    shape = tf.shape(x, out_type=tf.int64)
    enough = (shape[0] >= 2) & (tf.reduce_prod(shape[1:]) >= 1)
    variance = moments(x, ddof)[1]
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
    with tf.control_dependencies(check_sizes(x)):
        x = tf.identity(x)
    mean, variance = moments(x, ddof)
    return mean, variance, unit_entropy(variance, scale, offset)
