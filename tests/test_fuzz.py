# SPDX-License-Identifier: Apache-2.0
"""100,000 random calls: of lbe_ops_numpy (see fuzz_numpy.py) and of TensorFlow's op."""

import fuzz_numpy as fuzz
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import import_numpy_module

from lbe_ops import ops, reference

pytestmark = pytest.mark.long

CALLS = 50_000
ERRORS = (*fuzz.ERRORS, tf.errors.InvalidArgumentError)


@pytest.fixture
def seed():
    """Another one in every run; it is part of what a failure says."""
    return np.random.SeedSequence().entropy % 2**32


def test_calls_of_the_module_for_numpy(seed):
    refused = fuzz.run(import_numpy_module(), CALLS, seed)
    assert 0.1 * CALLS < refused < 0.4 * CALLS


def array(rng):
    """Without what only NumPy has: TensorFlow makes a tensor of it, or says why not."""
    while True:
        x, good = fuzz.array(rng)
        if isinstance(x, np.ndarray) and x.dtype.isnative:
            return x, good


def is_served(x):
    """Whether it is a batch, of any size."""
    return x.ndim > 0 and x.dtype.type in fuzz.DTYPES


def call_batch_entropy(native_ops, rng):
    """Values, statistics and the gradient of one of them."""
    (x, good), (options, in_range) = array(rng), fuzz.formula(rng)

    def call():
        with tf.GradientTape() as tape:
            z = tf.convert_to_tensor(x)
            tape.watch(z)
            entropy = ops.batch_entropy(z, **options, native=True)
        statistics = ops.unit_statistics(x, **options, native=True)
        return tape.gradient(entropy, z), entropy, *statistics

    def check(found):
        dx, entropy, mean, variance, of_units = (each.numpy() for each in found)
        fuzz.check_statistics(x, (entropy, mean, variance), options)
        assert of_units.mean() == pytest.approx(float(entropy), rel=1e-4, abs=1e-6)
        assert dx.dtype == x.dtype
        gain = 1 + options.get("scale", oracle.SCALE) / options.get("offset", 1.0)
        relative = fuzz.tolerances(x)[1] + 1e-6 * min(gain, 1e3)
        expected = oracle.batch_entropy_grad(x, **options)
        fuzz.close(dx, expected, relative, "dx", fuzz.of_rounding(x, options))

    return call, check if good and in_range else None


def call_batch_entropy_or_zero(native_ops, rng):
    """Any batch, also an empty one."""
    (x, enough), (options, in_range) = array(rng), fuzz.formula(rng)
    served = is_served(x)

    def check(found):
        entropy, valid = (each.numpy() for each in found)
        assert valid == enough
        if enough:
            relative, _ = fuzz.tolerances(x)
            expected = oracle.batch_entropy(x, **options)
            fuzz.close(entropy, expected, 50 * relative, "entropy")
        else:
            assert entropy == 0

    return (
        lambda: ops.batch_entropy_or_zero(x, **options, native=True),
        check if served and in_range else None,
    )


def call_epilogue(native_ops, rng):
    """The value, the entropy and both gradients."""
    (z, enough), (options, in_range) = array(rng), fuzz.formula(rng)
    activation, slope = fuzz.pick(rng, [*oracle.ACTIVATIONS]), oracle.SLOPE
    good = is_served(z) and in_range
    bias = None
    if good and rng.random() < 0.6:
        wrong = rng.random() < 0.05
        bias = fuzz.values(rng, (z.shape[-1] + wrong,), z.dtype)
        good = z.ndim > 1 and not wrong
    if rng.random() < 0.02:
        activation, good = fuzz.pick(rng, ("gelu", "", None, 3)), False
    if rng.random() < 0.02:
        slope, good = fuzz.pick(rng, (-1.0, np.nan, np.inf, "1")), False

    def call():
        with tf.GradientTape() as tape:
            inputs = [tf.convert_to_tensor(z)]
            inputs += [] if bias is None else [tf.convert_to_tensor(bias)]
            tape.watch(inputs)
            y, entropy, valid = ops.epilogue(
                *inputs, activation=activation, slope=slope, native=True, **options
            )
            loss = tf.reduce_sum(tf.cast(y, entropy.dtype)) + 3 * entropy
        return y, entropy, valid, *tape.gradient(loss, inputs)

    def check(found):
        y, entropy, valid, dz, *dbias = (each.numpy() for each in found)
        total = z.astype(np.float64)
        if bias is not None:
            total = total + bias.astype(np.float64)
        value, derivative = oracle.ACTIVATIONS[activation]
        statistics, relative = fuzz.tolerances(z)
        with np.errstate(over="ignore"):
            fuzz.close(y, value(total), 4 * relative, "y")
            slopes = derivative(total)
        expected = oracle.batch_entropy(y, **options) if enough else 0.0
        fuzz.close(entropy, expected, 50 * statistics, "entropy")
        assert valid == enough
        gain = 1 + options.get("scale", oracle.SCALE) / options.get("offset", 1.0)
        if z.dtype.type not in (np.float32, np.float64) or gain > 1e4:
            # The derivative is one of y, which is rounded, and the offset divides that.
            return
        share = oracle.batch_entropy_grad(y, **options) if enough else 0.0
        expected = slopes * (1 + 3 * share)
        relative = 10 * relative + 1e-5 * min(gain, 1e3)
        absolute = 2.0**-21 + 3 * fuzz.of_rounding(y, options)
        fuzz.close(dz, expected, relative, "dz", absolute)
        if bias is not None and z.size:
            rows = expected.reshape(-1, z.shape[-1])
            # Relative to what is added up, which may cancel.
            allowed = relative * np.abs(rows).sum(axis=0).max() + len(rows) * absolute
            assert np.abs(dbias[0] - rows.sum(axis=0)).max() <= allowed, "dbias"

    return call, check if good else None


def call_raw_op(native_ops, rng):
    """Inputs and attributes that no function of this package would give to the op."""
    x, good = array(rng)
    good = good and x.dtype.type in fuzz.DTYPES
    dtype = tf.as_dtype(x.dtype) if good else tf.float32
    result = reference.result_dtype(dtype)
    attributes = {"ddof": 0, "scale": "8.5", "offset": "1.0", "result_type": result}
    wrong = fuzz.pick(
        rng,
        (
            *({"ddof": 7}, {"ddof": -1}, {"scale": "x"}, {"scale": ""}),
            *({"scale": "nan"}, {"offset": "-1"}, {"offset": "1e300"}),
            *({"small_batch": "perhaps"}, {"result_type": tf.float16}),
        ),
    )
    shapes = [x.shape[1:], x.shape[1:], ()]
    place = rng.integers(3)
    shapes[place] = (*shapes[place], 3)
    inputs = [tf.zeros(size, result) for size in shapes]
    which = rng.integers(3)

    def call():
        z = tf.convert_to_tensor(x)
        if which == 0:
            return native_ops.lbe_batch_entropy(z, **{**attributes, **wrong})
        if which == 1:
            return native_ops.lbe_batch_entropy_grad(z, *inputs, [], [], **attributes)
        bias = tf.zeros([sum(x.shape[-1:]) + 1], dtype)
        return native_ops.lbe_epilogue(
            z, [bias], activation="relu", slope="0.0", **attributes
        )

    return call, None


MAKERS = (
    *(call_batch_entropy, call_batch_entropy_or_zero),
    *(call_epilogue, call_epilogue, call_raw_op),
)


def test_calls_of_the_op(native_ops, seed):
    refused = fuzz.run(native_ops, CALLS, seed, MAKERS, ERRORS)
    assert 0.2 * CALLS < refused < 0.6 * CALLS
