# SPDX-License-Identifier: Apache-2.0
"""lbe_ops_numpy: the kernels for NumPy arrays. Bits are tested in test_bits.py."""

import subprocess
import sys

import numpy as np
import oracle
import pytest
from helpers import TOLERANCES, import_numpy_module

lbe_ops_numpy = import_numpy_module()


def test_it_needs_no_tensorflow():
    script = (
        "import sys, lbe_ops_numpy, numpy\n"
        "print(lbe_ops_numpy.batch_entropy(numpy.float32([[0, 1], [2, 1]]))[0])\n"
        "assert 'tensorflow' not in sys.modules and 'lbe_ops' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) == pytest.approx(0.5638664, abs=1e-6)


@pytest.mark.parametrize("formula", [{}, {"ddof": 1, "scale": 3.0, "offset": 0.5}])
def test_values_and_gradients(formula, rng):
    x = rng.normal(size=(40, 3, 5))
    entropy, mean, variance = lbe_ops_numpy.batch_entropy(x, **formula)
    assert mean.shape == variance.shape == (3, 5)
    assert entropy == pytest.approx(oracle.batch_entropy(x, **formula), rel=1e-13)
    a, b = rng.normal(size=(2, 3, 5))
    grad = lbe_ops_numpy.batch_entropy_grad(
        x, mean, variance, 2.0, mean_grad=a, variance_grad=b, **formula
    )
    expected = 2 * oracle.batch_entropy_grad(x, **formula)
    expected += oracle.statistics_grad(x, a, b, formula.get("ddof", 0))
    np.testing.assert_allclose(grad, expected, atol=1e-14)


def test_any_memory_layout(rng):
    x = rng.normal(size=(6, 5, 4)).astype(np.float32)
    for view in (x[::2], x.transpose(1, 0, 2), x[:, :, ::-1], np.asfortranarray(x)):
        entropy, _, _ = lbe_ops_numpy.batch_entropy(view)
        tolerance = TOLERANCES["float32"].statistics
        assert entropy == pytest.approx(oracle.batch_entropy(view), rel=tolerance)


def test_subnormal_numbers_are_flushed_and_the_callers_mode_is_kept():
    tiny = np.float32(1e-45)
    x = np.array([[0.0], [1e-40]], np.float32)
    _, mean, variance = lbe_ops_numpy.batch_entropy(x)
    assert mean[0] == variance[0] == 0
    assert tiny * np.float32(2) > 0


@pytest.mark.parametrize(
    "x, options, error, words",
    [
        (np.int32([[1], [2]]), {}, TypeError, "int32"),
        (np.array(1.0), {}, ValueError, "scalar"),
        (np.zeros((1, 3)), {}, ValueError, "1 samples"),
        (np.zeros((3, 0)), {}, ValueError, "0 units"),
        (np.zeros((3, 2)), {"ddof": 2}, ValueError, "ddof"),
        (np.zeros((3, 2)), {"scale": 0.0}, ValueError, "scale"),
        (np.zeros((3, 2)), {"scale": 1e30}, ValueError, "scale=1e\\+30"),
        (np.zeros((3, 2)), {"offset": float("nan")}, ValueError, "offset=nan"),
        (np.zeros((3, 2)), {"offset": 1e-39}, ValueError, "offset=1e-39"),
        (np.zeros((3, 2), ">f4"), {}, TypeError, "other byte order"),
        (np.zeros((3, 2)), {"threads": 0}, ValueError, "threads"),
    ],
)
def test_bad_arguments(x, options, error, words):
    with pytest.raises(error, match=words):
        lbe_ops_numpy.batch_entropy(x, **options)


def test_no_memory_for_a_contiguous_copy_is_an_error():
    x = np.broadcast_to(np.float32(1), (10**9, 10**6))
    with pytest.raises(MemoryError):
        lbe_ops_numpy.batch_entropy(x)


def test_more_threads_than_work():
    x = np.random.default_rng(0).normal(size=(3000, 200))
    one, *_ = lbe_ops_numpy.batch_entropy(x)
    many, *_ = lbe_ops_numpy.batch_entropy(x, threads=300)
    assert one == many


def test_bad_statistics():
    x = np.zeros((3, 2))
    good = np.zeros(2)
    with pytest.raises(ValueError, match=r"mean must have.*\(3,\)"):
        lbe_ops_numpy.batch_entropy_grad(x, np.zeros(3), good)
    with pytest.raises(ValueError, match="variance must have"):
        lbe_ops_numpy.batch_entropy_grad(x, good, np.zeros((1, 2)))
    with pytest.raises(ValueError, match="together"):
        lbe_ops_numpy.batch_entropy_grad(x, good, good, mean_grad=good)


def test_outputs_of_the_caller(rng):
    """Also x itself, for the gradient."""
    x = rng.normal(size=(12, 5)).astype(np.float32)
    expected = lbe_ops_numpy.batch_entropy(x)
    out = [np.empty(shape, np.float32) for shape in ((), 5, 5)]
    found = lbe_ops_numpy.batch_entropy(x, out=out)
    for given, returned, wanted in zip(out, found, expected, strict=True):
        assert returned is given
        np.testing.assert_array_equal(given, wanted)
    dx = lbe_ops_numpy.batch_entropy_grad(x, *expected[1:])
    assert lbe_ops_numpy.batch_entropy_grad(x, *expected[1:], dx=x) is x
    np.testing.assert_array_equal(x, dx)


def test_bad_outputs():
    x = np.zeros((3, 2), np.float32)
    unit = x[0].copy()
    constant = x.copy()
    constant.flags.writeable = False
    for dx in (x.astype(np.float64), x[:2], np.zeros((2, 3), np.float32).T, constant):
        with pytest.raises(ValueError, match="dx must be a writable array in C order"):
            lbe_ops_numpy.batch_entropy_grad(x, unit, unit, dx=dx)
    with pytest.raises(ValueError, match="Received: 2 arrays"):
        lbe_ops_numpy.batch_entropy(x, out=(unit, unit))
    with pytest.raises(ValueError, match=r"out\[0\] must be"):
        lbe_ops_numpy.batch_entropy(x, out=(unit, unit, unit))


def test_build_info():
    info = lbe_ops_numpy.build_info()
    assert info["tensorflow"].count(".") >= 2 or info["tensorflow"] == "none"
    assert lbe_ops_numpy.simd_level() in info["simd"].split()


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """4.4 GB of float16: 64-bit offsets, and no temporary of x's size."""
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    rows, units = 33_000, 66_000
    assert rows * units > 2**31
    block = np.random.default_rng(0).normal(size=(1000, units)).astype(np.float16)
    x = np.empty((rows, units), np.float16)
    for first in range(0, rows, 1000):
        x[first : first + 1000] = block
    before = peak()
    entropy, mean, variance = lbe_ops_numpy.batch_entropy(x, threads=2)
    assert peak() - before < 0.05 * x.nbytes
    expected_mean, expected_variance = oracle.moments(block)
    np.testing.assert_allclose(mean, expected_mean, atol=1e-6)
    np.testing.assert_allclose(variance, expected_variance, rtol=4e-6)
    assert entropy == pytest.approx(oracle.batch_entropy(block), rel=4e-6)
    # Large enough a gradient of the entropy for float16: the last rows and columns.
    grad = lbe_ops_numpy.batch_entropy_grad(x, mean, variance, 1e9, threads=2)
    assert peak() - before < 1.05 * x.nbytes
    slope = 1e9 * oracle.SCALE / (units * rows * (oracle.SCALE * expected_variance + 1))
    expected = slope * (block.astype(np.float64) - expected_mean)
    for rows_of_x in (slice(0, 1000), slice(rows - 1000, rows)):
        np.testing.assert_allclose(grad[rows_of_x], expected, rtol=1e-3, atol=1e-6)
