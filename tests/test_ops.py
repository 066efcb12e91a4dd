# SPDX-License-Identifier: Apache-2.0
"""batch_entropy and unit_statistics on every path and dtype, against the oracle."""

import doctest
import itertools
import math

import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import (
    DTYPES,
    TOLERANCES,
    Tolerance,
    assert_grad,
    assert_statistics,
    import_numpy_module,
    require_native,
    require_xla,
    tensor,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import lbe_ops
from lbe_ops import native, ops

SHAPES = [(2,), (2, 1), (3, 5), (8, 16), (17, 7, 3), (33, 64), (100, 65), (300, 2, 9)]
FORMULAS = [
    {"ddof": 0, "scale": oracle.SCALE, "offset": 1.0},
    {"ddof": 1, "scale": 2 * math.pi * math.e, "offset": 0.0},
    {"ddof": 1, "scale": 3.0, "offset": 0.25},
]


def value_and_grad(path, x, weight=1.0, **formula):
    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            entropy = lbe_ops.batch_entropy(x, **formula)
            loss = entropy * tf.cast(weight, entropy.dtype)
        return entropy, tape.gradient(loss, x)

    return path.run(function, x)


def result_dtype(dtype):
    return tf.float64 if dtype == "float64" else tf.float32


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f"offset={f['offset']}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entropy_and_gradient(device, path, dtype, tolerance, shape, formula, rng):
    x, exact = tensor(rng.normal(0.5, 2, shape), dtype)
    entropy, grad = value_and_grad(path, x, weight=-3.0, **formula)
    assert entropy.dtype == result_dtype(dtype)
    assert entropy.shape == ()
    assert grad.dtype == x.dtype
    # Entropies of units of either sign may cancel: relative to their size.
    entropies = oracle.unit_entropy(exact, **formula)
    assert_statistics(
        entropy, entropies.mean(), tolerance, np.abs(entropies).mean() + 1
    )
    assert_grad(grad, -3.0 * oracle.batch_entropy_grad(exact, **formula), tolerance)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unit_statistics_and_their_gradients(
    device, path, dtype, tolerance, shape, ddof, rng
):
    x, exact = tensor(rng.normal(0.5, 2, shape), dtype)
    a, b, c = rng.normal(size=(3, *shape[1:])).astype(result_dtype(dtype).name)

    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            statistics = lbe_ops.unit_statistics(x, ddof=ddof)
            mean, variance, entropy = statistics
            loss = tf.reduce_sum(a * mean + b * variance + c * entropy)
        return *statistics, tape.gradient(loss, x)

    mean, variance, entropy, grad = path.run(function, x)
    expected_mean, expected_variance = oracle.moments(exact, ddof)
    assert mean.shape == variance.shape == entropy.shape == shape[1:]
    assert_statistics(tf.reshape(mean, [-1]), expected_mean, tolerance, 5.0)
    assert_statistics(tf.reshape(variance, [-1]), expected_variance, tolerance)
    assert_statistics(
        tf.reshape(entropy, [-1]), oracle.unit_entropy(exact, ddof), tolerance
    )
    slope = oracle.SCALE / (2 * (oracle.SCALE * expected_variance + 1))
    expected = oracle.statistics_grad(exact, a, b.ravel() + c.ravel() * slope, ddof)
    assert_grad(grad, expected, tolerance)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_shape_and_values(dtype, data):
    """Native and reference agree with the oracle whatever the shape and values."""
    require_native()
    width = 32 if dtype == "float32" else 64
    bound = 1e3
    array = data.draw(
        hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=40).map(
                lambda shape: (shape[0] + 1, *shape[1:])
            ),
            elements=st.floats(-bound, bound, width=width),
        )
    )
    # Means are rounded relative to the values, and their differences enter the
    # variance multiplied by the standard deviation.
    epsilon = 32 * np.finfo(dtype).eps
    flushed = 64 * np.finfo(dtype).tiny  # subnormal numbers count as zero
    largest = np.abs(array).max()
    mean, variance = oracle.moments(array)
    allowed = variance + largest * np.sqrt(variance) + epsilon * largest**2
    for use_native in (True, False):
        statistics = lbe_ops.unit_statistics(array, native=use_native)
        error = np.abs(np.ravel(statistics.mean) - mean)
        assert (error <= epsilon * largest + flushed).all()
        error = np.abs(np.ravel(statistics.variance) - variance)
        assert (error <= epsilon * allowed + flushed).all()


@pytest.mark.parametrize(
    "name, bound",
    [
        ("N(0, 1)", 2e-7),
        ("mean 1e2, sd 1", 7e-7),
        ("mean 1e4, sd 1", 8e-5),
        ("mean 1e3, sd 1e-2", 5e-4),
        ("ReLU, 1 % active", 2e-7),
        ("outlier in row 0", 3e-7),
    ],
)
def test_hard_data_in_float32(name, bound, native_ops, rng):
    """The largest relative error of a variance, N = 4096, as the tree allows it."""
    x = rng.normal(size=(4096, 64))
    if name.startswith("mean"):
        mean, sd = (float(part.split()[1]) for part in name.split(","))
        x = mean + sd * x
    elif name.startswith("ReLU"):
        x = np.maximum(x - 2.326, 0)
    elif name.startswith("outlier"):
        x[0] = 1e4
    x = x.astype(np.float32)
    _, expected = oracle.moments(x)
    variance = lbe_ops.unit_statistics(x, native=True).variance.numpy()
    # The bounds are what the tree showed on one sample of such data; this is another.
    assert np.max(np.abs(variance / expected - 1)) <= 1.5 * bound


def test_tiny_variances_are_not_lost(path):
    """h = 1/2 log1p(pi e v) of v = 1e-10 is far below float32's epsilon."""
    x = tf.constant([[-1e-5], [1e-5]])
    entropy, _ = value_and_grad(path, x)
    assert float(entropy) == pytest.approx(0.5 * oracle.SCALE * 1e-10, rel=1e-5)


def test_dead_units_have_a_finite_gradient(device, path, dtype):
    x, _ = tensor(np.zeros((4, 3)), dtype)
    entropy, grad = value_and_grad(path, x)
    assert float(entropy) == 0
    assert np.asarray(tf.cast(grad, tf.float64)).tolist() == np.zeros((4, 3)).tolist()


CONSTANTS = [7.1310568, -0.1, 1 / 3, 1e-3, 48000.0]


def test_a_unit_that_does_not_vary_has_a_variance_of_exactly_zero(path, dtype):
    """Whatever N: the mean of N equal numbers must be that number."""
    formula = {"scale": 80.0, "offset": 1.3e-3}

    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            entropy = lbe_ops.batch_entropy(x, **formula)
        without_offset = lbe_ops.batch_entropy(x, offset=0.0)
        mean, variance, _ = lbe_ops.unit_statistics(x)
        return entropy, tape.gradient(entropy, x), without_offset, mean, variance

    # XLA compiles anew for every N: a few do there.
    sizes = range(2, 41) if path.mode != "xla" else (2, 3, 5, 7, 10, 13, 25, 40)
    for n in sizes:
        x, exact = tensor(np.tile(CONSTANTS, (n, 1)), dtype)
        entropy, grad, without_offset, mean, variance = path.run(function, x)
        assert float(entropy) == pytest.approx(0.5 * math.log(1.3e-3), rel=1e-6)
        assert without_offset == -np.inf
        np.testing.assert_array_equal(mean, exact[0].astype(mean.dtype.name))
        np.testing.assert_array_equal(variance, np.zeros(len(CONSTANTS)))
        np.testing.assert_array_equal(tf.cast(grad, tf.float64), np.zeros_like(exact))
        assert oracle.moments(exact)[1].tolist() == [0.0] * len(CONSTANTS)


@pytest.mark.parametrize("offset", [1.0, 0.0])
@pytest.mark.parametrize("size", [1e18, 1e-15])
def test_the_gradient_of_huge_and_tiny_activations(path, dtype, size, offset, rng):
    """dx of 1e-22, whose factors times each other float32 cannot hold."""
    if dtype == "float16":
        pytest.skip("float16 holds no such numbers")
    if size > 1 and not path.native and dtype != "float64":
        pytest.skip("TensorFlow multiplies the factors of a gradient: see Limits")
    x, exact = tensor(rng.normal(scale=size, size=(100, 50)), dtype)
    entropy, grad = value_and_grad(path, x, offset=offset)
    # Logarithms of 40 are added, and the float32 squares of 1e-15 are tiny.
    assert_statistics(
        entropy, oracle.batch_entropy(exact, offset=offset), Tolerance(2e-5, 0, 0)
    )
    expected = oracle.batch_entropy_grad(exact, offset=offset)
    assert 0 < np.abs(expected).max() < (1e-20 if size > 1 else np.inf)
    assert_grad(grad, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_the_gradient_of_an_epilogue_of_huge_activations(path, activation, rng):
    if not path.native:
        pytest.skip("TensorFlow multiplies the factors of a gradient: see Limits")
    x, exact = tensor(rng.normal(scale=1e18, size=(100, 50)), "float32")

    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            _, entropy, _ = ops.epilogue(x, activation=activation)
        return tape.gradient(entropy, x)

    y = exact if activation == "linear" else np.maximum(exact, 0)
    expected = oracle.batch_entropy_grad(y) * (1 if activation == "linear" else y > 0)
    assert_grad(path.run(function, x), expected, TOLERANCES["float32"])


@pytest.mark.parametrize("unit", [3, 37], ids=["in a full line", "in the tail"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_come_out_as_nan(device, path, dtype, value, unit, rng):
    values = rng.normal(size=(9, 38))
    values[4, unit] = value
    x, _ = tensor(values, dtype)
    entropy, grad = value_and_grad(path, x)
    assert np.isnan(float(entropy))
    grad = np.asarray(tf.cast(grad, tf.float64))
    assert np.isnan(grad[:, unit]).all()
    assert np.isfinite(np.delete(grad, unit, axis=1)).all()
    variance = np.asarray(path.run(lbe_ops.unit_statistics, x).variance)
    assert np.isnan(variance[unit])
    assert np.isfinite(np.delete(variance, unit)).all()


def test_no_offset_and_no_variance_is_minus_infinity(path):
    x = tf.constant([[1.0, 1.0], [1.0, 3.0]])

    def function(x):
        return lbe_ops.unit_statistics(x, scale=2 * math.pi * math.e, offset=0.0)

    entropy = path.run(function, x).entropy.numpy()
    assert entropy[0] == -np.inf
    assert entropy[1] == pytest.approx(0.5 * math.log(2 * math.pi * math.e))


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f"offset={f['offset']}")
def test_gradient_of_the_gradient(device, path, dtype, tolerance, formula, rng):
    """Against finite differences of the oracle's gradient."""
    x, exact = tensor(rng.normal(size=(5, 3)), dtype)
    weights, direction = tensor(rng.normal(size=(5, 3)), dtype)

    def function(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = lbe_ops.batch_entropy(x, **formula) ** 2
            product = tf.reduce_sum(inner.gradient(loss, x) * weights)
        return outer.gradient(product, x)

    def first(x):
        entropy = oracle.batch_entropy(x, **formula)
        return 2 * entropy * oracle.batch_entropy_grad(x, **formula)

    step = 1e-5
    expected = first(exact + step * direction) - first(exact - step * direction)
    actual = np.asarray(tf.cast(path.run(function, x), tf.float64))
    # Two gradients are rounded to x's dtype on the way; 1e-8 is the differences'.
    bound = 10 * (tolerance.grad + tolerance.grad_atol) + 1e-8
    np.testing.assert_allclose(actual, expected / (2 * step), atol=bound)


def test_third_derivative(native_ops, rng):
    x = tf.constant(rng.normal(size=(4, 3)))

    def third(native):
        with tf.GradientTape() as c:
            c.watch(x)
            with tf.GradientTape() as b:
                b.watch(x)
                with tf.GradientTape() as a:
                    a.watch(x)
                    h = lbe_ops.batch_entropy(x, native=native)
                g = tf.reduce_sum(tf.sin(x) * a.gradient(h, x))
            g = tf.reduce_sum(tf.cos(x) * b.gradient(g, x))
        return c.gradient(g, x)

    np.testing.assert_allclose(third(True), third(False), atol=1e-12)


def test_gradient_of_statistics_gradient(path, rng):
    exact = rng.normal(size=(5, 3))
    a, b, direction = rng.normal(size=3), rng.normal(size=3), rng.normal(size=(5, 3))

    def function(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                mean, variance, _ = lbe_ops.unit_statistics(x)
                loss = tf.reduce_sum(a * mean + b * variance**2)
            product = tf.reduce_sum(inner.gradient(loss, x) * direction)
        return outer.gradient(product, x)

    def first(x):
        return oracle.statistics_grad(x, a, 2 * b * oracle.moments(x)[1])

    step = 1e-6
    expected = (first(exact + step * direction) - first(exact - step * direction)) / (
        2 * step
    )
    np.testing.assert_allclose(path.run(function, exact), expected, atol=1e-8)


SIZES = [(0, 3), (1, 3), (1,), (0,), (4, 0), (4, 2, 0)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_too_few_samples_or_units_fail(device, path, dtype, shape):
    x = tf.zeros(shape, dtype)
    for function in (lbe_ops.batch_entropy, lbe_ops.unit_statistics):
        with pytest.raises(tf.errors.InvalidArgumentError, match="at least"):
            path.run(function, x)


@pytest.mark.parametrize("native_op", [True, False])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_too_few_samples_or_units_fail_where_shapes_are_unknown(native_op, shape):
    if native_op:
        require_native()

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def function(x):
        return lbe_ops.batch_entropy(x, native=native_op)

    with pytest.raises(tf.errors.InvalidArgumentError, match="at least"):
        function(tf.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_or_zero_keeps_the_gradient_from_a_sample_that_does_not_count(path, value):
    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            entropy, valid = ops.batch_entropy_or_zero(x)
            loss = valid * (entropy - 3) ** 2
        return loss, tape.gradient(loss, x)

    loss, grad = path.run(function, tf.constant([[1.0, value]]))
    assert float(loss) == 0
    assert grad.numpy().tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("native_op", [True, False])
def test_a_scalar_of_unknown_rank_fails(native_op):
    if native_op:
        require_native()

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def function(x):
        return lbe_ops.batch_entropy(x, native=native_op)

    with pytest.raises(tf.errors.InvalidArgumentError, match="Received: a scalar"):
        function(1.0)


def test_sizes_that_overflow_fail(native_ops):
    with pytest.raises(tf.errors.InvalidArgumentError):
        lbe_ops.batch_entropy(tf.zeros((0, 2**40, 2**40)), native=True)


@pytest.mark.parametrize("offset", [1.0, 0.0])
@pytest.mark.parametrize("shape", [*SIZES, (2, 3)], ids=str)
def test_or_zero_adds_nothing_for_small_batches(device, path, dtype, shape, offset):
    x = tf.random.stateless_normal(shape, [1, 2], dtype=tf.float64)
    x = tf.cast(x, dtype)

    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            entropy, valid = ops.batch_entropy_or_zero(x, offset=offset)
            loss = valid * (entropy - 3) ** 2
        return entropy, valid, loss, tape.gradient(loss, x)

    entropy, valid, loss, grad = path.run(function, x)
    enough = shape == (2, 3)
    assert float(valid) == enough
    assert (float(entropy) != 0) == enough
    assert (float(loss) > 0) == enough
    assert grad.shape == x.shape
    assert np.isfinite(np.asarray(tf.cast(grad, tf.float64))).all()
    assert np.any(np.asarray(tf.cast(grad, tf.float64)) != 0) == enough


def test_unknown_shapes(native_ops, rng):
    exact = rng.normal(size=(6, 4, 5)).astype(np.float32)

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def function(x):
        statistics = lbe_ops.unit_statistics(x, native=True)
        assert statistics.mean.shape.rank is None
        return lbe_ops.batch_entropy(x, native=True), tf.gradients(
            lbe_ops.batch_entropy(x, native=True), x
        )

    for x in (exact, exact[:3, :, 0], exact[:, 0, 0]):
        entropy, (grad,) = function(x)
        assert_statistics(entropy, oracle.batch_entropy(x), TOLERANCES["float32"])
        assert_grad(grad, oracle.batch_entropy_grad(x), TOLERANCES["float32"])


def test_shape_function(native_ops):
    shapes = {}

    @tf.function(input_signature=[tf.TensorSpec((None, 4, None))])
    def function(x):
        statistics = lbe_ops.unit_statistics(x, native=True)
        entropy = lbe_ops.batch_entropy(x, native=True)
        shapes["mean"] = statistics.mean.shape.as_list()
        shapes["entropy"] = entropy.shape.as_list()
        shapes["grad"] = tf.gradients(entropy, x)[0].shape.as_list()

    function.get_concrete_function()
    assert shapes == {"mean": [4, None], "entropy": [], "grad": [None, 4, None]}


def test_in_loops_and_conditions(path, rng):
    exact = rng.normal(size=(8, 4))

    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.zeros((), x.dtype)
            for k in tf.range(3):
                total += lbe_ops.batch_entropy(x * tf.cast(k + 1, x.dtype))
            if total > 0:
                total += lbe_ops.batch_entropy(x)
        return total, tape.gradient(total, x)

    if path.mode != "eager":
        function = tf.autograph.to_graph(function)
    total, grad = path.run(function, exact)
    factors = [1, 2, 3, 1]
    expected = sum(oracle.batch_entropy(exact * k) for k in factors)
    assert float(total) == pytest.approx(expected, rel=1e-12)
    expected_grad = sum(k * oracle.batch_entropy_grad(exact * k) for k in factors)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-12)


def test_every_dtype_that_the_op_admits_has_kernels(native_ops):
    """The op's signature, the kernels and the public list of dtypes are the same."""
    from tensorflow.python.framework import kernels, op_def_registry

    for dtype in ops.DTYPES:
        x = tf.cast([[0.0, 1.0], [2.0, 1.0]], dtype)
        result = result_dtype(dtype.name)
        entropy, mean, variance, _ = native_ops.lbe_batch_entropy(x, result_type=result)
        assert float(entropy) == pytest.approx(0.5638664)
        grad = native_ops.lbe_batch_entropy_grad(x, mean, variance, entropy, [], [])
        assert grad.dtype == dtype

    # Kernels for the GPU are registered where there is none, too.
    cuda = import_numpy_module().build_info()["cuda"]
    devices = {"CPU", "GPU"} if cuda.startswith("CUDA") else {"CPU"}
    if not native.load().xla_reason:
        devices |= {"XLA_CPU_JIT", "XLA_GPU_JIT"}
    for name in ("LBE>BatchEntropy", "LBE>BatchEntropyGrad"):
        definition = op_def_registry.get(name)
        (attribute,) = [a for a in definition.attr if a.name == "T"]
        admitted = {tf.as_dtype(t) for t in attribute.allowed_values.list.type}
        assert admitted == set(ops.DTYPES) == {tf.as_dtype(name) for name in DTYPES}
        registered = {
            (kernel.device_type, tf.as_dtype(t))
            for kernel in kernels.get_registered_kernels_for_op(name).kernel
            for constraint in kernel.constraint
            for t in constraint.allowed_values.list.type
        }
        assert registered == set(itertools.product(devices, ops.DTYPES))


def test_the_ops_defaults_are_the_public_defaults(native_ops):
    x = tf.constant([[0.0, 1.0], [2.0, 1.0]])
    defaults = native_ops.lbe_batch_entropy(x).entropy
    assert float(defaults) == float(lbe_ops.batch_entropy(x, native=True))
    from tensorflow.python.framework import op_def_registry

    (scale,) = [
        a for a in op_def_registry.get("LBE>BatchEntropy").attr if a.name == "scale"
    ]
    assert float(scale.default_value.s) == ops.SCALE


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (([[1, 2], [3, 4]],), TypeError, "int32"),
        ((1.0,), ValueError, "scalar"),
        (([[1.0], [2.0]], {"ddof": 2}), ValueError, "ddof.*2"),
        (([[1.0], [2.0]], {"ddof": 0.5}), ValueError, "ddof"),
        (([[1.0], [2.0]], {"scale": 0.0}), ValueError, "scale"),
        (([[1.0], [2.0]], {"scale": 1e39}), ValueError, "scale.*1e\\+39"),
        (([[1.0], [2.0]], {"scale": "3"}), TypeError, "scale.*'3'"),
        (([[1.0], [2.0]], {"offset": 1e-39}), ValueError, "offset.*1e-39"),
        (([[1.0], [2.0]], {"scale": math.nan}), ValueError, "scale"),
        (([[1.0], [2.0]], {"offset": -1.0}), ValueError, "offset"),
        (([[1.0], [2.0]], {"offset": math.inf}), ValueError, "offset"),
        (([[1.0], [2.0]], {"native": 1}), TypeError, "native"),
    ],
)
def test_bad_arguments_name_what_was_received(arguments, error, words):
    x, options = arguments if len(arguments) == 2 else (*arguments, {})
    for function in (
        lbe_ops.batch_entropy,
        lbe_ops.unit_statistics,
        ops.batch_entropy_or_zero,
    ):
        with pytest.raises(error, match=words):
            function(tf.constant(x), **options)


@pytest.mark.parametrize(
    "attributes, words",
    [
        ({"scale": "a lot"}, "scale must be a finite number"),
        ({"scale": "-1"}, "scale from 1e-12"),
        ({"offset": "1e-39"}, "offset 0 or in the same range"),
        ({"offset": "nan"}, "offset must be a finite number"),
        ({"ddof": 2}, "ddof must be 0 or 1"),
        ({"result_type": tf.float64}, "result_type"),
    ],
)
def test_the_raw_op_checks_its_attributes(native_ops, attributes, words):
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        native_ops.lbe_batch_entropy(tf.zeros((2, 2)), **attributes)


def test_the_raw_gradient_checks_its_inputs(native_ops):
    x, unit, scalar = tf.ones((3, 2)), tf.ones(2), tf.ones(())
    grad = native_ops.lbe_batch_entropy_grad
    for inputs in (
        (x, tf.ones(3), unit, scalar, []),
        (x, unit, tf.ones((1, 2)), scalar, []),
        (x, unit, unit, unit, []),
        (x, unit, unit, scalar, [unit]),
        (x, unit, unit, scalar, [unit, tf.ones(1)]),
        (scalar, scalar, scalar, scalar, []),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match="Received|rank"):
            grad(*inputs, [])


def test_the_input_is_never_overwritten(device, native_ops, rng):
    """The gradient may reuse x's buffer only where nobody else holds x."""
    x = tf.constant(rng.normal(size=(64, 32)).astype(np.float32))
    before = x.numpy().copy()

    @tf.function
    def function(x):
        doubled = x * 2
        grad = tf.gradients(lbe_ops.batch_entropy(doubled, native=True), doubled)[0]
        return grad, doubled

    grad, doubled = function(x)
    assert_grad(grad, oracle.batch_entropy_grad(2 * before), TOLERANCES["float32"])
    assert (doubled.numpy() == 2 * before).all()
    with tf.GradientTape() as tape:
        tape.watch(x)
        entropy = lbe_ops.batch_entropy(x, native=True)
    tape.gradient(entropy, x)
    assert (x.numpy() == before).all()


def test_a_trace_made_outside_of_xla_runs_within():
    require_native()
    require_xla()
    x = tf.constant([[0.0, 1.0], [2.0, 1.0]])
    traced = tf.function(lambda x: lbe_ops.batch_entropy(x, native=True))
    expected = float(traced(x))
    assert float(tf.function(lambda x: traced(x), jit_compile=True)(x)) == expected


@pytest.mark.parametrize("module", [ops, native], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    failed, attempted = doctest.testmod(
        module,
        extraglobs={"tf": tf, "lbe_ops": lbe_ops},
        optionflags=doctest.ELLIPSIS,
    )
    assert attempted > 0
    assert failed == 0
