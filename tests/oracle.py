# SPDX-License-Identifier: Apache-2.0
"""Batch entropy in float64 NumPy: the independent oracle of the tests.

Written from the definitions (Peer et al., TMLR 2022, arXiv 2208.01134), two passes,
gradient in closed form. `canonical_moments` is the tree of merges, in the dtype that
it is given, for tests of bits.
"""

import math

import numpy as np

SCALE = math.pi * math.e
OFFSET = 1.0

# Each activation of an epilogue and its derivative, as functions of z in float64, the
# ones that have a slope with this one.
SLOPE = 0.3
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


ACTIVATIONS = {
    "linear": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: 1.0 * (z > 0)),
    "leaky_relu": (
        lambda z: np.where(z < 0, SLOPE * z, z),
        lambda z: np.where(z < 0, SLOPE, 1.0),
    ),
    "elu": (
        lambda z: np.where(z < 0, SLOPE * np.expm1(z), z),
        lambda z: np.where(z < 0, SLOPE * np.exp(z), 1.0),
    ),
    "selu": (
        lambda z: SELU_SCALE * np.where(z < 0, SELU_ALPHA * np.expm1(z), z),
        lambda z: SELU_SCALE * np.where(z < 0, SELU_ALPHA * np.exp(z), 1.0),
    ),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    "softplus": (lambda z: np.logaddexp(z, 0), sigmoid),
}


def flat(x):
    """x [N, ...] as float64 [N, U]."""
    x = np.asarray(x).astype(np.float64)
    return x.reshape(len(x), math.prod(x.shape[1:]))


def moments(x, ddof=0):
    """Mean and variance [U]."""
    x = flat(x)
    # Relative to the first row: equal values have a variance of exactly 0.
    mean = x[0] + (x - x[0]).mean(axis=0)
    return mean, ((x - mean) ** 2).sum(axis=0) / (len(x) - ddof)


def unit_entropy(x, ddof=0, scale=SCALE, offset=OFFSET):
    """Entropies [U]."""
    _, variance = moments(x, ddof)
    if offset > 0:
        return 0.5 * (math.log(offset) + np.log1p(scale * variance / offset))
    with np.errstate(divide="ignore"):
        return 0.5 * np.log(scale * variance)


def batch_entropy(x, ddof=0, scale=SCALE, offset=OFFSET):
    return unit_entropy(x, ddof, scale, offset).mean()


def lbe(x, alpha=0.75, alpha_min=0.25, beta=0.5):
    """LBE of a layer with activations x."""
    return beta * (batch_entropy(x) - max(alpha_min, abs(alpha))) ** 2


def batch_entropy_grad(x, ddof=0, scale=SCALE, offset=OFFSET):
    """dH/dx, of x's shape."""
    n, units = flat(x).shape
    mean, variance = moments(x, ddof)
    share, reciprocal = scale / (units * (n - ddof)), 1 / (scale * variance + offset)
    return (share * (reciprocal * (flat(x) - mean))).reshape(np.shape(x))


def statistics_grad(x, mean_grad, variance_grad, ddof=0):
    """Gradient of sum(mean_grad * mean + variance_grad * variance)."""
    n = len(x)
    mean, _ = moments(x, ddof)
    mean_grad, variance_grad = np.ravel(mean_grad), np.ravel(variance_grad)
    grad = mean_grad / n + 2 / (n - ddof) * variance_grad * (flat(x) - mean)
    return grad.reshape(np.shape(x))


def canonical_moments(x):
    """Mean and sum of squares [U] by the canonical tree, in x's own dtype.

    Leaves are 8 rows; T(n) = merge(T(p), T(n - p)), p the largest power of two below
    n. The mean of a shorter leaf is relative to its first row, so that equal values
    have no deviation from it. Every step is one IEEE operation, so that the kernels
    must give these bits.
    """
    dtype = x.dtype.type

    def pairwise(rows):
        a, b, c, d, e, f, g, h = rows
        return ((a + b) + (c + d)) + ((e + f) + (g + h))

    def tree(first, leaves):
        if leaves == 1:
            rows = x[8 * first : 8 * first + 8]
            zeros = np.zeros((8 - len(rows), x.shape[1]), dtype)
            if len(rows) == 8:
                mean = pairwise(rows) / dtype(8)
            else:
                mean = pairwise([*(rows - rows[0]), *zeros]) / dtype(len(rows))
                mean = rows[0] + mean
            squares = (rows - mean) * (rows - mean)
            return len(rows), mean, pairwise([*squares, *zeros])
        p = 1 << ((leaves - 1).bit_length() - 1)
        na, ma, sa = tree(first, p)
        nb, mb, sb = tree(first + p, leaves - p)
        d = mb - ma
        share = nb / (na + nb)
        return na + nb, ma + d * dtype(share), (sa + sb) + d * d * dtype(share * na)

    _, mean, m2 = tree(0, -(-len(x) // 8))
    return mean, m2
