# SPDX-License-Identifier: Apache-2.0
"""The oracle itself, against values worked out by hand and finite differences."""

import numpy as np
import oracle
import pytest

X = np.array([[0.0, 1.0], [2.0, 1.0]])


def test_hand_worked_values():
    mean, variance = oracle.moments(X)
    assert mean.tolist() == [1.0, 1.0]
    assert variance.tolist() == [1.0, 0.0]
    assert oracle.moments(X, ddof=1)[1].tolist() == [2.0, 0.0]
    # ln(pi e + 1) / 4, by hand.
    assert oracle.batch_entropy(X) == pytest.approx(0.5638664, abs=1e-7)
    # The differential entropy of a Gaussian of variance 1 is ln(2 pi e) / 2.
    gaussian = oracle.batch_entropy(X[:, :1], scale=2 * np.pi * np.e, offset=0)
    assert gaussian == pytest.approx(1.4189385, abs=1e-7)
    # pi e / (2 * 2 * (pi e + 1)) = 0.2237938
    grad = oracle.batch_entropy_grad(X)
    assert grad == pytest.approx(np.array([[-0.2237938, 0], [0.2237938, 0]]), abs=1e-7)


def difference(function, x, step=1e-6):
    grad = np.empty_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        grad[index] = (function(up) - function(down)) / (2 * step)
    return grad


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("offset", [0.0, 0.5, 1.0])
def test_gradients_are_those_of_the_values(ddof, offset, rng):
    x = rng.normal(size=(5, 2, 3))
    grad = oracle.batch_entropy_grad(x, ddof, offset=offset)
    expected = difference(lambda x: oracle.batch_entropy(x, ddof, offset=offset), x)
    np.testing.assert_allclose(grad, expected, atol=1e-8)

    a, b = rng.normal(size=(2, 6))

    def weighted(x):
        mean, variance = oracle.moments(x, ddof)
        return (a * mean + b * variance).sum()

    np.testing.assert_allclose(
        oracle.statistics_grad(x, a, b, ddof), difference(weighted, x), atol=1e-8
    )


@pytest.mark.parametrize("n", [1, 7, 8, 9, 24, 100, 129])
def test_the_tree_computes_moments(n, rng):
    x = rng.normal(3, 2, size=(n, 4))
    mean, m2 = oracle.canonical_moments(x)
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(m2, x.var(axis=0) * n, rtol=1e-12, atol=1e-14)
