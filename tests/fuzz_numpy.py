# SPDX-License-Identifier: Apache-2.0
"""Random calls of lbe_ops_numpy: each gives the right value, or an error of its own.

    python tests/fuzz_numpy.py [CALLS [SEED]]

Needs no TensorFlow, so that it also runs on a module with sanitizers (`make sanitize`).
Arrays have any shape, dtype and layout that NumPy has, arguments are now and then what
they must not be, and what a call may not accept is written down here a second time.
"""

import sys

import ml_dtypes
import numpy as np
import oracle

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
# Relative errors of statistics, and of arrays in x's dtype.
STATISTICS = {np.float64: 1e-12}
ARRAYS = {np.float64: 1e-11, np.float32: 2e-5, np.float16: 2e-3}
FORMULA_RANGE = 1e-12, 1e12
ERRORS = TypeError, ValueError, OverflowError


def pick(rng, values):
    return values[rng.integers(len(values))]


def shape(rng):
    """Mostly of a small batch that has an entropy, with leaves of all kinds."""
    rank = pick(rng, (1, 2, 2, 2, 3, 3, 4))
    rows = pick(rng, (2, 2, 3, 7, 8, 9, 16, 17, int(rng.integers(2, 200))))
    sizes = [int(rng.integers(1, 20 if rank < 4 else 6)) for _ in range(rank - 1)]
    if rng.random() < 0.04:
        rows = int(rng.integers(0, 2))
    if sizes and rng.random() < 0.02:
        sizes[rng.integers(len(sizes))] = 0
    return () if rng.random() < 0.01 else (rows, *sizes)


def values(rng, size, dtype):
    scale = 10.0 ** rng.integers(-2, 3)
    x = scale * (rng.normal(size=size) + rng.integers(-2, 3))
    if x.ndim and rng.random() < 0.1:
        x[...] = x[:1]  # units that do not vary
    return np.asarray(x).astype(dtype)


def layout(rng, x):
    """The same values somewhere else in memory."""
    kind = rng.integers(8)
    if x.ndim == 0 or kind < 3:
        return x
    if kind == 3:
        return np.asfortranarray(x)
    if kind == 4:
        return np.repeat(x, 2, axis=-1)[..., ::2]
    if kind == 5:
        return x[::-1].copy()[::-1]
    if kind == 6 and x.size:
        memory = np.zeros(x.nbytes + 1, np.uint8)[1:]
        memory = memory.view(x.dtype).reshape(x.shape)
        memory[...] = x
        return memory
    read_only = x.view()
    read_only.flags.writeable = False
    return read_only


def array(rng):
    """An array and whether its dtype and shape are served."""
    size, dtype = shape(rng), pick(rng, DTYPES)
    x = layout(rng, values(rng, size, dtype))
    good = len(size) > 0 and size[0] >= 2 and x.size > 0
    if rng.random() < 0.03:
        other = pick(rng, (np.int32, np.bool_, np.complex64, "U3", object))
        return np.zeros(x.shape, other), False
    if rng.random() < 0.01 and np.dtype(dtype).isbuiltin == 1:
        return x.astype(x.dtype.newbyteorder(">")), False
    if rng.random() < 0.01:
        return pick(rng, (x.tolist(), None, "x", 1.5)), False
    return x, good


def formula(rng):
    """ddof, scale and offset, and whether they are in their ranges."""
    options = {}
    if rng.random() < 0.5:
        options["ddof"] = pick(rng, (0, 1))
    if rng.random() < 0.5:
        options["scale"] = pick(rng, (0.5, 3.0, 1e-12, 1e6, 17.0))
    if rng.random() < 0.5:
        options["offset"] = pick(rng, (0.25, 1.0, 2.0, 7.5, 1e-3))
    if rng.random() < 0.03:
        name = pick(rng, ("ddof", "scale", "offset"))
        wrong = {"ddof": (2, -1), "scale": (0.0, -1.0, 1e13, np.nan)}
        options[name] = pick(rng, wrong.get(name, (1e-13, -1.0, np.nan, np.inf)))
    least, most = FORMULA_RANGE
    good = (
        options.get("ddof", 0) in (0, 1)
        and least <= options.get("scale", 1.0) <= most
        and least <= options.get("offset", 1.0) <= most
    )
    return options, good


def threads(rng):
    if rng.random() < 0.7:
        return {}, True
    count = int(pick(rng, (*(1, 2, 3, 5, 40) * 4, 0, -1)))
    return {"threads": count}, count >= 1


def close(found, expected, relative, what, absolute=2.0**-24):
    expected = np.asarray(expected)
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    allowed = relative * (np.abs(expected).max(initial=0) + 1e-5)
    if found.dtype != np.float64:
        # float16 has nothing smaller; in float32 sigmoid and softplus lie so close to
        # their limits far from 0.
        allowed += absolute
    error = np.abs(found.astype(np.float64) - expected).max(initial=0)
    assert error <= allowed, f"{what}: off by {error:g}, allowed {allowed:g}"


def tolerances(x):
    """Of statistics, and of arrays of x's dtype."""
    kind = x.dtype.type
    return STATISTICS.get(kind, 2e-5), ARRAYS.get(kind, 1.6e-2)


def check_statistics(x, found, options):
    relative, _ = tolerances(x)
    entropy, mean, variance = found
    units = x.shape[1:]
    expected = oracle.moments(x, options.get("ddof", 0))
    # Relative to the samples: a mean may be next to nothing.
    size = np.abs(oracle.flat(x)).max()
    for name, one, other, scale in (
        *(("mean", mean, expected[0], size),),
        *(("variance", variance, expected[1], size**2),),
    ):
        assert one.shape == units, name
        error = np.abs(np.ravel(one).astype(np.float64) - other).max()
        assert error <= relative * (scale + 1e-30), f"{name}: off by {error:g}"
    # Of the variances returned: far above the offset, a log hardly sees their errors.
    close(
        np.asarray(entropy),
        oracle.batch_entropy(x, **options),
        50 * relative,
        "entropy",
    )


def of_rounding(x, options):
    """What dH/dx is off by where the difference from the mean is rounding alone."""
    x = oracle.flat(x)
    share = options.get("scale", oracle.SCALE) / options.get("offset", 1.0)
    share /= max(1, x.shape[1] * (len(x) - options.get("ddof", 0)))
    return 2.0**-24 + share * 2.0**-22 * np.abs(x).max(initial=0)


def arguments_of_all(rng):
    (options, in_range), (count, at_least_one) = formula(rng), threads(rng)
    return options, count, in_range and at_least_one


def call_batch_entropy(module, rng):
    x, good = array(rng)
    options, count, fine = arguments_of_all(rng)
    if not (good and fine):
        return lambda: module.batch_entropy(x, **options, **count), None
    return (
        lambda: module.batch_entropy(x, **options, **count),
        lambda found: check_statistics(x, found, options),
    )


def call_gradient(module, rng):
    x, good = array(rng)
    options, count, fine = arguments_of_all(rng)
    if not (good and fine):
        one = np.ones(3)
        return lambda: module.batch_entropy_grad(x, one, one, **options, **count), None
    _, mean, variance = module.batch_entropy(x, **options)
    share = float(rng.normal())
    others = {}
    if rng.random() < 0.3:
        others = {
            name: rng.normal(size=x.shape[1:])
            for name in ("mean_grad", "variance_grad")
        }
    wrong = rng.random()
    if wrong < 0.03:
        mean = rng.normal(size=(*x.shape[1:], 2))
    elif wrong < 0.06 and others:
        del others["mean_grad"]
    elif wrong < 0.09:
        others["dx"] = np.empty((*x.shape, 1), x.dtype)
    bad = wrong < 0.03 or wrong < 0.06 and len(others) == 1 or 0.06 <= wrong < 0.09

    def check(found):
        assert found.dtype == x.dtype
        expected = share * oracle.batch_entropy_grad(x, **options)
        if others:
            expected = expected + oracle.statistics_grad(
                x, others["mean_grad"], others["variance_grad"], options.get("ddof", 0)
            )
        # What the statistics are off by is divided by the offset.
        gain = 1 + options.get("scale", oracle.SCALE) / options.get("offset", 1.0)
        relative = tolerances(x)[1] + 1e-6 * min(gain, 1e3)
        close(found, expected, relative, "dx", 3 * of_rounding(x, options))

    return (
        lambda: module.batch_entropy_grad(
            x, mean, variance, share, **others, **options, **count
        ),
        None if bad else check,
    )


def call_epilogue(module, rng):
    z, good = array(rng)
    options, count, fine = arguments_of_all(rng)
    activation = pick(rng, [*oracle.ACTIVATIONS])
    slope = pick(rng, (oracle.SLOPE,) * 9 + (-1.0,))
    bias = None
    if good and rng.random() < 0.6:
        channels = z.shape[-1] if z.ndim > 1 else 1
        wrong = rng.random() < 0.05
        bias = layout(rng, values(rng, (channels + wrong,), z.dtype))
        good = z.ndim > 1 and not wrong  # a batch of numbers has no channels
    if rng.random() < 0.02:
        activation, good = pick(rng, ("gelu", "", None, 3)), False

    def call():
        return module.epilogue(
            z, bias, activation=activation, slope=slope, **options, **count
        )

    if not (good and fine and slope >= 0):
        return call, None

    def check(found):
        y, *statistics = found
        total = z.astype(np.float64)
        if bias is not None:
            total = total + bias.astype(np.float64)
        with np.errstate(over="ignore"):
            expected = oracle.ACTIVATIONS[activation][0](total)
        _, relative = tolerances(z)
        close(y, expected, 4 * relative, "y")
        check_statistics(y, statistics, options)

    return call, check


CALLS = (call_batch_entropy, call_batch_entropy, call_gradient, call_epilogue)


def run(module, calls, seed, makers=CALLS, errors=ERRORS):
    """Makes the calls; how many of them were errors, as they had to be.

    Each maker gets the module and a generator, and returns a call and the check of its
    value, or None where the call must be one of the errors.
    """
    refused = 0
    for number in range(calls):
        rng = np.random.default_rng((seed, number))
        make = pick(rng, makers)
        try:
            call, check = make(module, rng)
            try:
                found = call()
            except errors as error:
                assert check is None, f"refused: {error!r}"
                assert str(error), "an error without a word"
                refused += 1
            else:
                assert check is not None, "accepted"
                check(found)
        except Exception as error:
            raise AssertionError(
                f"{make.__name__} of default_rng(({seed}, {number})): {error}"
            ) from error
    return refused


if __name__ == "__main__":
    import lbe_ops_numpy

    given = [int(word) for word in sys.argv[1:]]
    CALLS_MADE, SEED = (*given, *(50_000, 0)[len(given) :])
    print(f"{CALLS_MADE} calls, {run(lbe_ops_numpy, CALLS_MADE, SEED)} refused")
