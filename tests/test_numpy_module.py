# SPDX-License-Identifier: Apache-2.0
"""lbe_ops_numpy: the kernels for NumPy arrays. Bits are tested in test_bits.py."""

import doctest
import subprocess
import sys

import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import TOLERANCES, import_numpy_module, signatures, stubbed

lbe_ops_numpy = import_numpy_module()
FORMULA = {"ddof": 1, "scale": 3.0, "offset": 0.25}


def rounded(values, dtype):
    return np.asarray(values).astype(getattr(ml_dtypes, dtype, None) or dtype)


def same_bits(found, expected):
    found, expected = (
        [None if a is None else (a.dtype, a.shape, a.tobytes()) for a in arrays]
        for arrays in (found, expected)
    )
    return found == expected


def test_stub_has_the_names_and_signatures_of_the_module():
    of_stub, of_module = stubbed(), signatures(lbe_ops_numpy)
    assert len(of_module) >= 7
    for name, found in of_module.items():  # none of a class, of a function one
        assert of_stub.pop(name) in (found, 2 * found), name
    # What only a build with CUDA has; test_cuda_arrays.py compares all of it.
    if lbe_ops_numpy.build_info()["cuda"] == "no":
        assert {name.split(".")[0].lower()[:4] for name in of_stub} == {"cuda"}
    else:
        assert not of_stub


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


X = np.zeros((3, 2), np.float32)


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
        (np.zeros((3, 2)), {"workspace": X}, ValueError, "for CUDA arrays"),
        ([[1.0], [2.0]], {}, TypeError, "list"),
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


def unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    copy = memory.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_arrays_that_are_not_aligned(dtype, rng):
    x = rounded(rng.normal(size=(12, 5)), dtype)
    expected = lbe_ops_numpy.batch_entropy(x)
    assert same_bits(lbe_ops_numpy.batch_entropy(unaligned(x)), expected)
    dx = lbe_ops_numpy.batch_entropy_grad(x, *expected[1:])
    statistics = [unaligned(a) for a in expected[1:]]
    assert same_bits([lbe_ops_numpy.batch_entropy_grad(x, *statistics)], [dx])


def test_statistics_are_what_numpy_makes_an_array_of(rng):
    x = rng.normal(size=(12, 2)).astype(np.float32)
    _, mean, variance = lbe_ops_numpy.batch_entropy(x)
    expected = lbe_ops_numpy.batch_entropy_grad(x, mean, variance)
    found = lbe_ops_numpy.batch_entropy_grad(
        x, mean.tolist(), variance.astype(np.float64)[::-1][::-1]
    )
    assert same_bits([found], [expected])


def test_outputs_that_share_memory():
    memory = np.zeros((4, 2), np.float32)
    x, other, unit = memory[:3], memory[1:], np.ones(2, np.float32)
    for arguments, words in (
        ({"dx": other}, "dx shares memory with x"),
        ({"x": other, "dx": x}, "dx shares memory with x"),
        ({"mean": memory[2], "dx": x}, "dx shares memory with mean"),
    ):
        arguments = {"x": x, "mean": unit, "variance": unit, **arguments}
        with pytest.raises(ValueError, match=words):
            lbe_ops_numpy.batch_entropy_grad(**arguments)
    out = np.zeros(3, np.float32)
    for given in ((out[0:1].reshape(()), out[:2], unit), (out[2:].reshape(()), x[0])):
        given = (*given, unit)[:3]
        with pytest.raises(ValueError, match="shares memory"):
            lbe_ops_numpy.batch_entropy(x, out=given)


def test_bad_outputs():
    x = np.zeros((3, 2), np.float32)
    unit = x[0].copy()
    constant = x.copy()
    constant.flags.writeable = False
    for dx, error, words in (
        (x.astype(np.float64), ValueError, "must have.*Received.*float64"),
        (x[:2], ValueError, r"must have.*Received: shape \(2, 2\)"),
        (np.zeros((2, 3), np.float32).T, ValueError, "must be contiguous"),
        (unaligned(x), ValueError, "is not aligned"),
        (constant, ValueError, "is read-only"),
        (x.tolist(), TypeError, "must be a NumPy array: all arrays must lie"),
    ):
        with pytest.raises(error, match=f"dx {words}"):
            lbe_ops_numpy.batch_entropy_grad(x, unit, unit, dx=dx)
    with pytest.raises(ValueError, match="Received: 2 arrays"):
        lbe_ops_numpy.batch_entropy(x, out=(unit, unit))
    with pytest.raises(ValueError, match=r"out\[0\] must have"):
        lbe_ops_numpy.batch_entropy(x, out=(unit, unit, unit))


def epilogue_inputs(rng, shape, dtype, has_bias):
    """z, bias, dy; |z + bias| >= 1/4: where rounding does not decide about a kink."""
    z = rounded(rng.normal(0, 2, shape), dtype)
    bias = rounded(rng.normal(size=shape[-1]), dtype) if has_bias else None
    total = z.astype(np.float64) + (0 if bias is None else bias.astype(np.float64))
    z = rounded(np.where(np.abs(total) < 0.25, z.astype(np.float64) + 0.75, z), dtype)
    return z, bias, rounded(rng.normal(size=shape), dtype)


def run_epilogue(z, bias, dy, y=None, dz=None, **options):
    """Everything that the epilogue and its gradient return."""
    y, *statistics = lbe_ops_numpy.epilogue(z, bias, y=y, **options)
    dz, dbias = lbe_ops_numpy.epilogue_grad(
        dy, y, *statistics[1:], 50.0, bias_grad=bias is not None, dz=dz, **options
    )
    return y, *statistics, dz, dbias


@pytest.mark.parametrize(
    "shape, has_bias", [((9, 5), True), ((70, 33), False), ((33, 3, 5, 6), True)]
)
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_epilogue(dtype, tolerance, activation, shape, has_bias, rng):
    z, bias, dy = epilogue_inputs(rng, shape, dtype, has_bias)
    options = {"activation": activation, "slope": oracle.SLOPE, **FORMULA}
    y, *statistics, dz, dbias = run_epilogue(z, bias, dy, **options)
    assert (y.dtype, dz.dtype) == (z.dtype, z.dtype)
    value, derivative = oracle.ACTIVATIONS[activation]
    total = z.astype(np.float64) + (bias.astype(np.float64) if has_bias else 0)

    def assert_close(found, expected, relative):
        error = np.abs(found.astype(np.float64) - expected).max()
        assert error <= relative * (np.abs(expected).max() + 1e-3)

    assert_close(y, value(total), 4 * tolerance.grad)
    # The statistics are those of y as it is stored.
    assert same_bits(statistics, lbe_ops_numpy.batch_entropy(y, **FORMULA))
    stored = y.astype(np.float64)
    expected = oracle.batch_entropy(stored, **FORMULA)
    assert abs(float(statistics[0]) - expected) <= 10 * tolerance.statistics
    share = 50 * oracle.batch_entropy_grad(stored, **FORMULA)
    expected_dz = derivative(total) * (dy.astype(np.float64) + share)
    assert_close(dz, expected_dz, 8 * tolerance.grad)
    if not has_bias:
        assert dbias is None
        return
    expected = expected_dz.reshape(-1, shape[-1])
    # Relative to what is added up, which may cancel.
    allowed = 8 * tolerance.grad * (np.abs(expected).sum(axis=0).max() + 1e-3)
    assert np.abs(dbias.astype(np.float64) - expected.sum(axis=0)).max() <= allowed


@pytest.mark.parametrize("has_bias", [False, True])
def test_epilogue_has_the_same_bits_in_place_and_on_threads(dtype, has_bias, rng):
    """Rows for several parts of a sum, units for several tiles."""
    z, bias, dy = epilogue_inputs(rng, (700, 3, 700), dtype, has_bias)
    for activation in ("linear", "relu", "tanh"):
        expected = run_epilogue(z, bias, dy, activation=activation)
        for threads in (1, 2, 5):
            options = {"activation": activation, "threads": threads}
            y, dz = z.copy(), dy.copy()
            found = run_epilogue(y, bias, dz, y=y, dz=dz, **options)
            assert found[0] is y and found[4] is dz
            assert same_bits(found, expected)
            dz, dbias = lbe_ops_numpy.epilogue_grad(
                *(dy, y, *found[2:4], 50.0), bias_grad=has_bias, dz=y, **options
            )
            assert dz is y
            assert same_bits([dz, dbias], expected[4:])


def test_epilogue_writes_to_arrays_of_the_caller(rng):
    z, bias, dy = epilogue_inputs(rng, (12, 5), "float32", True)
    expected = run_epilogue(z, bias, dy, activation="elu", slope=0.5)
    y, dz = np.empty_like(z), np.empty_like(z)
    out = [np.empty(shape, np.float32) for shape in ((), 5, 5)]
    dbias = np.empty_like(bias)
    options = {"activation": "elu", "slope": 0.5}
    found = lbe_ops_numpy.epilogue(z, bias, y=y, out=out, **options)
    assert all(a is b for a, b in zip(found, (y, *out), strict=True))
    # An array for dbias says that it is wanted.
    grads = lbe_ops_numpy.epilogue_grad(
        dy, y, *out[1:], np.float32(50), dz=dz, dbias=dbias, **options
    )
    assert grads[0] is dz and grads[1] is dbias
    assert same_bits([*found, *grads], expected)


def test_epilogue_without_activation_and_bias(rng):
    """The statistics of z, and dz = dy + their gradient."""
    z = rng.normal(size=(12, 5))
    y, *statistics = lbe_ops_numpy.epilogue(z)
    assert y is not z
    assert same_bits([y, *statistics], [z, *lbe_ops_numpy.batch_entropy(z)])
    dz, dbias = lbe_ops_numpy.epilogue_grad(np.ones_like(y), y, *statistics[1:])
    expected = 1 + lbe_ops_numpy.batch_entropy_grad(z, *statistics[1:])
    np.testing.assert_allclose(dz, expected, rtol=1e-14)
    assert dbias is None


def test_epilogue_of_any_memory_layout(rng):
    z, bias, dy = epilogue_inputs(rng, (12, 5), "float32", True)
    expected = run_epilogue(z, bias, dy, activation="relu")
    strided = np.repeat(bias, 2)[::2]
    found = run_epilogue(
        np.asfortranarray(z), strided, np.asfortranarray(dy), activation="relu"
    )
    assert same_bits(found, expected)


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_nan_and_infinity_in_an_epilogue(dtype, activation):
    z = rounded([[np.nan, 1.0, 300.0], [0.5, -300.0, 1.0]], dtype)
    y, entropy, _, _ = lbe_ops_numpy.epilogue(
        z, activation=activation, slope=oracle.SLOPE
    )
    value, _ = oracle.ACTIVATIONS[activation]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = value(z.astype(np.float64))
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=1e-2, atol=1e-30)
    assert np.isnan(entropy)


Z, UNIT = np.ones((3, 2), np.float32), np.ones(2, np.float32)


@pytest.mark.parametrize(
    "z, bias, options, error, words",
    [
        (Z, None, {"activation": "gelu"}, ValueError, "'linear'.*'softplus'.*'gelu'"),
        (Z, None, {"activation": None}, ValueError, "one of.*Received: None"),
        (Z, None, {"slope": -0.5}, ValueError, "slope.*-0.5"),
        (Z, None, {"slope": np.nan}, ValueError, "slope.*nan"),
        (Z, None, {"slope": np.inf}, ValueError, "slope.*inf"),
        (Z, None, {"ddof": 2}, ValueError, "ddof"),
        (Z, None, {"threads": 0}, ValueError, "threads"),
        (Z[:1], None, {}, ValueError, "z must have at least 2 samples"),
        (np.float32(1), None, {}, TypeError, "z must be a NumPy array"),
        (Z.tolist(), None, {}, TypeError, "z must be a NumPy array.*list"),
        (Z.astype(int), None, {}, TypeError, "z must be a float16.*int64"),
        (Z, Z[0, :1], {}, ValueError, r"bias must have shape \(2,\).*shape \(1,\)"),
        (Z, Z, {}, ValueError, r"bias must have.*last dimension.*shape \(3, 2\)"),
        (UNIT, UNIT, {}, ValueError, r"z must have.*channels\].*shape \(2,\)"),
        (UNIT, UNIT[:1], {}, ValueError, "z must have.*channels"),
        (Z, UNIT.astype(float), {}, ValueError, "bias.*float32.*Received.*float64"),
        (Z, None, {"y": Z[:2]}, ValueError, "y must have.*those of z"),
        (Z, None, {"y": Z.astype(np.float64)}, ValueError, "y must have.*float64"),
        (Z, None, {"y": np.broadcast_to(UNIT, (3, 2))}, ValueError, "y is read-only"),
        (Z, Z[0], {"y": Z}, ValueError, "y shares memory with bias"),
        (Z[:2], None, {"y": Z[1:]}, ValueError, "y shares memory with z"),
        (Z, None, {"out": (UNIT,)}, ValueError, "Received: 1 arrays"),
        (Z, None, {"stream": 1}, ValueError, "for CUDA arrays"),
    ],
)
def test_bad_arguments_of_an_epilogue(z, bias, options, error, words):
    with pytest.raises(error, match=words):
        lbe_ops_numpy.epilogue(z, bias, **options)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"dy": Z[:2]}, ValueError, "dy must have.*those of y.*Received: shape"),
        ({"dy": Z.astype(float)}, ValueError, "dy must have.*float64"),
        ({"y": Z[:1], "dy": Z[:1]}, ValueError, "y must have at least 2 samples"),
        ({"mean": Z}, ValueError, r"mean must have.*y.shape\[1:\]"),
        ({"entropy_grad": "1"}, TypeError, "real number"),
        ({"activation": "gelu"}, ValueError, "Received: 'gelu'"),
        ({"slope": -1.0}, ValueError, "slope"),
        ({"dz": Z[:2]}, ValueError, "dz must have"),
        (
            {"dy": UNIT, "y": UNIT, "mean": 0, "variance": 0, "bias_grad": True},
            *(ValueError, "y must have.*channels"),
        ),
        ({"dbias": UNIT.astype(float)}, ValueError, "dbias must have.*float64"),
        ({"dbias": Z}, ValueError, r"dbias must have.*shape \(2,\)"),
        ({"dbias": Z[0]}, ValueError, "dbias shares memory with (y|dy)"),
        ({"y": Z[:2], "dy": Z[1:], "dz": Z[:2]}, ValueError, "dz shares memory"),
    ],
)
def test_bad_arguments_of_the_epilogues_gradient(arguments, error, words):
    arguments = {"dy": Z, "y": Z, "mean": UNIT, "variance": UNIT, **arguments}
    with pytest.raises(error, match=words):
        lbe_ops_numpy.epilogue_grad(**arguments)


def test_the_examples_of_the_docstrings():
    for function in (
        lbe_ops_numpy.batch_entropy,
        lbe_ops_numpy.epilogue,
        lbe_ops_numpy.epilogue_grad,
    ):
        runner = doctest.DocTestRunner()
        for test in doctest.DocTestFinder().find(
            function,
            function.__name__,
            globs={"np": np, "lbe_ops_numpy": lbe_ops_numpy},
        ):
            runner.run(test)
        assert runner.tries and not runner.failures


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
