# SPDX-License-Identifier: Apache-2.0
"""Training on replicas, in one process and in several, against training on one device.

`replica_cases.py` and `worker_cases.py` run in processes of their own, since the
devices of TensorFlow are made once in each. The ops are tested in
`test_synchronized_ops.py`.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import (
    assert_grad,
    assert_statistics,
    free_ports,
    tensor,
    worker_config,
)

from lbe_ops import Dense_LBE, LBEModel, NativeUnavailableError, ops, reference
from lbe_ops.synchronized import warn_of

HERE = pathlib.Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([str(HERE), *(p for p in sys.path if p)]),
}


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("activation", ["linear", "softplus"])
@pytest.mark.parametrize("rows", [[8, 8], [5, 1, 0], [2, 2, 2, 1, 0]], ids=str)
def test_shards_agree_with_float64(path, rows, activation, ddof, dtype, tolerance, rng):
    """Moments, their merge and both gradients, on every path but native XLA."""
    z, exact = tensor(rng.normal(0.3, 1.7, (sum(rows), 3, 4)), dtype)
    dy, exact_dy = tensor(rng.normal(size=z.shape), dtype)
    bias, exact_bias = tensor([0.5, -0.25, 0.0, 1.0], dtype)
    options = {"ddof": ddof, "scale": 2.5, "offset": 0.5}
    result = reference.result_dtype(z.dtype)

    def function(z, bias, dy):
        shards, moments, outputs = tf.split(z, rows), [], []
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([bias, *shards])
            for shard in shards:
                y, of_shard = ops.epilogue_moments(
                    shard, bias, activation=activation, **options
                )
                outputs.append(y)
                moments += [of_shard, ops.batch_moments(y, **options)]
        gathered = [
            tf.concat([[m.count], tf.reshape(m.mean, [-1]), tf.reshape(m.m2, [-1])], 0)
            for m in moments[::2]
        ]
        merged = ops.merge_moments(tf.stack(gathered), [12], **options)
        for each in moments:
            each.of_batch = (merged.mean, merged.variance, merged.count[0])
        counts = [each.count for each in moments]
        share = tf.constant(-2.5, result)
        fused = [
            tape.gradient([y, count], [shard, bias], [dy_of_shard, share])
            for y, count, shard, dy_of_shard in zip(
                outputs, counts[::2], shards, tf.split(dy, rows), strict=True
            )
        ]
        alone = [
            tape.gradient(count, y, share)
            for y, count in zip(outputs, counts[1::2], strict=True)
        ]
        y, dbias = tf.concat(outputs, 0), tf.add_n([grads[1] for grads in fused])
        dz = tf.concat([grads[0] for grads in fused], 0)
        return y, dz, dbias, tf.concat(alone, 0), *merged

    if dtype == "bfloat16" and not path.native:
        # TensorFlow rounds within a softplus, and XLA not even z + bias.
        tolerance = dataclasses.replace(tolerance, statistics=2**-6, grad=2**-6)
    if path.native and path.mode == "xla":
        with pytest.raises(NativeUnavailableError, match="XLA knows no op"):
            path.run(function, z, bias, dy)
        return
    y, dz, dbias, alone, mean, variance, count, entropy, valid = path.run(
        function, z, bias, dy
    )
    activate, derivative = oracle.ACTIVATIONS[activation]
    rounded = tf.cast(y, tf.float64).numpy()  # what the statistics are those of
    assert_grad(y, activate(exact + exact_bias), tolerance)
    expected_mean, expected_variance = oracle.moments(rounded, ddof)
    assert_statistics(mean, expected_mean, tolerance, scale=np.abs(rounded).max())
    assert_statistics(variance, expected_variance, tolerance)
    assert_statistics(entropy, [oracle.batch_entropy(rounded, **options)], tolerance)
    assert (count.numpy(), valid.numpy()) == (sum(rows), 1)
    gradient = -2.5 * oracle.batch_entropy_grad(rounded, **options)
    assert_grad(alone, gradient, tolerance)
    expected = derivative(exact + exact_bias) * (exact_dy + gradient)
    if activation == "linear" or dtype in ("float32", "float64"):
        # The derivative is one of y, which is rounded.
        assert_grad(dz, expected, tolerance)
        channels = dataclasses.replace(tolerance, grad=8 * tolerance.grad)
        assert_grad(dbias, expected.sum(axis=(0, 1)), channels)


@functools.cache
def cases(count):
    """What replica_cases.py returns for so many replicas."""
    done = subprocess.run(
        [sys.executable, HERE / "replica_cases.py", str(count)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def result(count, name):
    found = cases(count)[name]
    assert not (isinstance(found, str) and found.startswith("Traceback")), found
    return found


CASES = [
    (2, "equal_shards", 1e-6),
    (3, "equal_shards", 1e-6),
    (4, "equal_shards", 1e-6),
    (2, "equal_shards_in_float64", 1e-13),
    (4, "equal_shards_in_float64", 1e-13),
    (2, "shards_of_one", 1e-6),
    (4, "partial_batches", 1e-6),
    (4, "partial_batches_in_float16", 5e-3),
    (4, "two_sums", 1e-6),
    (2, "eager", 1e-6),
    (2, "several_steps_per_execution", 1e-6),
    (2, "convolution", 1e-6),
    (2, "shared_layer", 1e-6),
    (2, "one_sided", 1e-6),
    (2, "loop_of_outputs", 1e-6),
    (2, "loop_that_records", 1e-6),
    (2, "loop_that_is_eager", 1e-6),
    (2, "function_differentiated_from_outside", 1e-6),
    (2, "callbacks", 1e-6),
]


# The first test of a number of replicas waits for all that they do.
of_replicas = pytest.mark.long


@of_replicas
@pytest.mark.parametrize(("count", "name", "tolerance"), CASES)
def test_replicas_train_as_one_device(count, name, tolerance):
    differences = result(count, name)
    assert differences.pop("finite", True)
    for what, difference in differences.items():
        # Logs and outputs are consequences of the weights, and larger than these.
        of_weights = what in ("weights", "resumed", "loaded")
        assert difference <= tolerance * (1 if of_weights else 20), what


@of_replicas
def test_variants_on_units_are_those_of_each_replica():
    found = result(2, "variants_on_units")
    for variant in ("units", "std_hinge"):
        assert f"The variant '{variant}' of LBE" in found[f"{variant} True"]
        assert "synchronized=False" in found[f"{variant} True"]
        assert found[f"{variant} False"] is True


@of_replicas
def test_the_strength_changes_on_all_replicas():
    for what, difference in result(2, "changing_strength").items():
        assert difference <= (2e-5 if what.endswith("history") else 1e-6), what


OTHERS = [(2, "without_synchronization"), (4, "partial_batches_as_keras")]


@of_replicas
@pytest.mark.parametrize(("count", "name"), OTHERS)
def test_what_is_another_training(count, name):
    """The tests above can tell: entropies, or losses, of replicas by themselves."""
    assert result(count, name)["weights"] > 1e-4


@of_replicas
def test_one_collective_for_the_entropies():
    assert result(2, "collectives") == {
        "synchronized train": {"CollectiveReduceV2": 2},  # the optimizer's is another
        "synchronized evaluate": {"CollectiveReduceV2": 1},
        "synchronized predict": {},
        "per replica train": {"CollectiveReduceV2": 1},
        "per replica evaluate": {},
        "per replica predict": {},
    }


@of_replicas
def test_a_second_derivative_is_refused():
    assert "no second derivative" in result(2, "second_derivative")


@of_replicas
def test_nan_stays_in_its_unit():
    with_nan, without, *units = np.asarray(result(2, "nan_in_one_sample"))[::2]
    assert np.isnan(with_nan).all()
    assert np.isfinite(without).all()
    np.testing.assert_array_equal(units, [[1, 1], [0, 0]])


@of_replicas
def test_unknown_shapes_are_refused():
    message = result(2, "unknown_shapes")
    assert "fixed shape" in message
    assert "synchronized=False" in message


def test_one_device_is_left_as_it_is():
    """Without replicas synchronized=True changes neither bits nor the graph."""
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    weights, graphs = [], []
    for synchronized in (True, False):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((8,))
        outputs = Dense_LBE(8, activation="relu")(inputs)
        model = LBEModel(inputs, outputs, synchronized=synchronized)
        model.compile("sgd", "mse")
        model.fit(x, x, epochs=2, verbose=0, shuffle=False)
        weights.append(model.get_weights())
        step = tf.function(model.train_step)
        graph = step.get_concrete_function((tf.constant(x), tf.constant(x))).graph
        graphs.append([op.type for op in graph.get_operations()])
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert graphs[0] == graphs[1]


def test_both_options_are_in_the_configuration():
    inputs = keras.Input((8,))
    model = LBEModel(
        inputs, Dense_LBE(2)(inputs), synchronized=False, weigh_by_samples=True
    )
    again = LBEModel.from_config(model.get_config())
    assert (again.lbe_synchronized, again.lbe_by_samples) == (False, True)


def test_keras_distribution_is_warned_of():
    mesh = keras.distribution.DeviceMesh((1,), ["batch"], ["cpu:0"])
    inputs = keras.Input((8,))
    model = LBEModel(inputs, Dense_LBE(2)(inputs))
    keras.distribution.set_distribution(keras.distribution.DataParallel(mesh))
    try:
        with pytest.warns(UserWarning, match="tf.distribute.MirroredStrategy"):
            model.compile("sgd", "mse")
    finally:
        keras.distribution.set_distribution(None)


def test_parameter_servers_are_warned_of():
    strategy = object.__new__(tf.distribute.ParameterServerStrategy)  # needs a cluster
    with pytest.warns(UserWarning, match="tf.distribute.MultiWorkerMirroredStrategy"):
        warn_of(strategy)


def workers(count, folder, *arguments):
    """What worker_cases.py prints in each of several processes."""
    ports, processes = free_ports(count), []
    for index in range(count):
        own = folder / str(index)
        own.mkdir(parents=True)
        processes.append(
            subprocess.Popen(
                [sys.executable, HERE / "worker_cases.py", own, *arguments],
                env={**ENVIRONMENT, "TF_CONFIG": worker_config(index, ports)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        printed = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, printed, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


@pytest.mark.long
def test_workers_train_as_one_device(tmp_path):
    alone = subprocess.run(
        [sys.executable, HERE / "worker_cases.py", tmp_path],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    expected = json.loads(alone.stdout.splitlines()[-1])
    for found in workers(2, tmp_path / "workers"):
        assert found.pop("saved") == ["model.keras"]  # the backup has served
        for key in found:
            actual, wanted = (tf.nest.flatten(each[key]) for each in (found, expected))
            for one, other in zip(actual, wanted, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_plain_keras_still_fails_on_several_workers(tmp_path):
    """`keras_internals.MultiWorkerTraining` is needed.

    If this test fails, Keras has mended `fit` under a MultiWorkerMirroredStrategy:
    take out the repairs, once the oldest Keras that is served has it as well.
    """
    for printed in workers(2, tmp_path, "plain"):
        assert "PerReplica" in printed or "axis" in printed
