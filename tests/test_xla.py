# SPDX-License-Identifier: Apache-2.0
"""The native op under XLA: its bits, its errors, its libraries, and Keras on top.

Against the oracle, the paths `native-xla` and `reference-xla` of test_ops.py.
"""

import concurrent.futures
import shutil
import warnings

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import (
    TOLERANCES,
    assert_grad,
    assert_statistics,
    logs_of_batch,
    require_native,
    require_xla,
    run_script,
    samples,
    tensor,
)

import lbe_ops
from lbe_ops import Dense_LBE, LBEModel, LBERegularizer, info, native, ops

# Keras reads a variable into NumPy 2 in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

# Serial, tiles of columns, parts of rows, both, and ragged ends.
SHAPES = [(2, 1), (9,), (129, 70), (64, 5000), (60000, 9), (1500, 1100), (33, 7, 3)]


@pytest.fixture
def xla():
    require_native()
    require_xla()


def outputs(x, **attributes):
    """Every output of the op: entropy, mean, variance, valid."""
    formula = ops.check_formula(0, ops.SCALE, ops.OFFSET)
    return ops._call(native.load().ops, x, formula, **attributes)


def outputs_and_gradient(x, **attributes):
    with tf.GradientTape() as tape:
        tape.watch(x)
        results = outputs(x, **attributes)
    return *results, tape.gradient(results.entropy, x)


def compiled(function):
    return tf.function(function, jit_compile=True, autograph=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_as_outside_of_xla(xla, device, dtype, shape, rng):
    x, _ = tensor(rng.normal(0.3, 1.7, shape), dtype)
    function = compiled(outputs)
    assert "lbe_batch_entropy" in function.experimental_get_compiler_ir(x)()
    for inside, outside in zip(function(x), outputs(x), strict=True):
        assert inside.device.endswith(device[1:])
        assert outside.device.endswith(device[1:])
        np.testing.assert_array_equal(inside.numpy(), outside.numpy())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ["relu", "linear", "selu", "tanh", "softplus"])
@pytest.mark.parametrize("shape", [(17, 7), (300, 65), (9, 4, 4, 3)], ids=str)
def test_an_epilogue_has_the_same_bits_as_outside_of_xla(
    xla, device, dtype, shape, activation, bias, rng
):
    z, _ = tensor(rng.normal(0.3, 1.7, shape), dtype)
    weights, _ = tensor(rng.normal(size=shape), dtype)
    b = [tensor(rng.normal(size=shape[-1]), dtype)[0]] if bias else []

    def function(z, *b):
        with tf.GradientTape() as tape:
            tape.watch([z, *b])
            y, entropy, valid = ops.epilogue(
                1.0 * z, *b, activation=activation, native=True
            )
        dz, *dbias = tape.gradient([y, entropy], [z, *b], [weights, 40.0 * entropy])
        return y, entropy, valid, dz, *dbias

    program = compiled(function)
    hlo = program.experimental_get_compiler_ir(z, *b)()
    tap = activation == "linear" and not bias
    assert ("lbe_epilogue_grad" in hlo) is not tap
    assert ('"lbe_epilogue"' in hlo) is not tap
    assert ("lbe_batch_entropy" in hlo) is tap
    for inside, outside in zip(program(z, *b), function(z, *b), strict=True):
        assert inside.device.endswith(device[1:])
        if tap and inside.shape == z.shape:  # XLA's own gradient
            assert_close(inside, outside, dtype)
        else:
            np.testing.assert_array_equal(inside.numpy(), outside.numpy())


def assert_close(found, expected, dtype):
    found, expected = (tf.cast(t, tf.float64).numpy() for t in (found, expected))
    tolerance = 4 * TOLERANCES[dtype].grad
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("offset", [1.0, 0.0])
@pytest.mark.parametrize("shape", [(2,), (17, 7, 3), (300, 65)], ids=str)
def test_plain_hlo(xla, dtype, tolerance, shape, offset, monkeypatch, rng):
    """What a library without kernels for the device compiles to."""
    monkeypatch.setenv("LBE_OPS_XLA_CUSTOM_CALL", "0")
    x, exact = tensor(rng.normal(0.5, 2, shape), dtype)

    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            entropy = lbe_ops.batch_entropy(x, offset=offset, ddof=1, native=True)
        mean, variance, _ = lbe_ops.unit_statistics(x, ddof=1, native=True)
        return entropy, tape.gradient(entropy, x), mean, variance

    function = compiled(function)
    assert "custom-call" not in function.experimental_get_compiler_ir(x)()
    entropy, grad, mean, variance = function(x)
    entropies = oracle.unit_entropy(exact, 1, offset=offset)
    assert_statistics(
        entropy, entropies.mean(), tolerance, np.abs(entropies).mean() + 1
    )
    assert_grad(grad, oracle.batch_entropy_grad(exact, 1, offset=offset), tolerance)
    expected_mean, expected_variance = oracle.moments(exact, 1)
    assert_statistics(tf.reshape(mean, [-1]), expected_mean, tolerance, 5.0)
    assert_statistics(tf.reshape(variance, [-1]), expected_variance, tolerance)


def test_plain_hlo_of_hard_values(xla, monkeypatch):
    """NaN, both infinities, a dead unit, a tiny variance, a large mean."""
    monkeypatch.setenv("LBE_OPS_XLA_CUSTOM_CALL", "0")
    x = samples(9, 6)
    x[4, :3] = np.nan, np.inf, -np.inf
    x[:, 3] = 0.0
    x[:, 4] *= 1e-5
    x[:, 5] = 1e2 + x[:, 5]
    x = tf.constant(x)
    found, expected = compiled(outputs_and_gradient)(x), outputs_and_gradient(x)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if index == 1:  # the mean of infinity is infinity here, as in the reference
            a, b = a[3:], b[3:]
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    finite = compiled(outputs)(x[:, 3:]).entropy
    expected = oracle.batch_entropy(x[:, 3:].numpy())
    assert_statistics(finite, expected, TOLERANCES["float32"])


@pytest.mark.parametrize("small_batch", ["zero", "error"])
def test_a_batch_whose_size_xla_does_not_know(xla, small_batch):
    """tf.boolean_mask: XLA compiles once, with a bound of the size."""
    x = tf.constant(samples(8, 3))

    @compiled
    def function(x, mask):
        return outputs_and_gradient(tf.boolean_mask(x, mask), small_batch=small_batch)

    for mask in ([1, 1, 0, 0, 1, 0, 1, 1], [1] * 8):
        mask = tf.cast(mask, tf.bool)
        expected = outputs_and_gradient(tf.boolean_mask(x, mask))
        for a, b in zip(function(x, mask), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    for mask in ([0] * 7 + [1], [0] * 8):
        entropy, _, _, valid, grad = function(x, tf.cast(mask, tf.bool))
        # No program of XLA can fail: there is no entropy, which a NaN says.
        assert float(entropy) == 0 if small_batch == "zero" else np.isnan(entropy)
        assert float(valid) == 0
        assert not np.any(grad)


def test_sizes_that_only_the_call_knows(xla):
    """XLA compiles anew for every shape."""

    @tf.function(jit_compile=True, input_signature=[tf.TensorSpec(None)])
    def function(x):
        return lbe_ops.batch_entropy(x, native=True)

    for shape in ((6, 4, 5), (3, 2), (7,)):
        x = samples(*shape)
        assert float(function(x)) == float(lbe_ops.batch_entropy(x, native=True))
    for shape in ((1, 3), (0, 3), (1,), (4, 0), ()):
        with pytest.raises(tf.errors.InvalidArgumentError, match="Received: "):
            function(tf.zeros(shape))


def test_the_raw_gradient_checks_its_inputs(xla):
    x, unit, scalar = tf.ones((3, 2)), tf.ones(2), tf.ones(())
    grad = native.load().ops.lbe_batch_entropy_grad

    @tf.function(
        jit_compile=True, input_signature=[[tf.TensorSpec(None) for _ in range(5)]]
    )
    def function(inputs):
        return grad(*inputs[:4], [inputs[4], inputs[4]], [])

    assert function([x, unit, unit, scalar, unit]).shape == (3, 2)
    for inputs in (
        [x, tf.ones(3), unit, scalar, unit],
        [x, unit, tf.ones((1, 2)), scalar, unit],
        [x, unit, unit, unit, unit],
        [x, unit, unit, scalar, scalar],
        [scalar, scalar, scalar, scalar, scalar],
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match="Received"):
            function(inputs)


def test_many_calls_at_once(xla):
    """As many callers as there are, on the threads of one pool."""
    x = [tf.constant(samples(512, 1024, seed=seed)) for seed in range(8)]
    expected = [float(lbe_ops.batch_entropy(a, native=True)) for a in x]
    # Independent calls within a program, too.
    function = compiled(lambda x: [lbe_ops.batch_entropy(a, native=True) for a in x])

    def call(_):
        return [float(h) for h in function(x)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(call, range(40)):
            assert found == expected


SCRIPT = """
import json, os, sys
import numpy as np
import tensorflow as tf

if "THREADS" in os.environ:
    tf.config.threading.set_intra_op_parallelism_threads(int(os.environ["THREADS"]))
if "XLA_FIRST" in os.environ:
    tf.function(lambda x: x + 1, jit_compile=True)(tf.ones(3))
import lbe_ops

for path in sys.argv[1:]:
    lbe_ops.native.load()
    tf.load_library(path)

@tf.function(jit_compile=True)
def function(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        h = lbe_ops.batch_entropy(x, native=True)
    return h, tape.gradient(h, x)

found = []
for shape in ((1500, 1100), (60000, 9), (64, 5000)):
    x = np.random.default_rng(0).normal(0.3, 1.7, shape).astype("float32")
    h, dx = function(x)
    found.append([h.numpy().tobytes().hex(), bool(np.isfinite(dx).all())])
json.dump(found, sys.stdout)
"""


@pytest.mark.long
def test_in_other_processes(xla, tmp_path):
    """On 1 and 7 threads, after XLA has compiled, and with the library twice."""
    expected = []
    for shape in ((1500, 1100), (60000, 9), (64, 5000)):
        x = np.random.default_rng(0).normal(0.3, 1.7, shape).astype("float32")
        entropy = lbe_ops.batch_entropy(x, native=True).numpy()
        expected.append([entropy.tobytes().hex(), True])
    copy = tmp_path / "copy.so"
    shutil.copy(native.LIBRARY_PATH.with_name(native.XLA_LIBRARY_NAME), copy)
    assert run_script(SCRIPT, THREADS="1") == expected
    assert run_script(SCRIPT, THREADS="7", XLA_FIRST="1") == expected
    assert run_script(SCRIPT, copy) == expected


STEPS = """
import json, sys
import tensorflow as tf
import lbe_ops

factors = (1.0, 2.0, 4.0, 8.0)

@tf.function(jit_compile=True, autograph=False)
def step(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        entropies = [lbe_ops.batch_entropy(x * k, native=True) for k in factors]
        loss = tf.add_n(entropies)
    return tf.stack(entropies), tape.gradient(loss, x)

with tf.device(sys.argv[1]):
    inputs = [tf.random.stateless_normal((700, 330), [0, seed]) for seed in range(4)]
    expected = [
        [float(lbe_ops.batch_entropy(x * k, native=True)) for k in factors]
        for x in inputs
    ]
    # New memory for the input of every step; no wait between the steps.
    found = [step(tf.identity(inputs[k % 4])) for k in range(200)]
same_entropies = [
    h.numpy().tolist() == expected[k % 4] for k, (h, _) in enumerate(found)
]
same_gradients = [
    bool(tf.reduce_all(dx == found[k % 4][1])) for k, (_, dx) in enumerate(found)
]
places = {a.device for pair in found for a in pair}
print(json.dumps([all(same_entropies), all(same_gradients), sorted(places)]))
"""


@pytest.mark.parametrize(
    "commands",
    [
        pytest.param("", id="launched"),
        pytest.param("FUSION,CUSTOM_CALL", id="recorded", marks=pytest.mark.gpu),
    ],
)
def test_many_steps(xla, device, commands):
    """On a GPU one by one, and recorded as command buffers (CUDA graphs)."""
    flags = (
        f"--xla_gpu_enable_command_buffer={commands} --xla_gpu_graph_min_graph_size=1"
    )
    entropies, gradients, places = run_script(STEPS, device, XLA_FLAGS=flags)
    assert entropies
    assert gradients
    assert [place.endswith(device[1:]) for place in places] == [True]


# Keras


def network(kind, dtype=None, **arguments):
    inputs = keras.Input((5,))
    x = inputs
    for _ in range(2):
        regularizer = LBERegularizer(lbe_alpha=0.75, **arguments)
        x = keras.layers.Dense(
            8, "tanh", activity_regularizer=regularizer, dtype=dtype
        )(x)
    return kind(inputs, keras.layers.Dense(2, dtype="float32")(x))


def history(model, jit_compile, batch_size=8):
    """Logs of fit, evaluate and predict; 21 samples leave a last batch of 5."""
    keras.utils.set_random_seed(0)
    x, y = samples(21, 5), samples(21, 2, seed=1)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
    compiles = model.jit_compile
    logs = model.fit(
        x, y, batch_size, epochs=2, shuffle=False, validation_data=(x, y), verbose=0
    ).history
    evaluated = model.evaluate(x, y, batch_size, verbose=0, return_dict=True)
    logs |= {f"evaluated_{name}": value for name, value in evaluated.items()}
    logs["predicted"] = model.predict(x, batch_size, verbose=0)
    return compiles, logs


def trains_compiled(model, jit_compile):
    """Whether XLA compiles the model; trains one step."""
    model.compile("sgd", "mse", jit_compile=jit_compile)
    loss = model.train_on_batch(samples(9, 5), samples(9, 2))
    assert np.isfinite(loss).all()
    return model.jit_compile


@pytest.fixture
def gpu(monkeypatch):
    """Keras finds a GPU, and so turns XLA on by itself; there need not be one."""
    listed = tf.config.list_physical_devices()
    found = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(
        tf.config,
        "list_physical_devices",
        lambda kind=None: [*listed, found] if kind is None else [],
    )


@pytest.mark.parametrize(
    "kind, jit_compile, custom_call",
    [
        (LBEModel, True, "1"),
        (LBEModel, "auto", "0"),
        (keras.Model, True, "0"),
        (keras.Model, "auto", "1"),
    ],
)
def test_fit_evaluate_and_predict(
    xla, gpu, kind, jit_compile, custom_call, monkeypatch
):
    monkeypatch.setenv("LBE_OPS_XLA_CUSTOM_CALL", custom_call)
    keras.utils.set_random_seed(0)
    outside, expected = history(network(kind), False)
    keras.utils.set_random_seed(0)
    inside, found = history(network(kind, native=True), jit_compile)
    assert (outside, inside) == (False, True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_last_batch_of_one_sample(xla):
    keras.utils.set_random_seed(0)
    _, expected = history(network(LBEModel), False, batch_size=20)
    keras.utils.set_random_seed(0)
    _, found = history(network(LBEModel, native=True), True, batch_size=20)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", [LBEModel, keras.Model])
def test_mixed_precision(xla, kind, policy):
    model = network(kind, dtype=policy, native=True)
    before = [layer.get_weights() for layer in model.layers]
    compiles, logs = history(model, True)
    assert compiles
    assert np.isfinite(logs["loss"]).all()
    after = [layer.get_weights() for layer in model.layers]
    for old, new in zip(before[1:], after[1:], strict=True):
        for a, b in zip(old, new, strict=True):
            assert np.isfinite(b).all()
            assert not np.array_equal(a, b)


def test_a_saved_model_trains_on(xla, tmp_path):
    model = network(LBEModel)
    history(model, True)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.jit_compile
    batch = samples(21, 5), samples(21, 2, seed=1)
    first, second = (
        list(logs_of_batch(m.train_on_batch, *batch).values()) for m in (model, loaded)
    )
    np.testing.assert_allclose(first, second, rtol=1e-6)


# A library that was built without the lowering


@pytest.fixture
def no_lowering(monkeypatch):
    """The library of the ops as it is, without that of XLA."""
    require_native()
    ops_alone = native.Native(native.load().ops, "", "it was built without that.")
    monkeypatch.setattr(native, "load", lambda: ops_alone)
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)


def test_without_the_lowering_the_reference_takes_over(no_lowering):
    types = []

    def function(x):
        h = lbe_ops.batch_entropy(x)
        graph = tf.compat.v1.get_default_graph()
        types.append({op.type for op in graph.get_operations()})
        return h

    x = samples(9, 5)
    expected = oracle.batch_entropy(x)
    assert_statistics(compiled(function)(x), expected, TOLERANCES["float32"])
    assert_statistics(tf.function(function)(x), expected, TOLERANCES["float32"])
    assert ["LBE>BatchEntropy" in names for names in types] == [False, True]


def test_without_the_lowering_a_required_op_says_why(no_lowering):
    with pytest.raises(
        lbe_ops.NativeUnavailableError, match="XLA.*it was built without that"
    ):
        compiled(lambda x: lbe_ops.batch_entropy(x, native=True))(tf.ones((2, 2)))
    assert native.select(True) is not None


@pytest.mark.parametrize("kind", [LBEModel, keras.Model])
def test_without_the_lowering_keras_leaves_xla_out(no_lowering, gpu, kind):
    """With a warning if it was asked for; not where the op is not in use."""
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        assert not trains_compiled(network(kind), True)
    assert not trains_compiled(network(kind), "auto")
    assert trains_compiled(network(kind, native=False), True)
    with lbe_ops.use_native(False):
        assert trains_compiled(network(kind), "auto")


def test_every_layer_with_lbe_says_that_it_cannot_be_compiled(no_lowering):
    model = keras.Sequential([keras.Input((5,)), Dense_LBE(4), keras.layers.Dense(2)])
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        model.compile("sgd", "mse", jit_compile=True)
    plain = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    plain.compile("sgd", "mse", jit_compile=True)
    assert plain.jit_compile


def test_without_any_library_xla_compiles_the_reference(monkeypatch):
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(native, "load", lambda: native.Native(None, "it is not there."))
    assert trains_compiled(network(LBEModel), True)


def test_info_says_what_xla_compiles(monkeypatch):
    for loaded, expected in (
        (native.Native(None, "gone."), "no: there is no native op."),
        (native.Native(object(), "", "it was left out."), "no: it was left out."),
        (native.Native(object(), "", ""), "yes: plain HLO only"),
        (native.Native(object(), "", "", True), "yes"),
    ):
        monkeypatch.setattr(native, "load", lambda loaded=loaded: loaded)
        assert info.collect()["xla"] == expected


# The library as a file


@pytest.fixture
def libraries(monkeypatch, tmp_path):
    """The library of the ops loaded, that of XLA a copy that is not loaded yet."""
    require_native()
    require_xla()
    loaded = native.load()
    path = tmp_path / native.XLA_LIBRARY_NAME
    shutil.copy(native.LIBRARY_PATH.with_name(path.name), path)
    shutil.copy(native.LIBRARY_PATH, tmp_path)
    monkeypatch.setattr(native, "LIBRARY_PATH", tmp_path / native.LIBRARY_PATH.name)
    # A second copy of the ops cannot be loaded into a process that has them.
    monkeypatch.setattr(tf, "load_op_library", lambda path: loaded.ops)
    native._load.cache_clear()
    yield path
    monkeypatch.undo()
    native._load.cache_clear()
    assert native.load() == loaded


def test_a_missing_lowering_is_quiet_and_says_what_to_install(libraries):
    libraries.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = native.load()
    assert loaded.ops is not None
    assert loaded.reason == ""
    assert "was built without libxla_ops.so for TensorFlow 2." in loaded.xla_reason
    assert info.collect()["xla"] == f"no: {loaded.xla_reason}"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda content: content[: len(content) // 2], "is damaged"),
        (
            lambda content: content.replace(
                b"was built for TensorFlow ", b"was built for TensorFlow 1"
            ),
            "built for TensorFlow 1",
        ),
        (lambda c: c.replace(b"_ZN10tensorflow", b"_ZN10tensorfl0w"), "undefined"),
    ],
    ids=["truncated", "another minor", "a missing symbol"],
)
def test_a_lowering_that_cannot_be_used_warns_once(libraries, change, words):
    """And leaves the op outside of XLA as it is."""
    libraries.write_bytes(change(libraries.read_bytes()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = [native.load() for _ in range(3)][0]
    assert loaded.ops is not None
    assert loaded.reason == ""
    assert words in loaded.xla_reason
    (warning,) = caught
    assert "under XLA" in str(warning.message)
    assert words in str(warning.message)
    assert "builds it for what is installed here" in str(warning.message)


def test_a_second_copy_loads(libraries):
    assert native.load().xla_reason == ""
    assert native.load().custom_call
