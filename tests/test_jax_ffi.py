# SPDX-License-Identifier: Apache-2.0
"""The handlers of the custom calls in the XLA within JAX: the bits of lbe_ops_numpy.

They are those that TensorFlow's XLA calls, built without TensorFlow: so they are tested
on a GPU wherever JAX is, and in another version of XLA.
"""

import ctypes
import dataclasses
import functools
import os
import subprocess
import sys
import types

import numpy as np
import oracle
import pytest
from helpers import (
    EMULATION,
    ROOT,
    TOLERANCES,
    build,
    import_numpy_module,
    missing_gpu,
    module_with_gpu,
)
from ml_dtypes import bfloat16

# It is compiled first.
pytestmark = pytest.mark.long

GPU_BUILD = ROOT / "build" / f"jax-{sys.implementation.cache_tag}"
# In the order of cc/kernels.h and cc/activations.h: attributes are their places.
DTYPES = ("float16", "bfloat16", "float32", "float64")
ACTIVATIONS = (
    *("linear", "relu", "leaky_relu", "elu", "selu", "tanh", "sigmoid", "softplus"),
)
# One tile, ragged ends, channels before the last dimension, many parts.
SHAPES = [(2, 1), (17, 7), (9, 4, 4, 3), (1500, 1100)]
FORMULA = {"ddof": 1, "scale": 3.0, "offset": 0.25}
SLOPE = 0.3
THREADS = 8  # for which the work is cut, whatever the pool is


def built(folder, include, *options):
    build(folder, "jax_ffi", f"-DLBE_JAX_INCLUDE={include}", *options)
    library = ctypes.CDLL(os.fspath(folder / "out" / "libjax_ffi.so"))
    library.LbeTarget.restype = library.LbePlatform.restype = ctypes.c_char_p
    library.LbeHandler.restype = ctypes.c_void_p
    library.LbeForwardWorkspace.restype = ctypes.c_int64
    library.LbeGradientWorkspace.restype = ctypes.c_int64
    return library


@dataclasses.dataclass(frozen=True)
class Calls:
    """The custom calls on one platform, as functions of JAX's arrays."""

    jax: types.ModuleType
    device: object  # on which JAX puts arrays
    kernels: types.ModuleType  # lbe_ops_numpy
    library: ctypes.CDLL
    cuda: bool

    def array(self, values, dtype):
        dtype = bfloat16 if dtype == "bfloat16" else dtype
        return self.jax.device_put(np.asarray(values).astype(dtype), self.device)

    def statistics(self, x, **options):
        """entropy, mean, variance, valid."""
        return self._forward("lbe_batch_entropy", [x], [], **options)

    def epilogue(self, z, bias=None, **options):
        """y, entropy, mean, variance, valid; y in the memory of z."""
        inputs = [z] if bias is None else [z, bias]
        y = self.jax.ShapeDtypeStruct(z.shape, z.dtype)
        return self._forward("lbe_epilogue", inputs, [y], **options)

    def epilogue_grad(self, dy, y, mean, variance, entropy_grad, bias_grad, **options):
        """dz in the memory of dy, and dbias."""
        rows, units, dtype = self._problem(y)
        channels = y.shape[-1] if bias_grad else 0
        size = self.library.LbeGradientWorkspace(
            *(self.cuda, dtype, *map(ctypes.c_int64, (rows, units, channels))),
        )
        results = [self.jax.ShapeDtypeStruct(y.shape, y.dtype)]
        if bias_grad:
            results.append(self.jax.ShapeDtypeStruct((channels,), y.dtype))
        inputs = [dy, y, mean, variance, entropy_grad]
        return self._call("lbe_epilogue_grad", inputs, results, size, dtype, **options)

    def _forward(self, target, inputs, results, **options):
        x = inputs[0]
        rows, units, dtype = self._problem(x)
        size = self.library.LbeForwardWorkspace(
            *(self.cuda, dtype, *map(ctypes.c_int64, (rows, units)), len(results)),
            ctypes.c_int64(THREADS),
        )
        result_type = np.float64 if x.dtype == np.float64 else np.float32
        scalar = self.jax.ShapeDtypeStruct((), result_type)
        unit = self.jax.ShapeDtypeStruct(x.shape[1:], result_type)
        results = [*results, scalar, unit, unit, scalar]
        return self._call(target, inputs, results, size, dtype, **options)

    def _problem(self, x):
        return x.shape[0], int(np.prod(x.shape[1:])), DTYPES.index(x.dtype.name)

    def _call(self, target, inputs, results, size, number, **changed):
        """`changed`: attributes; an activation may go by its name."""
        activation = changed.get("activation", "linear")
        if isinstance(activation, str):
            changed["activation"] = np.int64(ACTIVATIONS.index(activation))
        attributes = {
            "dtype": np.int64(number),
            "slope": np.float64(SLOPE),
            "threads": np.int64(THREADS),
            "index": np.int64(0),
            "ddof": np.int64(FORMULA["ddof"]),
            "scale": np.float64(FORMULA["scale"]),
            "offset": np.float64(FORMULA["offset"]),
        }
        in_place = target != "lbe_batch_entropy"
        workspace = self.jax.ShapeDtypeStruct((size,), np.int8)
        call = self.jax.ffi.ffi_call(
            target,
            [*results, workspace],
            input_output_aliases={0: 0} if in_place else None,
        )
        return call(*inputs, **{**attributes, **changed})[:-1]


@pytest.fixture(
    scope="module", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
)
def calls(request):
    if os.environ.get("LBE_REQUIRE_NATIVE") == "1":
        import jax
    else:
        jax = pytest.importorskip("jax")
    cuda = request.param == "gpu"
    if cuda:
        kernels = module_with_gpu()
        try:
            device = jax.devices("gpu")[0]
        except RuntimeError as error:
            missing_gpu(f"JAX {jax.__version__} sees no GPU: {error}")
        library = built(GPU_BUILD, jax.ffi.include_dir(), "-DLBE_CUDA=ON")
    else:
        kernels = import_numpy_module()
        device = jax.devices("cpu")[0]
        # Compiled for other tests already.
        library = built(EMULATION, jax.ffi.include_dir(), "-DLBE_CUDA=EMULATED")
    platforms = {b"Host": "cpu", b"CUDA": "CUDA"}
    for i in range(library.LbeHandlers()):
        platform = platforms[library.LbePlatform(i)]
        if (platform == "CUDA") == cuda:
            jax.ffi.register_ffi_target(
                library.LbeTarget(i).decode(),
                jax.ffi.pycapsule(library.LbeHandler(i)),
                platform=platform,
            )
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield Calls(jax, device, kernels, library, cuda)
    jax.config.update("jax_enable_x64", before)


def bits(arrays):
    arrays = map(np.asarray, arrays)
    return [(a.shape, a.dtype.name, a.tobytes()) for a in arrays]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(calls, dtype, shape, rng):
    x = calls.array(rng.normal(0.3, 1.7, shape), dtype)
    *found, valid = calls.jax.jit(calls.statistics)(x)
    assert float(valid) == 1
    assert bits(found) == bits(calls.kernels.batch_entropy(np.asarray(x), **FORMULA))
    exact = np.asarray(x).astype(np.float64)
    entropies = oracle.unit_entropy(exact, **FORMULA)
    error = abs(float(found[0]) - entropies.mean())
    assert error <= TOLERANCES[dtype].statistics * (np.abs(entropies).mean() + 1)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_an_epilogue_and_its_gradient(calls, dtype, shape, activation, bias, rng):
    check_epilogue(calls, dtype, shape, activation, bias, rng)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_an_epilogue_on_many_threads(calls, dtype, activation, rng):
    check_epilogue(calls, dtype, SHAPES[-1], activation, True, rng)


def check_epilogue(calls, dtype, shape, activation, bias, rng):
    """Bits, and the oracle's entropy, in one program without anything of JAX's."""
    z = calls.array(rng.normal(0.3, 1.7, shape), dtype)
    dy = calls.array(rng.normal(size=shape), dtype)
    b = [calls.array(rng.normal(size=shape[-1]), dtype)] if bias else []

    def function(z, dy, *b):
        outputs = calls.epilogue(z, *b, activation=activation)
        y, entropy, mean, variance, _ = outputs
        return *outputs, *calls.epilogue_grad(
            dy, y, mean, variance, entropy, bias, activation=activation
        )

    y, entropy, mean, variance, valid, *grads = calls.jax.jit(function)(z, dy, *b)
    assert float(valid) == 1
    expected = calls.kernels.epilogue(
        *map(np.asarray, (z, *b)), activation=activation, slope=SLOPE, **FORMULA
    )
    assert bits([y, entropy, mean, variance]) == bits(expected)
    exact = np.asarray(y).astype(np.float64)
    entropies = oracle.unit_entropy(exact, **FORMULA)
    error = abs(float(entropy) - entropies.mean())
    assert error <= TOLERANCES[dtype].statistics * (np.abs(entropies).mean() + 1)
    expected = calls.kernels.epilogue_grad(
        *map(np.asarray, (dy, y, mean, variance)),
        float(entropy),
        activation=activation,
        slope=SLOPE,
        bias_grad=bias,
        **FORMULA,
    )
    assert bits(grads) == bits(expected if bias else expected[:1])


def test_an_epilogue_takes_the_memory_of_z(calls, rng):
    """That of an argument which is given away, and never of one that lives on."""
    values = rng.normal(size=(64, 32))
    # Made by XLA: an array of NumPy that happens to be aligned keeps its memory in JAX,
    # and that cannot be given away.
    z = calls.jax.jit(calls.jax.numpy.negative)(calls.array(-values, "float32"))
    kept = calls.jax.jit(calls.epilogue)(z)
    np.testing.assert_array_equal(z, values.astype(np.float32))
    address = z.unsafe_buffer_pointer()
    given = calls.jax.jit(calls.epilogue, donate_argnums=0)(z)
    assert z.is_deleted()
    assert given[0].unsafe_buffer_pointer() == address
    assert bits(given) == bits(kept)


def test_a_value_that_is_needed_later_is_not_overwritten(calls, rng):
    z = calls.array(rng.normal(size=(64, 32)), "float32")

    @calls.jax.jit
    def function(z):
        doubled = 2 * z
        y, *_ = calls.epilogue(doubled, activation="tanh")
        return y, doubled

    y, doubled = function(z)
    np.testing.assert_array_equal(doubled, 2 * np.asarray(z))
    expected = calls.kernels.epilogue(np.asarray(doubled), activation="tanh")[0]
    assert bits([y]) == bits([expected])


def test_the_gradient_of_an_entropy_in_a_vector(calls, rng):
    y, dy = (calls.array(rng.normal(size=(17, 7)), "float32") for _ in range(2))
    _, mean, variance, _ = calls.statistics(y)
    grads = calls.array([5.0, -2.5, 0.0], "float32")

    def gradient(entropy_grad, index):
        function = functools.partial(
            calls.epilogue_grad, bias_grad=True, index=np.int64(index)
        )
        return calls.jax.jit(function)(dy, y, mean, variance, entropy_grad)

    assert bits(gradient(grads, 1)) == bits(gradient(grads[1], 0))
    with pytest.raises(calls.jax.errors.JaxRuntimeError, match="out of range"):
        calls.jax.block_until_ready(gradient(grads, 3))


def test_many_layers_in_one_program(calls, rng):
    """Workspaces and results in memory that XLA uses again and again."""
    z = calls.array(rng.normal(size=(300, 70)), "float32")

    @calls.jax.jit
    def function(z):
        entropies = []
        for _ in range(20):
            z, entropy, *_ = calls.epilogue(1.5 * z, activation="selu")
            entropies.append(entropy)
        return z, entropies

    y, entropies = function(z)
    expected = np.asarray(z)
    for entropy in entropies:
        expected, wanted, *_ = calls.kernels.epilogue(
            np.float32(1.5) * expected, activation="selu", slope=SLOPE, **FORMULA
        )
        assert float(entropy) == float(wanted)
    assert bits([y]) == bits([expected])


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"dtype": np.int64(4)}, "no dtype 4"),
        ({"activation": np.int64(8)}, "no activation 8"),
        ({"ddof": np.int64(2)}, "a formula that it serves"),
        ({"scale": np.float64(0)}, "a formula that it serves"),
    ],
)
def test_what_another_version_wrote_is_refused(calls, changed, words):
    x = calls.array(np.ones((4, 2)), "float32")
    with pytest.raises(calls.jax.errors.JaxRuntimeError, match=words):
        calls.jax.block_until_ready(
            calls.jax.jit(lambda x: calls.statistics(x, **changed))(x)
        )


def test_a_batch_that_is_too_small_is_refused(calls):
    x = calls.array(np.ones((1, 2)), "float32")
    with pytest.raises(
        calls.jax.errors.JaxRuntimeError, match="more than ddof samples"
    ):
        calls.jax.block_until_ready(calls.jax.jit(calls.statistics)(x))


@pytest.mark.gpu
def test_in_command_buffers():
    """The tests above once more, with every call recorded in a CUDA graph."""
    module_with_gpu()
    flags = "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL"
    if flags in os.environ.get("XLA_FLAGS", ""):
        pytest.skip("this is that process")
    flags += " --xla_gpu_graph_min_graph_size=1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", __file__],
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
