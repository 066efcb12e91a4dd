# SPDX-License-Identifier: Apache-2.0
"""The kernels' bits: the canonical tree, whatever the threads and instruction set."""

import hashlib

import numpy as np
import oracle
import pytest
from helpers import TOLERANCES, import_numpy_module, require_native, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

lbe_ops_numpy = import_numpy_module()

THREADS = (1, 2, 7)
# Serial, tiles of columns, parts of rows, both, ragged ends, one row per leaf.
SHAPES = [
    (2, 1),
    (9, 5),
    (129, 70),
    (64, 5000),
    (512, 300),
    (8193, 3),
    (60000, 9),
    (1500, 1100),
    (17000, 130),
    (2100, 4352),  # written around the caches, in every dtype
]


def normal(shape, dtype, seed=0):
    x = np.random.default_rng(seed).normal(0.3, 1.7, shape)
    return x.astype(bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_variance_and_gradient_are_the_canonical_bits(dtype, shape):
    """Every step of the tree redone in NumPy, one IEEE operation at a time."""
    x = normal(shape, dtype)
    wide = x.astype(np.float64 if dtype == "float64" else np.float32)
    mean, m2 = oracle.canonical_moments(wide)
    n, units = shape
    scalar = wide.dtype.type
    variance = m2 / scalar(n - 1)
    share = scalar(-2.5 * (oracle.SCALE / (float(units) * (n - 1))))
    reciprocal = scalar(1) / (variance * scalar(oracle.SCALE) + scalar(1))
    dx = (share * (reciprocal * (wide - mean))).astype(x.dtype)
    for threads in THREADS:
        entropy, *actual = lbe_ops_numpy.batch_entropy(x, ddof=1, threads=threads)
        np.testing.assert_array_equal(actual[0], mean)
        np.testing.assert_array_equal(actual[1], variance)
        expected = oracle.batch_entropy(wide, ddof=1)
        assert abs(entropy / expected - 1) <= TOLERANCES[dtype].statistics
        grad = lbe_ops_numpy.batch_entropy_grad(
            x, *actual, -2.5, ddof=1, threads=threads
        )
        assert grad.dtype == x.dtype
        np.testing.assert_array_equal(grad.view(np.uint8), dx.view(np.uint8))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(2, 3000),
    units=st.integers(1, 90),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_number_of_rows_gives_the_canonical_bits(rows, units, seed):
    x = normal((rows, units), "float32", seed)
    mean, m2 = oracle.canonical_moments(x)
    _, actual_mean, variance = lbe_ops_numpy.batch_entropy(x, threads=3)
    np.testing.assert_array_equal(actual_mean, mean)
    np.testing.assert_array_equal(variance, m2 / np.float32(rows))


def test_a_column_does_not_depend_on_its_neighbours(dtype):
    """Nor on its place in a line, a tile or a tail."""
    x = normal((700, 600), dtype)
    _, mean, variance = lbe_ops_numpy.batch_entropy(x, threads=2)
    for first, last in [(0, 1), (599, 600), (15, 33), (250, 570)]:
        _, some_mean, some_variance = lbe_ops_numpy.batch_entropy(x[:, first:last])
        np.testing.assert_array_equal(some_mean, mean[first:last])
        np.testing.assert_array_equal(some_variance, variance[first:last])


DIGEST = """
import hashlib, json, sys
import numpy as np
from ml_dtypes import bfloat16
import lbe_ops_numpy

digests = {}
for name in ("float16", "bfloat16", "float32", "float64"):
    digest = hashlib.sha256()
    for shape in ((9, 5), (300, 77), (2000, 700), (9000, 40)):
        x = np.random.default_rng(1).normal(0.3, 1.7, shape)
        x[3] *= 1e-6
        x[4, 1:3] = 6e4, -6e-8
        x = x.astype(bfloat16 if name == "bfloat16" else name)
        result = lbe_ops_numpy.batch_entropy(x, threads=2)
        grads = [
            lbe_ops_numpy.batch_entropy_grad(x, *result[1:], g, threads=2)
            for g in (1.0, 3e4, 1e-3)
        ]
        for array in (*result, *grads):
            digest.update(np.asarray(array).tobytes())
    digests[name] = digest.hexdigest()
json.dump({"simd": lbe_ops_numpy.simd_level(), "digests": digests}, sys.stdout)
"""


def test_every_instruction_set_gives_the_same_bits():
    levels = lbe_ops_numpy.build_info()["simd"].split()
    found = [run_script(DIGEST, LBE_OPS_SIMD=level) for level in levels]
    assert found[0]["simd"] == levels[0]
    assert found[-1]["simd"] == lbe_ops_numpy.simd_level()
    for other in found[1:]:
        assert other["digests"] == found[0]["digests"]


TENSORFLOW_DIGEST = """
import hashlib, json, os, sys
import numpy as np
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(os.environ["THREADS"]))
import lbe_ops

digest = hashlib.sha256()
for shape in ((512, 128), (1500, 1100), (60000, 9), (64, 5000)):
    x = tf.constant(np.random.default_rng(0).normal(0.3, 1.7, shape).astype("float32"))
    with tf.GradientTape() as tape:
        tape.watch(x)
        entropy = lbe_ops.batch_entropy(x, native=True)
    for tensor in (entropy, tape.gradient(entropy, x)):
        digest.update(tensor.numpy().tobytes())
json.dump(digest.hexdigest(), sys.stdout)
"""


def test_the_op_gives_the_same_bits_on_1_2_and_7_threads():
    require_native()
    expected = hashlib.sha256()
    for shape in ((512, 128), (1500, 1100), (60000, 9), (64, 5000)):
        x = normal(shape, "float32")
        entropy, mean, variance = lbe_ops_numpy.batch_entropy(x)
        expected.update(entropy.tobytes())
        expected.update(lbe_ops_numpy.batch_entropy_grad(x, mean, variance).tobytes())
    for threads in THREADS:
        found = run_script(TENSORFLOW_DIGEST, THREADS=str(threads))
        assert found == expected.hexdigest()
