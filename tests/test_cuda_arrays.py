# SPDX-License-Identifier: Apache-2.0
"""lbe_ops_numpy on CUDA arrays: on a GPU, and without one by emulation.

The emulated module has the same kernels, compiled as C++ to run on the CPU, where the
GPU's memory is the process's. So the values, the bits and every check are tested
anywhere; what needs a GPU is marked `gpu`.
"""

import re
import shutil
import subprocess
import sys

import numpy as np
import oracle
import pytest
from helpers import (
    TOLERANCES,
    import_numpy_module,
    missing_gpu,
    module_with_gpu,
    signatures,
    stubbed,
)
from ml_dtypes import bfloat16

# One warp and less, ragged rows that are not aligned, several tiles, many splits.
SHAPES = [(2, 1), (3, 5), (9, 38), (64, 2, 16), (130, 7, 9), (1000, 3), (259, 333)]
# Many rows of few units, and units that are not a multiple of what a thread loads.
EPILOGUE_SHAPES = [(1027, 64), (70, 5, 3, 33), (70, 501), (1000, 3), (65, 8)]
LARGE_SHAPES = [(65536, 64), (4096, 777), (256, 4095)]
BLOCKS = (0, 1, 7, 1024)
FORMULAS = [
    {},
    {"ddof": 1, "scale": 2 * oracle.SCALE, "offset": 0.0},
    {"ddof": 1, "scale": 3.0, "offset": 0.25},
]


# On the GPU, too, with other versions of PyTorch and NumPy than those that we chose:
# what they say about each other's future is no fault of a kernel.
GPU = [
    pytest.mark.gpu,
    *(
        pytest.mark.filterwarnings(f"default:{warning}")
        for warning in (
            ":DeprecationWarning",
            ":PendingDeprecationWarning",
            ":FutureWarning",
            ".*deprecated:UserWarning",
        )
    ),
]


def on_gpu(test):
    """Marks a test that runs on a GPU alone."""
    for mark in GPU:
        test = mark(test)
    return test


@pytest.fixture(
    params=[
        pytest.param("emulated", marks=pytest.mark.long),
        pytest.param("gpu", marks=GPU),
    ]
)
def module(request):
    if request.param == "emulated":
        return request.getfixturevalue("emulated_module")
    return module_with_gpu()


class Foreign:
    """NumPy's memory as an array of another library in the emulated GPU's."""

    def __init__(self, array, **interface):
        self.array = array
        self.__cuda_array_interface__ = {
            "version": 2,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, not array.flags.writeable),
            "strides": None if array.flags.c_contiguous else array.strides,
            **interface,
        }


def normal(shape, dtype, seed=0):
    x = np.random.default_rng(seed).normal(0.3, 1.7, shape)
    return x.astype(bfloat16 if dtype == "bfloat16" else dtype)


def bits(array):
    """The bytes of an array, wherever it lies."""
    array = array.numpy() if hasattr(array, "numpy") else np.asarray(array)
    return array.shape, array.dtype.str, array.tobytes()


def same_bits(found, expected):
    return [bits(a) for a in found] == [bits(a) for a in expected]


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: str(len(f)) + str(f)[-6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_bits(module, dtype, shape, formula):
    """The oracle's values; the CPU kernels' bits, whatever the blocks."""
    x = normal(shape, dtype)
    on_gpu = module.cuda_array(x)
    expected = module.batch_entropy(x, **formula)
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, *shape[1:])).astype(expected[1].dtype)
    expected_grads = [
        module.batch_entropy_grad(x, *expected[1:], -2.5, **formula),
        module.batch_entropy_grad(
            x, *expected[1:], 0.5, mean_grad=a, variance_grad=b, **formula
        ),
    ]
    a, b = module.cuda_array(a), module.cuda_array(b)
    for blocks in BLOCKS:
        found = module.batch_entropy(on_gpu, blocks=blocks, **formula)
        assert same_bits(found, expected)
        grads = [
            module.batch_entropy_grad(
                on_gpu, *found[1:], -2.5, blocks=blocks, **formula
            ),
            module.batch_entropy_grad(
                *(on_gpu, *found[1:], 0.5),
                mean_grad=a,
                variance_grad=b,
                blocks=blocks,
                **formula,
            ),
        ]
        assert same_bits(grads, expected_grads)
    exact = x.astype(np.float64)
    tolerance = TOLERANCES[dtype]
    entropies = oracle.unit_entropy(exact, **formula)
    error = abs(float(found[0].numpy()) - entropies.mean())
    assert error <= tolerance.statistics * (np.abs(entropies).mean() + 1)
    expected_grad = -2.5 * oracle.batch_entropy_grad(exact, **formula)
    error = np.abs(grads[0].numpy().astype(np.float64) - expected_grad).max()
    allowed = tolerance.grad * np.abs(expected_grad).max() + tolerance.grad_atol
    assert error <= allowed


def test_stub_has_the_names_and_signatures_of_the_module(emulated_module):
    of_stub, of_module = stubbed(), signatures(emulated_module)
    assert of_stub.keys() == of_module.keys() and "CudaArray.numpy" in of_module
    for name, found in of_module.items():
        assert of_stub[name] in (found, found * 2), name


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rows_that_are_not_aligned(emulated_module, dtype, offset):
    """x at any element of memory; dx, too."""
    rows, units = 40, 24
    x = normal(rows * units + offset, dtype)[offset:].reshape(rows, units)
    dx = np.empty(rows * units + 1, x.dtype)[1:].reshape(rows, units)
    expected = emulated_module.batch_entropy(x)
    found = emulated_module.batch_entropy(Foreign(x))
    assert same_bits(found, expected)
    emulated_module.batch_entropy_grad(Foreign(x), *found[1:], dx=Foreign(dx))
    assert same_bits([dx], [emulated_module.batch_entropy_grad(x, *expected[1:])])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_come_out_as_nan(module, dtype, value):
    x = normal((70, 38), dtype)
    x[4, 3] = x[69, 37] = value
    entropy, mean, variance = module.batch_entropy(module.cuda_array(x))
    assert np.isnan(entropy.numpy())
    expected = np.isin(np.arange(38), (3, 37))
    assert (np.isnan(variance.numpy()) == expected).all()
    dx = module.batch_entropy_grad(module.cuda_array(x), mean, variance).numpy()
    assert (np.isnan(dx.astype(np.float32)) == expected).all()


def test_gradient_in_place(module, dtype):
    x = normal((65, 70), dtype)
    on_gpu = module.cuda_array(x)
    _, *statistics = module.batch_entropy(on_gpu)
    expected = module.batch_entropy_grad(on_gpu, *statistics)
    assert module.batch_entropy_grad(on_gpu, *statistics, dx=on_gpu) is on_gpu
    assert same_bits([on_gpu], [expected])


def test_outputs_and_workspace_of_the_caller(module):
    x = module.cuda_array(normal((300, 70), "float32"))
    expected = module.batch_entropy(x)
    empty = np.full(70, np.nan, np.float32)
    out = [module.cuda_array(a) for a in (empty[0], empty, empty)]
    size = module.cuda_workspace_bytes(x)
    workspace = module.cuda_array(np.zeros(size, np.uint8))
    found = module.batch_entropy(x, out=out, workspace=workspace)
    assert all(a is b for a, b in zip(found, out, strict=True))
    assert same_bits(found, expected)
    small = module.cuda_array(np.zeros(size - 1, np.uint8))
    with pytest.raises(ValueError, match=f"at least {size} bytes"):
        module.batch_entropy(x, workspace=small)


def test_entropy_grad_in_the_gpus_memory(module, dtype):
    x = module.cuda_array(normal((12, 5), dtype))
    entropy, *statistics = module.batch_entropy(x)
    expected = module.batch_entropy_grad(x, *statistics, float(entropy.numpy()))
    found = module.batch_entropy_grad(x, *statistics, entropy)
    assert same_bits([found], [expected])


def run_epilogue(module, z, bias, dy, entropy_grad=-2.5, **options):
    """Everything that the epilogue and its gradient return, dbias only with a bias."""
    blocks = {"blocks": options.pop("blocks")} if "blocks" in options else {}
    y, *statistics = module.epilogue(z, bias, **blocks, **options)
    dz, dbias = module.epilogue_grad(
        *(dy, y, *statistics[1:], entropy_grad),
        bias_grad=bias is not None,
        **blocks,
        **options,
    )
    return [y, *statistics, dz, *([] if bias is None else [dbias])]


def check_epilogue(module, shape, dtype, activation, has_bias, blocks):
    """The CPU kernels' bits."""
    z, dy = normal(shape, dtype), normal(shape, dtype, seed=1)
    bias = normal(shape[-1:], dtype, seed=2) if has_bias else None
    options = {"activation": activation, "slope": oracle.SLOPE, **FORMULAS[2]}
    expected = run_epilogue(module, z, bias, dy, **options)
    arrays = [a if a is None else module.cuda_array(a) for a in (z, bias, dy)]
    for number in blocks:
        found = run_epilogue(module, *arrays, blocks=number, **options)
        assert same_bits(found, expected)


@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_epilogue_has_the_cpus_bits(module, dtype, activation, has_bias):
    for shape in ((3, 5), (130, 7, 9), (259, 40)):
        check_epilogue(module, shape, dtype, activation, has_bias, (0, 7))


@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", EPILOGUE_SHAPES, ids=str)
def test_epilogue_of_many_shapes(module, dtype, shape, has_bias):
    check_epilogue(module, shape, dtype, "relu", has_bias, (0, 5))


@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
@pytest.mark.parametrize(
    "module, activations, blocks",
    [
        pytest.param("emulated", ("relu",), (0,), marks=pytest.mark.slow),
        pytest.param("gpu", tuple(oracle.ACTIVATIONS), (0, 264, 2048), marks=GPU),
    ],
    indirect=["module"],
    ids=["emulated", "gpu"],
)
def test_epilogue_of_large_shapes(module, dtype, shape, activations, blocks):
    for activation in activations:
        for has_bias in (False, True):
            check_epilogue(module, shape, dtype, activation, has_bias, blocks)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_epilogue_of_arrays_that_are_not_aligned(emulated_module, dtype, offset):
    rows, units = 40, 24

    def off(values):
        memory = np.empty(values.size + offset, values.dtype)[offset:]
        memory[:] = values.ravel()
        return memory.reshape(values.shape)

    z, dy = normal((rows, units), dtype), normal((rows, units), dtype, seed=1)
    bias = normal((units,), dtype, seed=2)
    options = {"activation": "tanh"}
    expected = run_epilogue(emulated_module, z, bias, dy, **options)
    y, dz, dbias = (off(np.zeros_like(a)) for a in (z, dy, bias))
    _, entropy, mean, variance = emulated_module.epilogue(
        Foreign(off(z)), Foreign(off(bias)), y=Foreign(y), **options
    )
    emulated_module.epilogue_grad(
        *(Foreign(off(dy)), Foreign(y), mean, variance, -2.5),
        dz=Foreign(dz),
        dbias=Foreign(dbias),
        **options,
    )
    assert same_bits([y, entropy, mean, variance, dz, dbias], expected)


def test_epilogue_in_place(module, dtype):
    z, dy = normal((65, 70), dtype), normal((65, 70), dtype, seed=1)
    bias = module.cuda_array(normal((70,), dtype, seed=2))
    options = {"activation": "elu", "slope": 0.5}
    arrays = [module.cuda_array(a) for a in (z, dy)]
    expected = run_epilogue(module, arrays[0], bias, arrays[1], **options)
    for place in (0, 1):  # dz replaces y, or dy
        arrays = [module.cuda_array(a) for a in (z, dy)]
        y, gradient = arrays
        found = module.epilogue(y, bias, y=y, **options)
        assert found[0] is y
        assert same_bits(found, expected[:4])
        dz, dbias = module.epilogue_grad(
            *(gradient, y, *found[2:], -2.5),
            bias_grad=True,
            dz=arrays[place],
            **options,
        )
        assert dz is arrays[place]
        assert same_bits([dz, dbias], expected[4:])


def test_epilogue_with_outputs_and_workspaces_of_the_caller(module):
    units = 70
    z = module.cuda_array(normal((300, units), "float32"))
    bias = module.cuda_array(normal((units,), "float32", seed=2))
    options = {"activation": "relu"}
    expected = run_epilogue(module, z, bias, z, **options)
    empty = np.full(z.shape, np.nan, np.float32)
    y, dz = module.cuda_array(empty), module.cuda_array(empty)
    out = [module.cuda_array(a) for a in (empty[0, 0], empty[0], empty[0])]
    dbias = module.cuda_array(empty[0])
    sizes = (
        module.cuda_workspace_bytes(z, epilogue=True),
        module.cuda_grad_workspace_bytes(z),
    )
    forward, backward = (module.cuda_array(np.zeros(n, np.uint8)) for n in sizes)
    found = module.epilogue(z, bias, y=y, out=out, workspace=forward, **options)
    grads = module.epilogue_grad(
        *(z, y, *out[1:], -2.5), dz=dz, dbias=dbias, workspace=backward, **options
    )
    given = (y, *out, dz, dbias)
    assert all(a is b for a, b in zip((*found, *grads), given, strict=True))
    assert same_bits(given, expected)
    small = [module.cuda_array(np.zeros(n - 1, np.uint8)) for n in sizes]
    with pytest.raises(ValueError, match=f"at least {sizes[0]} bytes"):
        module.epilogue(z, bias, workspace=small[0], **options)
    with pytest.raises(ValueError, match=f"at least {sizes[1]} bytes"):
        module.epilogue_grad(
            z, y, *out[1:], bias_grad=True, workspace=small[1], **options
        )


def test_epilogue_with_entropy_grad_in_the_gpus_memory(module, dtype):
    z = module.cuda_array(normal((12, 5), dtype))
    _, entropy, *_ = module.epilogue(z, activation="tanh")
    number = float(entropy.numpy())
    expected = run_epilogue(module, z, None, z, number, activation="tanh")
    found = run_epilogue(module, z, None, z, entropy, activation="tanh")
    assert same_bits(found, expected)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_epilogue_of_half_precision_by_another_name(emulated_module, name):
    z, bias = normal((12, 5), name), normal((5,), name)
    options = {"activation": "relu"}
    expected = run_epilogue(emulated_module, z, bias, z, **options)
    there = [Foreign(a, typestr="<u2") for a in (z, bias, z)]
    found = run_epilogue(emulated_module, *there, dtype=name, **options)
    assert found[0].dtype == found[-1].dtype == np.uint16
    assert [bits(a)[::2] for a in found] == [bits(a)[::2] for a in expected]
    size = emulated_module.cuda_grad_workspace_bytes(there[0], dtype=name)
    assert size == emulated_module.cuda_grad_workspace_bytes(Foreign(z))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_by_another_name(emulated_module, name):
    """For libraries whose interface cannot name bfloat16."""
    x = normal((12, 5), name)
    expected = emulated_module.batch_entropy(x)
    for typestr in ("<u2", "<i2", "|V2", "<V2"):
        found = emulated_module.batch_entropy(Foreign(x, typestr=typestr), dtype=name)
        assert same_bits(found, expected)
    dx = emulated_module.batch_entropy_grad(
        Foreign(x, typestr="<u2"), *found[1:], dtype=name
    )
    assert dx.dtype == np.uint16
    expected_dx = emulated_module.batch_entropy_grad(x, *expected[1:])
    assert dx.numpy().tobytes() == expected_dx.tobytes()


def test_what_is_returned_is_a_cuda_array(module):
    x = normal((4, 3, 2), "float64")
    array = module.cuda_array(x, stream=None)
    assert array.shape == x.shape
    assert array.dtype == x.dtype
    assert "(4, 3, 2)" in repr(array)
    interface = array.__cuda_array_interface__
    assert interface["version"] == 3
    assert interface["typestr"] == "<f8"
    assert interface["stream"] == 1  # 0 is not allowed there
    assert interface["data"][0] % 16 == 0
    np.testing.assert_array_equal(array.numpy(), x)
    for shape in ((), (0, 3)):
        assert module.cuda_array(np.zeros(shape)).numpy().shape == shape


def test_strides_of_contiguous_arrays(emulated_module):
    x = normal((12, 5), "float32")
    expected = emulated_module.batch_entropy(x)
    for strides in (None, (20, 4)):
        found = emulated_module.batch_entropy(Foreign(x, strides=strides))
        assert same_bits(found, expected)
    # The step of a dimension of one is never taken.
    column = Foreign(x[:, None, :], strides=(20, 999, 4))
    assert emulated_module.batch_entropy(column)[1].shape == (1, 5)


X = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
    "x, options, error, words",
    [
        (Foreign(X.astype(np.int32)), {}, TypeError, "'<i4'"),
        (Foreign(X.astype(">f4")), {}, TypeError, "byte order.*'>f4'"),
        (Foreign(X), {"dtype": "bfloat16"}, TypeError, "'<f4', dtype 'bfloat16'"),
        (Foreign(X, typestr="|O"), {}, TypeError, r"typestr '\|O'"),
        (Foreign(X, typestr="|V0"), {}, TypeError, r"typestr '\|V0'"),
        (Foreign(X, typestr=">u2"), {"dtype": "bfloat16"}, TypeError, "'>u2'"),
        (Foreign(X.T), {}, ValueError, "contiguous.*shape .2, 3."),
        (Foreign(X[:, ::-1]), {}, ValueError, "contiguous"),
        (Foreign(X, mask=Foreign(X)), {}, ValueError, "mask"),
        (Foreign(X, data=(X.ctypes.data + 1, False)), {}, ValueError, "aligned"),
        (Foreign(np.array(1.0)), {}, ValueError, "a scalar"),
        (Foreign(X[:1]), {}, ValueError, "1 samples"),
        (Foreign(X[:, :0]), {}, ValueError, "0 units"),
        (Foreign(X), {"ddof": 2}, ValueError, "ddof"),
        (Foreign(X), {"scale": 0.0}, ValueError, "scale"),
        (Foreign(X), {"blocks": -1}, ValueError, "blocks"),
        (Foreign(X), {"workspace": X}, TypeError, "workspace must be a CUDA array"),
        (Foreign(X), {"stream": -1}, TypeError, "stream.*-1"),
        (Foreign(X), {"stream": "fast"}, TypeError, "stream.*'fast'"),
        (Foreign(X), {"out": (Foreign(X),)}, ValueError, "1 arrays"),
        (Foreign(X), {"out": (Foreign(X),) * 3}, ValueError, r"out\[0\].*\(3, 2\)"),
        (Foreign(X), {"out": (X[0, 0],) * 3}, TypeError, r"out\[0\] must be a CUDA"),
        (X, {"stream": 1}, ValueError, "for CUDA arrays"),
        (X, {"dtype": "float32"}, ValueError, "for CUDA arrays"),
        ([[1.0], [2.0]], {}, TypeError, "list"),
    ],
)
def test_bad_arguments(emulated_module, x, options, error, words):
    with pytest.raises(error, match=words):
        emulated_module.batch_entropy(x, **options)


def test_bad_arguments_of_the_gradient(emulated_module):
    gradient = emulated_module.batch_entropy_grad
    x, good = Foreign(X), Foreign(X[0])
    for bad, error, words in (
        (
            Foreign(np.zeros(3, np.float32)),
            ValueError,
            r"shape \(2,\).*Received: shape \(3,\)",
        ),
        (Foreign(X[0].astype(np.float64)), ValueError, "Received.*dtype <f8"),
        (X[0], TypeError, "must be a CUDA array: all arrays must lie"),
    ):
        with pytest.raises(error, match=f"mean.*{words}"):
            gradient(x, bad, good)
        with pytest.raises(error, match=f"variance.*{words}"):
            gradient(x, good, bad)
    with pytest.raises(TypeError, match="mean must be a NumPy array: .* memory of x"):
        gradient(X, good, X[0])
    with pytest.raises(TypeError, match="entropy_grad must be a number or a NumPy"):
        gradient(X, X[0], X[0], good)
    with pytest.raises(ValueError, match="together"):
        gradient(x, good, good, mean_grad=good)
    with pytest.raises(TypeError, match="real number"):
        gradient(x, good, good, "1")
    with pytest.raises(ValueError, match="entropy_grad must have"):
        gradient(x, good, good, good)
    constant = X.copy()
    constant.flags.writeable = False
    with pytest.raises(ValueError, match="dx is read-only"):
        gradient(x, good, good, dx=Foreign(constant))
    with pytest.raises(ValueError, match=r"dx must have.*Received.*<f8"):
        gradient(x, good, good, dx=Foreign(X.astype(np.float64)))


def test_bad_arguments_of_an_epilogue(emulated_module):
    epilogue, gradient = emulated_module.epilogue, emulated_module.epilogue_grad
    z, unit, number = Foreign(X + 1), Foreign(X[0] + 1), Foreign(np.float64([1, 1]))
    constant = np.ones_like(X)
    constant.flags.writeable = False
    for arguments, error, words in (
        ((X, unit), TypeError, "bias must be a NumPy array: .* of z"),
        ((z, X[0]), TypeError, "bias must be a CUDA array: .* of z"),
        ((z, number), ValueError, "bias must have.*<f4.*Received.*<f8"),
        ((z, z), ValueError, r"bias must have shape \(2,\).*shape \(3, 2\)"),
        ((z, None, {"y": Foreign(constant)}), ValueError, "y is read-only"),
        ((z, None, {"y": unit}), ValueError, r"y must have shape \(3, 2\)"),
        ((z, None, {"activation": "gelu"}), ValueError, "'relu'.*Received: 'gelu'"),
        ((z, None, {"slope": -1.0}), ValueError, "slope"),
        ((z, None, {"blocks": -1}), ValueError, "blocks"),
        ((z, unit, {"y": X}), TypeError, "y must be a CUDA array"),
    ):
        arrays, options = arguments[:2], dict(*arguments[2:])
        with pytest.raises(error, match=words):
            epilogue(*arrays, **options)
    for options, words in (
        ({"dbias": number}, "dbias must have.*<f8"),
        ({"dbias": Foreign(constant[0])}, "dbias is read-only"),
        ({"dz": unit}, "dz must have"),
        ({"workspace": Foreign(constant)}, "workspace is read-only"),
    ):
        with pytest.raises(ValueError, match=words):
            gradient(z, z, unit, unit, **options)
    with pytest.raises(ValueError, match="dy must have"):
        gradient(unit, z, unit, unit)
    for function in ("cuda_workspace_bytes", "cuda_grad_workspace_bytes"):
        with pytest.raises(TypeError, match="must be a CUDA array.*ndarray"):
            getattr(emulated_module, function)(X)


def test_outputs_that_share_memory(emulated_module):
    memory, unit = np.zeros((4, 2), np.float32), Foreign(np.ones(2, np.float32))
    x, other = Foreign(memory[:3]), Foreign(memory[1:])
    apart = Foreign(np.zeros((3, 2), np.float32))
    for function, arguments, words in (
        ("batch_entropy_grad", {"x": x, "dx": other}, "dx shares memory with x"),
        (
            "batch_entropy_grad",
            {"x": apart, "mean": Foreign(memory[1]), "dx": x},
            "dx shares memory with mean",
        ),
        ("epilogue", {"z": x, "y": other}, "y shares memory with z"),
        ("epilogue", {"z": x, "bias": Foreign(memory[0]), "y": x}, "y.*with bias"),
        ("epilogue", {"z": x, "workspace": x}, "workspace shares memory with z"),
        ("epilogue_grad", {"dy": x, "y": apart, "dz": other}, "dz.*with dy"),
        (
            "epilogue_grad",
            {"dy": x, "y": apart, "dz": x, "dbias": Foreign(memory[0])},
            "(dz|dbias) shares memory",
        ),
    ):
        if function != "epilogue":
            arguments = {"mean": unit, "variance": unit, **arguments}
        with pytest.raises(ValueError, match=words):
            getattr(emulated_module, function)(**arguments)


@pytest.mark.parametrize("values", [["a", "bc"], [None, 1]], ids=["text", "objects"])
def test_arrays_that_hold_no_numbers(emulated_module, values):
    array = np.array(values, "<U5" if isinstance(values[0], str) else object)
    with pytest.raises(TypeError, match="must hold numbers. Received: dtype"):
        emulated_module.cuda_array(array)


def test_an_error_does_not_outlive_its_call(emulated_module):
    """CUDA keeps the error of a call until it is asked for: not by the next launch."""
    x = normal((40, 24), "float32")

    huge = Foreign(x, shape=(2**30, 2**28))
    means = Foreign(x[0], shape=(2**28,))
    with pytest.raises(RuntimeError, match="cudaMallocFromPoolAsync failed"):
        emulated_module.batch_entropy_grad(huge, means, means)
    found = emulated_module.batch_entropy(Foreign(x))
    assert same_bits(found, emulated_module.batch_entropy(x))


def test_an_array_that_says_why_it_is_none(emulated_module):
    """PyTorch's error for tensors that require a gradient is its own."""

    class Refusing:
        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("detach it first")

    with pytest.raises(RuntimeError, match="detach it first"):
        emulated_module.batch_entropy(Refusing())


def test_the_installed_module_without_a_gpu():
    module = import_numpy_module()
    system = module.cuda_system()
    if not system["problem"]:
        pytest.skip(f"there is a GPU: {system['device']}")
    if module.build_info()["cuda"] == "no":
        assert system["problem"] == "built without CUDA"
    with pytest.raises(RuntimeError, match="without CUDA|driver|GPU"):
        module.batch_entropy(Foreign(X))


def torch_with_gpu():
    torch = pytest.importorskip("torch", reason="PyTorch makes streams and graphs")
    if not torch.cuda.is_available():
        missing_gpu(f"PyTorch {torch.__version__} sees no GPU")
    return torch


def empty_results(torch, units):
    return [torch.empty(shape, device="cuda") for shape in ((), (units,), (units,))]


@on_gpu
def test_kernels_wait_for_a_slow_producer_on_their_stream():
    module, torch = module_with_gpu(), torch_with_gpu()
    values = torch.randn((4096, 1024), device="cuda")
    expected = module.batch_entropy(values.cpu().numpy())
    gradient = module.batch_entropy_grad(values.cpu().numpy(), *expected[1:])
    in_epilogue = module.epilogue(values.cpu().numpy(), activation="tanh")
    stream = torch.cuda.Stream()
    for _ in range(5):
        x = torch.zeros_like(values)
        dx = torch.zeros_like(values)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            x.copy_(values)
            found = module.batch_entropy(x, stream=stream.cuda_stream)
            module.batch_entropy_grad(x, *found[1:], dx=dx, stream=stream.cuda_stream)
            activated = module.epilogue(x, activation="tanh", stream=stream.cuda_stream)
            x.zero_()  # right behind them
        assert same_bits(found, expected)
        assert same_bits(activated, in_epilogue)
        stream.synchronize()
        assert same_bits([dx.cpu()], [gradient])


@on_gpu
def test_kernels_wait_for_the_stream_that_an_array_names():
    module, torch = module_with_gpu(), torch_with_gpu()
    values = torch.randn((4096, 1024), device="cuda")
    expected = module.batch_entropy(values.cpu().numpy())
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()

    class Named:
        def __init__(self, tensor):
            self.__cuda_array_interface__ = {
                **tensor.__cuda_array_interface__,
                "version": 3,
                "stream": producer.cuda_stream,
            }

    x = torch.zeros_like(values)
    torch.cuda.synchronize()
    with torch.cuda.stream(producer):
        torch.cuda._sleep(50_000_000)
        x.copy_(values)
    found = module.batch_entropy(Named(x), stream=consumer.cuda_stream)
    assert same_bits(found, expected)
    # The other way round, too: the producer's next step waits for the kernels.
    expected = run_epilogue(module, values.cpu().numpy(), None, values.cpu().numpy())
    with torch.cuda.stream(consumer):
        torch.cuda._sleep(50_000_000)
    found = run_epilogue(module, Named(x), None, Named(x), stream=consumer.cuda_stream)
    with torch.cuda.stream(producer):
        x.zero_()
    assert same_bits(found, expected)


@on_gpu
def test_capture_in_a_cuda_graph():
    module, torch = module_with_gpu(), torch_with_gpu()
    units = 777
    x = torch.zeros((1000, units), device="cuda")
    dx, of_a_number, y, dz = (torch.empty_like(x) for _ in range(4))
    out, of_y = empty_results(torch, units), empty_results(torch, units)
    one = torch.ones((), device="cuda")
    bias = torch.ones(units, device="cuda")
    dbias = torch.empty_like(bias)
    workspaces = [
        torch.empty(size, dtype=torch.uint8, device="cuda")
        for size in (
            module.cuda_workspace_bytes(x),
            module.cuda_workspace_bytes(x, epilogue=True),
            module.cuda_grad_workspace_bytes(x),
        )
    ]

    def run():
        stream = torch.cuda.current_stream().cuda_stream
        module.batch_entropy(x, out=out, workspace=workspaces[0], stream=stream)
        module.batch_entropy_grad(x, *out[1:], one, dx=dx, stream=stream)
        # A number is written anew by each replay, to memory of the graph.
        module.batch_entropy_grad(x, *out[1:], 2.0, dx=of_a_number, stream=stream)
        options = {"activation": "relu", "stream": stream}
        module.epilogue(x, bias, y=y, out=of_y, workspace=workspaces[1], **options)
        module.epilogue_grad(
            *(x, y, *of_y[1:], one),
            dz=dz,
            dbias=dbias,
            workspace=workspaces[2],
            **options,
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed in range(3):
        values = normal((1000, units), "float32", seed)
        x.copy_(torch.from_numpy(values))
        graph.replay()
        torch.cuda.synchronize()
        expected = module.batch_entropy(values)
        assert same_bits([a.cpu() for a in out], expected)
        for found, number in ((dx, 1.0), (of_a_number, 2.0)):
            gradient = module.batch_entropy_grad(values, *expected[1:], number)
            assert same_bits([found.cpu()], [gradient])
        ones = np.ones(units, np.float32)
        expected = run_epilogue(module, values, ones, values, 1.0, activation="relu")
        assert same_bits([a.cpu() for a in (y, *of_y, dz, dbias)], expected)


@on_gpu
def test_bfloat16_of_torch():
    module, torch = module_with_gpu(), torch_with_gpu()
    x = torch.randn((300, 70), device="cuda").to(torch.bfloat16)
    values = x.cpu().view(torch.uint16).numpy().view(bfloat16)
    found = module.batch_entropy(x.view(torch.uint16), dtype="bfloat16")
    assert same_bits(found, module.batch_entropy(values))


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(33_000, 66_000), (2, 2**30 + 33)], ids=str)
def test_more_than_2_to_the_31_elements(shape):
    """64-bit offsets, down and across; against the CPU kernels, bit for bit."""
    module, torch = module_with_gpu(), torch_with_gpu()
    assert shape[0] * shape[1] > 2**31
    needed = 3 * 2 * shape[0] * shape[1] + 24 * shape[1]
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed} bytes on the GPU. Received: {free}")
    x = torch.randn(shape, dtype=torch.float16, device="cuda")
    expected = module.batch_entropy(x.cpu().numpy(), threads=16)
    found = module.batch_entropy(x)
    assert same_bits(found, expected)
    gradient = module.batch_entropy_grad(
        x.cpu().numpy(), *expected[1:], 1e9, threads=16
    )
    module.batch_entropy_grad(x, *found[1:], 1e9, dx=x)
    torch.cuda.synchronize()
    assert same_bits([x.cpu()], [gradient])
    # An epilogue and its gradient, in place on what is there now. A bias where there
    # are few channels: sums of its gradient take memory of their own.
    there, here = {"y": x}, {"y": gradient}
    if shape[0] > 2:
        there["bias"], here["bias"] = x[0].clone(), gradient[0].copy()
    _, *found = module.epilogue(x, activation="relu", **there)
    _, *expected = module.epilogue(gradient, activation="relu", threads=16, **here)
    assert same_bits([x.cpu(), *found], [gradient, *expected])
    options = {"activation": "relu", "bias_grad": shape[0] > 2}
    _, found_bias = module.epilogue_grad(x, x, *found[1:], 1e9, dz=x, **options)
    _, expected_bias = module.epilogue_grad(
        *(gradient, gradient, *expected[1:], 1e9), dz=gradient, threads=16, **options
    )
    assert same_bits([x.cpu()], [gradient])
    assert found_bias is None or same_bits([found_bias], [expected_bias])


@on_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool):
    module_with_gpu()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if sanitizer is None:
        missing_gpu("no compute-sanitizer in PATH or /usr/local/cuda/bin")
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable]
        + ["-c", SANITIZED],
        capture_output=True,
        text=True,
        check=False,
    )
    unsupported = re.search("^=+ Error: Device not supported.*", done.stdout, re.M)
    if done.returncode != 0 and unsupported:  # some virtual machines' GPUs
        pytest.skip(f"{tool}: {unsupported[0]}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "every kernel ran" in done.stdout


SANITIZED = f"""
import itertools
import lbe_ops_numpy as module
import numpy as np
from ml_dtypes import bfloat16

for name, shape, blocks in itertools.product(
    (np.float16, bfloat16, np.float32, np.float64), {SHAPES}, {BLOCKS[:3]}
):
    values = np.random.default_rng(0).normal(size=shape).astype(name)
    x = module.cuda_array(values)
    entropy, mean, variance = module.batch_entropy(x, blocks=blocks)
    for grads in ({{}}, {{"mean_grad": mean, "variance_grad": variance}}):
        dx = module.batch_entropy_grad(x, mean, variance, blocks=blocks, **grads)
    module.batch_entropy_grad(x, mean, variance, dx=x, blocks=blocks).numpy()
    assert np.isfinite(entropy.numpy())
    z = module.cuda_array(values)
    biases = (None, module.cuda_array(values.reshape(-1, shape[-1])[0]))
    cases = [("tanh", biases[0]), ("relu", biases[1])]
    if len(values) == 130 and blocks == 0:
        cases = itertools.product({sorted(oracle.ACTIVATIONS)}, biases)
    for activation, bias in cases:
        options = {{"activation": activation, "slope": 0.3, "blocks": blocks}}
        y, entropy, mean, variance = module.epilogue(z, bias, **options)
        dz, dbias = module.epilogue_grad(
            z, y, mean, variance, bias_grad=bias is not None, **options
        )
        assert np.isfinite(entropy.numpy()) and dz.numpy().any()
    y, entropy, mean, variance = module.epilogue(z, biases[1], y=z, blocks=blocks)
    dz, dbias = module.epilogue_grad(y, y, mean, variance, dz=y, blocks=blocks)
    assert dz.numpy().any() and dbias is None
print("every kernel ran")
"""


def test_the_sanitized_script_runs(emulated_module, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lbe_ops_numpy", emulated_module)
    exec(compile(SANITIZED, "sanitized", "exec"), {"__name__": "sanitized"})
    assert "every kernel ran" in capsys.readouterr().out
