# SPDX-License-Identifier: Apache-2.0
"""The ops for a batch that is spread over replicas, against one call with all of it.

Each replica has a shard of the batch: LBE>EpilogueMoments makes its moments,
LBE>MergeMoments the statistics of the whole batch of those of all replicas, and the
gradients take these with the batch's count. Nothing here needs several devices.
"""

import os
import pathlib

import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import (
    TOLERANCES,
    assert_grad,
    assert_statistics,
    import_numpy_module,
    require_xla,
    run_script,
    tensor,
)

from lbe_ops import native, reference

# Rows of the replicas. Whole nodes of the tree, so that the bits are those of one
# device; the last one may be shorter or empty.
SAME_BITS = {
    "2x256": [256] * 2,
    "4x128": [128] * 4,
    "3x64": [64] * 3,
    "5x32": [32] * 5,
    "8x64": [64] * 8,
    "64,64,64,21": [64, 64, 64, 21],
    "64,64,0": [64, 64, 0],
    "64,64,1": [64, 64, 1],
    "256,128": [256, 128],
}
# Others, which are right to rounding.
ROUNDED = {
    "2x24": [24] * 2,
    "2x50": [50] * 2,
    "128,256": [128, 256],
    "0,1,0,7": [0, 1, 0, 7],
    "3,0,1,1,0": [3, 0, 1, 1, 0],
}
FORMULAS = [
    {"ddof": 0, "scale": oracle.SCALE, "offset": 1.0},
    {"ddof": 1, "scale": oracle.SCALE, "offset": 1.0},
    {"ddof": 1, "scale": 2.5, "offset": 0.0},
]
COLUMNS = 13
pytestmark = pytest.mark.usefixtures("native_ops")


def attributes(formula):
    return {
        "ddof": formula["ddof"],
        "scale": f"{formula['scale']:.17g}",
        "offset": f"{formula['offset']:.17g}",
    }


def result_dtype(dtype):
    return tf.float64 if dtype == "float64" else tf.float32


def shards_of(x, rows):
    assert len(x) == sum(rows)
    return tf.split(x, rows, axis=0)


def moments(z, bias=None, activation="linear"):
    """y, count, mean, m2 of a shard."""
    return native.load().ops.lbe_epilogue_moments(
        z,
        [] if bias is None else [bias],
        result_type=result_dtype(z.dtype.name),
        activation=activation,
        slope=str(oracle.SLOPE),
    )


def gather(replicas):
    """The rows [R, L + 2S] of replicas, each with the moments of its layers."""
    rows = []
    for layers in replicas:
        _, counts, means, m2s = zip(*layers, strict=True)
        flat = [tf.reshape(part, [-1]) for part in (*counts, *means, *m2s)]
        rows.append(tf.concat(flat, axis=0))
    return tf.stack(rows)


def merge(replicas, ddof=0, scale=oracle.SCALE, offset=1.0):
    """What LBE>MergeMoments makes of the moments of each layer in each replica."""
    units = [int(np.prod(layer.mean.shape)) for layer in replicas[0]]
    formula = {"ddof": ddof, "scale": scale, "offset": offset}
    return native.load().ops.lbe_merge_moments(
        gather(replicas), np.cumsum(units, dtype=np.int64), **attributes(formula)
    )


def bits(value):
    return np.ascontiguousarray(value.numpy()).view(np.uint8).tolist()


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert np.ravel(actual).shape == np.ravel(expected).shape
    assert bits(tf.reshape(actual, [-1])) == bits(tf.reshape(expected, [-1]))


def batch(rows, dtype, rng, columns=COLUMNS):
    values = rng.normal(0.3, 1.7, (sum(rows), columns))
    return tensor(values, dtype)


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
@pytest.mark.parametrize("layout", SAME_BITS)
def test_shards_have_the_bits_of_one_device(device, layout, formula, dtype, rng):
    """Mean, variance, entropy and dx, with the gradients of statistics and without."""
    rows = SAME_BITS[layout]
    ops = native.load().ops
    x, _ = batch(rows, dtype, rng)
    result = result_dtype(dtype)
    options = attributes(formula)
    entropy, mean, variance, _ = ops.lbe_batch_entropy(x, result_type=result, **options)
    merged = merge([[moments(shard)] for shard in shards_of(x, rows)], **formula)
    assert_same_bits(merged.mean, mean)
    assert_same_bits(merged.variance, variance)
    assert_same_bits(merged.entropy, entropy)
    assert merged.count.numpy().tolist() == [sum(rows)]
    assert merged.valid.numpy().tolist() == [1]

    entropy_grad = tf.constant(-2.5, result)
    grads = tf.unstack(tf.constant(rng.normal(size=(2, COLUMNS)), result))
    for statistic_grads in ([], grads):
        dx = ops.lbe_batch_entropy_grad(
            x, mean, variance, entropy_grad, statistic_grads, [], **options
        )
        of_shards = [
            ops.lbe_batch_entropy_grad(
                shard,
                merged.mean,
                merged.variance,
                entropy_grad,
                statistic_grads,
                [merged.count[0]],
                **options,
            )
            for shard in shards_of(x, rows)
        ]
        assert_same_bits(tf.concat(of_shards, axis=0), dx)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("layout", ["4x128", "64,64,64,21", "64,64,0", "64,64,1"])
def test_an_epilogue_has_the_bits_of_one_device(
    device, layout, activation, bias, dtype, rng
):
    rows = SAME_BITS[layout]
    ops = native.load().ops
    z, _ = batch(rows, dtype, rng)
    dy, _ = batch(rows, dtype, rng)
    bias = tensor(rng.normal(size=COLUMNS), dtype)[0] if bias else None
    biases = [] if bias is None else [bias]
    result = result_dtype(dtype)
    options = {"activation": activation, "slope": str(oracle.SLOPE)}
    for ddof in (0, 1):
        formula = {**FORMULAS[0], "ddof": ddof}
        y, entropy, mean, variance, _ = ops.lbe_epilogue(
            z, biases, result_type=result, **options, **attributes(formula)
        )
        shards = [moments(z, bias, activation) for z in shards_of(z, rows)]
        merged = merge([[shard] for shard in shards], **formula)
        assert_same_bits(tf.concat([shard.y for shard in shards], axis=0), y)
        assert_same_bits(merged.mean, mean)
        assert_same_bits(merged.variance, variance)
        assert_same_bits(merged.entropy, entropy)
        # The entropy's gradient stands in a vector in one of the two.
        entropy_grads = tf.constant([7.0, 0.5], result)
        options_of_grad = {
            **options,
            **attributes(formula),
            "index": ddof,
            "biases": len(biases),
        }
        dz, _ = ops.lbe_epilogue_grad(
            dy, y, mean, variance, entropy_grads, [], **options_of_grad
        )
        of_shards = [
            ops.lbe_epilogue_grad(
                dy,
                shard.y,
                merged.mean,
                merged.variance,
                entropy_grads,
                [merged.count[0]],
                **options_of_grad,
            )
            for shard, dy in zip(shards, shards_of(dy, rows), strict=True)
        ]
        assert_same_bits(tf.concat([grad.dz for grad in of_shards], axis=0), dz)
        if bias is None:
            continue
        for grad in of_shards:
            total = grad.dz.numpy().astype(np.float64).sum(axis=0)
            size = np.abs(grad.dz.numpy().astype(np.float64)).sum(axis=0)
            error = np.abs(grad.dbias[0].numpy().astype(np.float64) - total)
            assert (error <= 2 * TOLERANCES[dtype].grad * (size + 1e-3)).all()


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
@pytest.mark.parametrize("layout", [*SAME_BITS, *ROUNDED])
def test_any_shards_agree_with_float64(layout, formula, mode, dtype, tolerance, rng):
    """Shards whose bits are others, too, of one row and of none."""
    rows = {**SAME_BITS, **ROUNDED}[layout]
    x, exact = batch(rows, dtype, rng)

    def function(x):
        shards = shards_of(x, rows)
        merged = merge([[moments(shard)] for shard in shards], **formula)
        grad = native.load().ops.lbe_batch_entropy_grad
        dx = [
            grad(
                shard,
                merged.mean,
                merged.variance,
                tf.constant(3, merged.mean.dtype),
                [],
                [merged.count[0]],
                **attributes(formula),
            )
            for shard in shards
        ]
        return merged, tf.concat(dx, axis=0)

    merged, dx = (tf.function(function) if mode == "graph" else function)(x)
    mean, variance = oracle.moments(exact, formula["ddof"])
    assert_statistics(merged.mean, mean, tolerance, 5.0)
    assert_statistics(merged.variance, variance, tolerance)
    entropies = oracle.unit_entropy(exact, **formula)
    size = np.abs(entropies).mean() + 1
    assert_statistics(merged.entropy[0], entropies.mean(), tolerance, size)
    assert_grad(dx, 3 * oracle.batch_entropy_grad(exact, **formula), tolerance)


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("layout", ["5x32", "2x50", "3,0,1,1,0"])
def test_an_epilogues_shards_agree_with_float64(layout, activation, rng):
    rows = {**SAME_BITS, **ROUNDED}[layout]
    z, dy = rng.normal(0.3, 1.7, (2, sum(rows), COLUMNS))
    shards = [moments(z, None, activation) for z in shards_of(z, rows)]
    merged = merge([[shard] for shard in shards], **FORMULAS[1])
    of_shards = [
        native.load()
        .ops.lbe_epilogue_grad(
            dy,
            shard.y,
            merged.mean,
            merged.variance,
            tf.constant(40, tf.float64),
            [merged.count[0]],
            biases=0,
            activation=activation,
            slope=str(oracle.SLOPE),
            **attributes(FORMULAS[1]),
        )
        .dz
        for shard, dy in zip(shards, shards_of(dy, rows), strict=True)
    ]
    activate, derivative = oracle.ACTIVATIONS[activation]
    y = activate(z)
    into_y = dy + 40 * oracle.batch_entropy_grad(y, **FORMULAS[1])
    expected = derivative(z) * into_y
    assert_grad(tf.concat(of_shards, axis=0), expected, TOLERANCES["float64"])


def test_layers_of_any_width_merge_at_once(device, dtype, rng):
    """Wider than a tile of the merge, of several dimensions, empty, one column."""
    rows = [64, 64, 64, 21]
    shapes = [(3,), (5, 70), (0,), (1,), (2100,), (64,), (65, 4)]
    # Every layer has rows of its own, as one has behind a reshape.
    x = [
        tensor(rng.normal(0.3, 1.7, (factor * sum(rows), *shape)), dtype)[0]
        for factor, shape in zip((1, 2, 1, 4, 1, 1, 2), shapes, strict=True)
    ]
    replicas = [
        [moments(shard) for shard in layers]
        for layers in zip(
            *(shards_of(x, np.multiply(rows, len(x) // sum(rows))) for x in x),
            strict=True,
        )
    ]
    merged = merge(replicas, **FORMULAS[0])
    units = [int(np.prod(shape)) for shape in shapes]
    means = tf.split(merged.mean, units)
    variances = tf.split(merged.variance, units)
    for layer, x_of_layer in enumerate(x):
        entropy, mean, variance, valid = native.load().ops.lbe_batch_entropy(
            x_of_layer, result_type=result_dtype(dtype), small_batch="zero"
        )
        assert_same_bits(merged.entropy[layer], entropy)
        assert_same_bits(merged.valid[layer], valid)
        assert_same_bits(means[layer], mean)
        assert_same_bits(variances[layer], variance)
        assert float(merged.count[layer]) == len(x_of_layer)


@pytest.mark.parametrize("replicas", [1, 2, 3, 7, 8, 9, 100])
def test_the_tree_over_replicas(device, replicas, rng):
    """Redone in NumPy, one operation at a time; every third replica has no row."""
    columns = 70
    rows = [0 if r % 3 == 1 else int(rng.integers(1, 40)) for r in range(replicas)]
    parts = [(n, *rng.normal(size=(2, columns)).astype(np.float32) ** 2) for n in rows]
    # What an empty replica holds must not matter.
    parts = [(n, mean, m2) if n else (0, mean * np.nan, m2) for n, mean, m2 in parts]

    def tree(parts):
        if len(parts) == 1:
            return parts[0]
        p = 1 << ((len(parts) - 1).bit_length() - 1)
        (na, ma, sa), (nb, mb, sb) = a, b = tree(parts[:p]), tree(parts[p:])
        if na == 0 or nb == 0:
            return b if na == 0 else a
        d, share = mb - ma, nb / (na + nb)
        weight = np.float32(share * na)
        return na + nb, ma + d * np.float32(share), (sa + sb) + d * d * weight

    gathered = np.stack([np.concatenate(([n], *rest)) for n, *rest in parts])
    merged = native.load().ops.lbe_merge_moments(
        gathered.astype(np.float32), np.array([columns])
    )
    n, mean, m2 = tree(parts)
    assert float(merged.count[0]) == n == sum(rows)
    np.testing.assert_array_equal(merged.mean, mean)
    np.testing.assert_array_equal(merged.variance, m2 / np.float32(n))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 64, 8192 + 3])
def test_moments_are_the_canonical_bits(device, rows, dtype):
    x, _ = batch([rows], dtype, np.random.default_rng(rows), columns=70)
    wide = x.numpy().astype(result_dtype(dtype).as_numpy_dtype)
    y, count, mean, m2 = moments(x)
    np.testing.assert_array_equal(y.numpy().view(np.uint8), x.numpy().view(np.uint8))
    assert float(count) == rows
    expected_mean, expected_m2 = oracle.canonical_moments(wide)
    np.testing.assert_array_equal(mean, expected_mean)
    np.testing.assert_array_equal(m2, expected_m2)
    # Of what an epilogue makes, too.
    y, _, mean, m2 = moments(x, x[0], "relu")
    wide = y.numpy().astype(result_dtype(dtype).as_numpy_dtype)
    expected_mean, expected_m2 = oracle.canonical_moments(wide)
    np.testing.assert_array_equal(mean, expected_mean)
    np.testing.assert_array_equal(m2, expected_m2)


DIGEST = """
import hashlib, json
import numpy as np
import lbe_ops_numpy
from helpers import DTYPES
from test_synchronized_ops import FORMULAS, batch, merge, moments, shards_of

digest = hashlib.sha256()
for dtype in DTYPES:
    for rows in ([1, 2, 7], [8, 9, 64, 0], [8195, 64]):
        x, _ = batch(rows, dtype, np.random.default_rng(1), columns=1300)
        z, bias = x[:, :70], x[0, :70]
        shards = [[moments(z, bias, "tanh")] for z in shards_of(z, rows)]
        merged = merge(shards, **FORMULAS[1])
        for output in (*merged, *(part for layer in shards for part in layer[0])):
            digest.update(output.numpy().tobytes())
        digest.update(b"".join(o.numpy().tobytes() for o in merge(
            [[moments(x)] for x in shards_of(x, rows)], **FORMULAS[0])))
print(json.dumps([lbe_ops_numpy.simd_level(), digest.hexdigest()]))
"""


@pytest.mark.long
def test_every_instruction_set_gives_the_same_bits():
    here = str(pathlib.Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    levels = import_numpy_module().build_info()["simd"].split()
    found = [
        run_script(DIGEST, LBE_OPS_SIMD=level, PYTHONPATH=path) for level in levels
    ]
    assert found[0][0] == levels[0]
    assert len({digest for _, digest in found}) == 1


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
@pytest.mark.parametrize("rows", [[0, 0], [1, 0, 0], [0, 1]], ids=str)
def test_fewer_than_two_rows_have_no_entropy(device, rows, formula, dtype, rng):
    ops = native.load().ops
    z, exact = batch(rows, dtype, rng)
    replicas = [[moments(shard)] for shard in shards_of(z, rows)]
    merged = merge(replicas, **formula)
    assert float(merged.count[0]) == sum(rows)
    assert float(merged.entropy[0]) == float(merged.valid[0]) == 0
    assert merged.variance.numpy().tolist() == [0] * COLUMNS
    expected = exact[0] if sum(rows) else np.zeros(COLUMNS)
    assert merged.mean.numpy().tolist() == expected.tolist()
    # Not even what is not a number may come through.
    for entropy_grad in (1.0, np.nan):
        options = {
            "mean": merged.mean,
            "variance": merged.variance,
            "entropy_grad": tf.constant(entropy_grad, merged.mean.dtype),
            "count": [merged.count[0]],
            **attributes(formula),
        }
        for shard in shards_of(z, rows):
            for x in (shard, shard * np.nan):
                for grads in ([], [merged.mean * np.nan] * 2):
                    dx = ops.lbe_batch_entropy_grad(
                        x=x, statistic_grads=grads, **options
                    )
                    assert not np.any(dx)
            dz, _ = ops.lbe_epilogue_grad(
                dy=shard + 1, y=shard, biases=0, activation="linear", **options
            )
            np.testing.assert_array_equal(dz, shard + 1)


@pytest.mark.parametrize("activation", ["linear", "tanh"])
def test_a_batch_of_one_without_an_offset(device, activation, dtype, rng):
    """The epilogue's own gradient, with no word about replicas."""
    ops = native.load().ops
    z, _ = batch([1], dtype, rng)
    options = {"activation": activation, **attributes(FORMULAS[2])}
    y, entropy, mean, variance, valid = ops.lbe_epilogue(
        z, [], result_type=result_dtype(dtype), **options
    )
    assert float(entropy) == float(valid) == 0
    dz, _ = ops.lbe_epilogue_grad(
        z, y, mean, variance, tf.ones_like(entropy), [], biases=0, **options
    )
    derivative = reference.DERIVATIVES[activation]
    expected = derivative(tf.cast(y, tf.float64), 0) * tf.cast(z, tf.float64)
    assert_grad(dz, expected.numpy(), TOLERANCES[dtype])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_unit(device, value, dtype, rng):
    rows, unit = [64, 64, 21], 5
    values = rng.normal(size=(sum(rows), COLUMNS))
    values[70, unit] = value
    x, _ = tensor(values, dtype)
    shards = shards_of(x, rows)
    merged = merge([[moments(shard), moments(shard[:, :unit])] for shard in shards])
    others = np.delete(np.arange(COLUMNS), unit)
    assert np.isnan(merged.variance[unit])
    assert np.isfinite(np.delete(merged.variance, unit)).all()
    assert np.isnan(merged.entropy[0])
    assert np.isfinite(merged.entropy[1])
    for shard in shards:
        dx = native.load().ops.lbe_batch_entropy_grad(
            shard,
            merged.mean[:COLUMNS],
            merged.variance[:COLUMNS],
            tf.ones_like(merged.entropy[0]),
            [],
            [merged.count[0]],
        )
        dx = np.asarray(tf.cast(dx, tf.float64))
        assert np.isnan(dx[:, unit]).all()
        assert np.isfinite(dx[:, others]).all()


def test_a_small_deviation_from_a_large_mean_is_kept(device, rng):
    """As well as one device does it; sums of x and of x**2 would leave nothing."""
    x = rng.normal(30, 1e-3, (512, 200)).astype(np.float32)
    replicas = [[moments(tf.constant(shard))] for shard in np.split(x, 4)]
    merged = merge(replicas, **FORMULAS[0])
    assert_same_bits(merged.variance, native.load().ops.lbe_batch_entropy(x).variance)
    _, expected = oracle.moments(x)
    # The means of leaves are rounded to 2e-6.
    errors = np.abs(merged.variance / expected - 1)
    assert np.median(errors) < 2e-4
    assert np.max(errors) < 2e-3
    sums = [x.sum(axis=0), (x**2).sum(axis=0)]
    naive = sums[1] / 512 - (sums[0] / 512) ** 2
    assert np.median(np.abs(naive / expected - 1)) > 1


def test_statistics_may_have_the_shape_of_a_sample_or_be_flat(dtype, rng):
    ops = native.load().ops
    x, _ = tensor(rng.normal(size=(16, 3, 4)), dtype)
    _, count, mean, m2 = moments(x)
    assert mean.shape == m2.shape == (3, 4)
    grads = []
    for shape in ([3, 4], [12]):
        part = [tf.reshape(v, shape) for v in (mean, m2)]
        inputs = (*part, tf.ones_like(count))
        grads.append(ops.lbe_batch_entropy_grad(x, *inputs, part, [count]))
        grads.append(ops.lbe_batch_entropy_grad(x, *inputs, [], [count]))
        grads.append(ops.lbe_epilogue_grad(x, x, *inputs, [count], biases=0).dz)
    for one, other in zip(grads[:3], grads[3:], strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_y_of_a_shard(device, rows, dtype, rng):
    """Of nothing, too; and z itself where there is nothing to make."""
    z, exact = batch([rows], dtype, rng)
    bias = tf.ones(COLUMNS, dtype)
    y, count, mean, m2 = moments(z, bias, "relu")
    assert y.shape == z.shape
    expected = np.maximum(exact + 1, 0)
    np.testing.assert_allclose(tf.cast(y, tf.float64), expected, rtol=1e-2, atol=1e-3)
    assert float(count) == rows
    if rows < 2:
        assert m2.numpy().tolist() == [0] * COLUMNS
    if rows == 0:
        assert mean.numpy().tolist() == [0] * COLUMNS
    for empty in (tf.zeros((rows, 0), dtype), tf.zeros((rows, 0, 3), dtype)):
        assert float(moments(empty).count) == rows


def test_nothing_is_copied_where_there_is_nothing_to_make():
    z = tf.random.normal((64, 32))
    y = moments(z).y
    addresses = [np.asarray(memoryview(tensor)).ctypes.data for tensor in (y, z)]
    assert addresses[0] == addresses[1]


def test_shapes_are_known_before_they_run():
    ops = native.load().ops
    shapes = {}

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, 4, None)),
            tf.TensorSpec((None, 13)),
            tf.TensorSpec((3,), tf.int64),
            tf.TensorSpec(None),
        ]
    )
    def function(z, gathered, ends, count):
        shard = ops.lbe_epilogue_moments(z, [])
        merged = ops.lbe_merge_moments(gathered, ends)
        dz, _ = ops.lbe_epilogue_grad(
            z, z, gathered[0], gathered[0], count, [count], biases=0
        )
        for name, of_name in {
            **shard._asdict(),
            **{f"merged_{n}": v for n, v in merged._asdict().items()},
            "dz": dz,
        }.items():
            shapes[name] = of_name.shape.as_list()

    function.get_concrete_function()
    assert shapes == {
        "y": [None, 4, None],
        "count": [],
        "mean": [4, None],
        "m2": [4, None],
        "merged_mean": [5],
        "merged_variance": [5],
        "merged_count": [3],
        "merged_entropy": [3],
        "merged_valid": [3],
        "dz": [None, 4, None],
    }


@pytest.mark.parametrize(
    "gathered, ends, words",
    [
        ((0, 5), [2], "gathered must.*Received: \\[0,5\\]"),
        ((5,), [2], "gathered must|rank 2"),
        ((2, 5), [[2]], "ends must|rank 1"),
        ((2, 6), [2], "gathered must|evenly divisible|divide"),
        ((2, 1), [0, 0], "gathered must|negative"),
        ((2, 4), [], "gathered must"),
        ((2, 5), [3], "ends must ascend to .* 2. Received: 3 at 0"),
        ((2, 5), [1], "ends must ascend to .* 2. Received: 1 at 0"),
        ((2, 6), [2, 1], "ends must ascend"),
        ((2, 6), [-1, 2], "ends must ascend to .* 2. Received: -1 at 0"),
    ],
)
@pytest.mark.parametrize("unknown", [False, True])
def test_a_merge_refuses_what_does_not_fit(unknown, gathered, ends, words):
    function = native.load().ops.lbe_merge_moments
    if unknown:
        function = tf.function(
            function,
            input_signature=[tf.TensorSpec(None), tf.TensorSpec(None, tf.int64)],
        )
    error = (tf.errors.InvalidArgumentError, ValueError)
    with tf.device("/CPU:0"), pytest.raises(error, match=words):
        function(tf.zeros(gathered), tf.constant(ends, tf.int64))


def test_a_merge_of_nothing():
    merged = native.load().ops.lbe_merge_moments(
        tf.zeros((2, 0)), tf.zeros(0, tf.int64)
    )
    assert all(output.shape == (0,) for output in merged)


@pytest.mark.parametrize(
    "formula, words",
    [
        ({"ddof": 2}, "ddof must be 0 or 1"),
        ({"scale": "a lot"}, "scale must be a finite number"),
        ({"offset": "-1"}, "offset 0 or in the same range"),
    ],
)
def test_a_merge_checks_its_formula(formula, words):
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        native.load().ops.lbe_merge_moments(tf.zeros((1, 3)), [1], **formula)


def test_moments_check_their_inputs():
    op = native.load().ops.lbe_epilogue_moments
    z = tf.ones((4, 2))
    for bias in ([tf.ones(3)], [tf.ones(2), tf.ones(2)]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="bias must"):
            op(z, bias)
    with pytest.raises(tf.errors.InvalidArgumentError, match="no epilogue with"):
        op(z, [], activation="gelu")
    with pytest.raises(tf.errors.InvalidArgumentError, match="result_type"):
        op(z, [], result_type=tf.float64)
    with pytest.raises(tf.errors.InvalidArgumentError, match="rank|scalar"):
        op(1.0, [])


@pytest.mark.parametrize("unknown", [False, True])
def test_the_gradients_check_their_count(unknown):
    ops = native.load().ops
    x, unit, scalar = tf.ones((4, 2)), tf.ones(2), tf.ones(())

    def run(function, *inputs):
        if unknown:
            signature = [tf.TensorSpec(None) for _ in inputs]
            function = tf.function(function, input_signature=signature)
        return function(*inputs)

    def entropy_grad(x, mean, variance, count):
        return ops.lbe_batch_entropy_grad(x, mean, variance, scalar, [], [count])

    def epilogue_grad(x, mean, variance, count):
        return ops.lbe_epilogue_grad(x, x, mean, variance, scalar, [count], biases=0).dz

    for function in (entropy_grad, epilogue_grad):
        for inputs in (
            (x, unit, unit, unit),
            (x, tf.ones(3), unit, scalar),
            (x, unit, tf.ones((1, 2)), scalar),
            (x, unit, scalar, scalar),
        ):
            with pytest.raises(tf.errors.InvalidArgumentError, match="Received|rank"):
                run(function, *inputs)
    with pytest.raises(tf.errors.InvalidArgumentError, match="count must be none"):
        ops.lbe_batch_entropy_grad(x, unit, unit, scalar, [], [scalar, scalar])
    with pytest.raises(tf.errors.InvalidArgumentError, match="count must be none"):
        ops.lbe_epilogue_grad(x, x, unit, unit, scalar, [scalar, scalar], biases=0)


@pytest.mark.parametrize("graph", [False, True])
def test_what_has_no_gradient_says_so(graph):
    ops = native.load().ops
    x, unit, scalar = tf.ones((4, 2)), tf.ones(2), tf.ones(())

    def epilogue_grad(x):
        return ops.lbe_epilogue_grad(x, x, unit, unit, scalar, [scalar], biases=0).dz

    def entropy_grad(x):
        return ops.lbe_batch_entropy_grad(x, unit, unit, scalar, [], [scalar])

    for function, words in (
        (lambda x: ops.lbe_epilogue_moments(x, []).y, "epilogue_moments"),
        (
            lambda x: ops.lbe_merge_moments(tf.tile(x[:, :1], [1, 3]), [1]).entropy,
            "epilogue_moments",
        ),
        (epilogue_grad, "synchronized=False"),
        (entropy_grad, "synchronized=False"),
    ):

        def differentiate(x, function=function):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = tf.reduce_sum(function(x))
            return tape.gradient(value, x)

        with pytest.raises(NotImplementedError, match=words):
            (tf.function(differentiate) if graph else differentiate)(x)


def test_a_graph_from_before_there_were_counts_loads(rng):
    """Whose gradients have neither that input nor the attribute."""
    ops = native.load().ops
    x = tf.constant(rng.normal(size=(8, 3)).astype(np.float32))
    unit, scalar = tf.ones(3), tf.ones(())
    with tf.Graph().as_default() as graph:
        at = [tf.compat.v1.placeholder(v.dtype, v.shape) for v in (x, unit, scalar)]
        x_at, unit_at, scalar_at = at
        outputs = [
            ops.lbe_batch_entropy_grad(x_at, unit_at, unit_at, scalar_at, [], []),
            ops.lbe_epilogue_grad(
                *(x_at, x_at, unit_at, unit_at, scalar_at, []), biases=0
            ).dz,
        ]
    definition = graph.as_graph_def()
    for node in definition.node:
        node.attr.pop("synchronized", None)
    prune = [v.name for v in (*at, *outputs)]
    loaded = tf.compat.v1.wrap_function(
        lambda: tf.graph_util.import_graph_def(definition, name=""), []
    ).prune(prune[:3], prune[3:])
    expected = [
        ops.lbe_batch_entropy_grad(x, unit, unit, scalar, [], []),
        ops.lbe_epilogue_grad(x, x, unit, unit, scalar, [], biases=0).dz,
    ]
    for found, wanted in zip(loaded(x, unit, scalar), expected, strict=True):
        assert_same_bits(found, wanted)


@pytest.mark.parametrize("of", ["entropy", "epilogue"])
def test_xla_refuses_with_a_reason(of):
    require_xla()
    ops = native.load().ops
    x, unit, scalar = tf.ones((4, 2)), tf.ones(2), tf.ones(())

    @tf.function(jit_compile=True)
    def function(x):
        if of == "entropy":
            return ops.lbe_batch_entropy_grad(x, unit, unit, scalar, [], [scalar])
        return ops.lbe_epilogue_grad(x, x, unit, unit, scalar, [scalar], biases=0)

    with pytest.raises(tf.errors.OpError, match="native=False uses plain TensorFlow"):
        function(x)
