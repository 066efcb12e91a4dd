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
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

NO_SECOND_GRADIENT = (
    "Synchronised batch entropy has no second derivative. Make the LBEModel with "
    "synchronized=False."
)


def result_dtype(dtype: tf.DType) -> tf.DType:
    """float64 for float64, float32 for every other supported dtype."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def check_sizes(x: tf.Tensor, function: str = "batch_entropy") -> tf.Tensor:
    """x, or an `InvalidArgumentError` if it has fewer than 2 samples or no unit.

    At once where the sizes are known, else when the graph runs. XLA drops assertions:
    there only known sizes are checked.
    """
    message = (
        f"{function} needs a batch of at least 2 samples, since the variance of a "
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

    Two passes, `M2 / (N - ddof)`. Where `N <= ddof` the divisor is 1, so that the
    variance is 0 and not NaN.
    """
    count, mean, m2 = moments_of_shard(x)
    return mean, m2 / tf.maximum(count - ddof, 1)


def moments_of_shard(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """N, the mean, and `M2 = sum_n (x_n - mean)^2`, for any N; zeros where N is 0."""
    x = tf.cast(x, result_dtype(x.dtype))
    count = tf.cast(tf.shape(x, out_type=tf.int64)[0], x.dtype)
    # Relative to the first sample, so that a unit that does not vary has a variance of
    # exactly 0: the sum of N equal numbers, divided by N, may be another number. The
    # mean does not depend on what it is relative to, and neither does its gradient.
    first = tf.stop_gradient(x[:1])
    total = tf.reduce_sum(x - first, axis=0)
    mean = tf.reduce_sum(first, axis=0) + total / tf.maximum(count, 1)
    return count, mean, tf.reduce_sum(tf.square(x - mean), axis=0)


def merge_moments(
    gathered: tf.Tensor, widths: list[int], *, ddof: int, scale: float, offset: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """`(mean, variance, count, entropy, valid)`; see `lbe_ops.ops.merge_moments`."""
    layers, dtype = len(widths), gathered.dtype
    layer_of_unit = np.repeat(np.arange(layers), widths)
    counts, means, m2s = tf.split(gathered, [layers, *[sum(widths)] * 2], axis=1)

    def merge(replicas: Sequence[int]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        if len(replicas) == 1:
            return counts[replicas[0]], means[replicas[0]], m2s[replicas[0]]
        left = 1 << (len(replicas) - 1).bit_length() - 1
        a, mean_a, m2_a = merge(replicas[:left])
        b, mean_b, m2_b = merge(replicas[left:])
        wide = tf.cast(a, tf.float64), tf.cast(b, tf.float64)
        share = tf.math.divide_no_nan(wide[1], sum(wide))
        mean_weight, m2_weight, no_a, no_b = (
            tf.gather(each, layer_of_unit)
            for each in (
                tf.cast(share, dtype),
                tf.cast(share * wide[0], dtype),
                a == 0,
                b == 0,
            )
        )
        difference = mean_b - mean_a
        mean = mean_a + difference * mean_weight
        m2 = (m2_a + m2_b) + difference * difference * m2_weight
        return (
            a + b,
            tf.where(no_a, mean_b, tf.where(no_b, mean_a, mean)),
            tf.where(no_a, m2_b, tf.where(no_b, m2_a, m2)),
        )

    count, mean, m2 = merge(range(gathered.shape[0]))
    units = tf.constant(widths, dtype)
    enough = (count >= 2) & (units >= 1)
    freedom = tf.gather(tf.maximum(count - ddof, 1), layer_of_unit)
    known = tf.gather(enough, layer_of_unit)
    variance = tf.where(known, m2 / freedom, 0)
    of_units = unit_entropy(tf.where(known, variance, 1), scale, offset)
    sums = tf.math.unsorted_segment_sum(of_units, layer_of_unit, layers)
    entropy = tf.where(enough, tf.math.divide_no_nan(sums, units), 0)
    return mean, variance, count, entropy, tf.cast(enough, dtype)


def entropy_gradient(
    x: tf.Tensor,
    of_batch: Sequence[tf.Tensor],
    entropy_grad: tf.Tensor,
    *,
    ddof: int,
    scale: float,
    offset: float,
) -> tf.Tensor:
    """The gradient of the entropy of a batch of which x is a shard.

    Args:
        x: the shard `[n, ...]`.
        of_batch: mean, variance and count of the whole batch.
        entropy_grad: of the entropy, a scalar.
        ddof, scale, offset: as for `lbe_ops.batch_entropy`.

    Returns:
        Of the shape of x; 0 where the batch has fewer than two samples. It cannot be
        differentiated, since the statistics are not those of x.
    """
    mean, variance, count = of_batch
    dx = _entropy_gradient(x, mean, variance, count, entropy_grad, ddof, scale, offset)
    return tf.raw_ops.PreventGradient(
        input=tf.cast(dx, x.dtype), message=NO_SECOND_GRADIENT
    )


def epilogue_gradient(
    y: tf.Tensor,
    of_batch: Sequence[tf.Tensor],
    dy: tf.Tensor,
    entropy_grad: tf.Tensor,
    *,
    biases: int,
    activation: str,
    slope: float,
    ddof: int,
    scale: float,
    offset: float,
) -> list[tf.Tensor]:
    """The gradients with respect to z and, if there is one, the bias, likewise.

    Args:
        y: a shard of `activation(z + bias)`.
        of_batch, entropy_grad: as above.
        dy: of y.
        biases: how many there are.
        activation, slope, ddof, scale, offset: as for `lbe_ops.ops.epilogue`.
    """
    mean, variance, count = of_batch
    share = _entropy_gradient(
        y, mean, variance, count, entropy_grad, ddof, scale, offset
    )
    derivative = DERIVATIVES[activation](tf.cast(y, share.dtype), slope)
    dz = derivative * (tf.cast(dy, share.dtype) + share)
    grads = [dz]
    if biases:
        grads.append(tf.reduce_sum(tf.reshape(dz, [-1, tf.shape(dz)[-1]]), axis=0))
    return [
        tf.raw_ops.PreventGradient(
            input=tf.cast(grad, y.dtype), message=NO_SECOND_GRADIENT
        )
        for grad in grads
    ]


def _entropy_gradient(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    count: tf.Tensor,
    entropy_grad: tf.Tensor,
    ddof: int,
    scale: float,
    offset: float,
) -> tf.Tensor:
    unit_shape = tf.shape(x)[1:]
    mean, variance = tf.reshape(mean, unit_shape), tf.reshape(variance, unit_shape)
    units = tf.cast(tf.size(mean), mean.dtype)
    share = tf.math.divide_no_nan(scale * entropy_grad, units * (count - ddof))
    dx = (tf.cast(x, mean.dtype) - mean) / (scale * variance + offset) * share
    return tf.where(count >= 2, dx, tf.zeros_like(dx))


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
    variance, enough = variance_or_one(x, ddof)
    entropy = _mean_over_units(unit_entropy(variance, scale, offset))
    return tf.where(enough, entropy, 0), tf.cast(enough, variance.dtype)


def variance_or_one(x: tf.Tensor, ddof: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The variances of units, and whether there are 2 samples; 1 where there are not.

    So that what is made of them is finite in either case, and its gradient: log(0) and
    the mean of no units are not.
    """
    shape = tf.shape(x, out_type=tf.int64)
    enough = (shape[0] >= 2) & (tf.reduce_prod(shape[1:]) >= 1)
    # Not even a NaN in a sample that does not count may reach the gradient.
    variance = moments(tf.where(enough, x, tf.zeros_like(x)), ddof)[1]
    return tf.where(enough, variance, tf.ones_like(variance)), enough


def _mean_over_units(x: tf.Tensor) -> tf.Tensor:
    """0 where there are none."""
    return tf.math.divide_no_nan(tf.reduce_sum(x), tf.cast(tf.size(x), x.dtype))


def units_to_target(
    variance: tf.Tensor, target: tf.Tensor, scale: float, offset: float
) -> tf.Tensor:
    """`mean_u (H_u - target)^2`: the mean over units of what LBE is of their mean."""
    entropy = unit_entropy(variance, scale, offset)
    return _mean_over_units(tf.square(entropy - target))


# Below a standard deviation of 1e-10 units count as equal to one another. The second
# derivative of the root is still a float32.
TINY_VARIANCE = 1e-20


def std_hinge(
    variance: tf.Tensor, target: tf.Tensor, scale: float, offset: float
) -> tf.Tensor:
    """`mean_u max(0, s - std_u)`, with s the std of a unit whose entropy is `target`.

    The variance term of VICReg (arXiv 2105.04906) and VCReg (arXiv 2306.13292). Its
    gradient with respect to a sample, `-(x_nu - mean_u) / (U (N - ddof) std_u)`, does
    not vanish with the variance, and is 0 where that is 0.
    """
    if offset > 0:
        wanted = offset * tf.math.expm1(2 * target - math.log(offset))
    else:
        wanted = tf.exp(2 * target)
    least = tf.sqrt(tf.nn.relu(wanted / scale) + TINY_VARIANCE)
    return _mean_over_units(tf.nn.relu(least - tf.sqrt(variance + TINY_VARIANCE)))


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
DERIVATIVES: dict[str, Callable[[tf.Tensor, float], tf.Tensor]] = {
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
        if z.shape.rank is None:
            # It refuses a rank of 1, as `ops.epilogue` does where it knows that.
            return ACTIVATIONS[activation](tf.nn.bias_add(z, bias), slope)
        z = z + bias
    return ACTIVATIONS[activation](z, slope)
