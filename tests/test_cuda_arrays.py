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
from helpers import TOLERANCES, import_numpy_module, missing_gpu, module_with_gpu
from ml_dtypes import bfloat16

# One warp and less, ragged rows that are not aligned, several tiles, many splits.
SHAPES = [(2, 1), (3, 5), (9, 38), (64, 2, 16), (130, 7, 9), (1000, 3), (259, 333)]
BLOCKS = (1, 7, 1024)
FORMULAS = [
    {},
    {"ddof": 1, "scale": 2 * oracle.SCALE, "offset": 0.0},
    {"ddof": 1, "scale": 3.0, "offset": 0.25},
]


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
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
        (Foreign(X), {"blocks": 0}, ValueError, "blocks"),
        (Foreign(X), {"stream": -1}, TypeError, "stream.*-1"),
        (Foreign(X), {"stream": "fast"}, TypeError, "stream.*'fast'"),
        (Foreign(X), {"out": (Foreign(X),)}, ValueError, "1 arrays"),
        (Foreign(X), {"out": (Foreign(X),) * 3}, ValueError, r"out\[0\].*\(3, 2\)"),
        (Foreign(X), {"out": (X[0, 0],) * 3}, TypeError, r"out\[0\] is not"),
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
        (X[0], TypeError, "is not: all of them"),
    ):
        with pytest.raises(error, match=f"mean.*{words}"):
            gradient(x, bad, good)
        with pytest.raises(error, match=f"variance.*{words}"):
            gradient(x, good, bad)
    with pytest.raises(TypeError, match="mean is a CUDA array"):
        gradient(X, good, X[0])
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
    with pytest.raises(RuntimeError, match="cudaMallocAsync failed"):
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


@pytest.mark.gpu
def test_kernels_wait_for_a_slow_producer_on_their_stream():
    module, torch = module_with_gpu(), torch_with_gpu()
    values = torch.randn((4096, 1024), device="cuda")
    expected = module.batch_entropy(values.cpu().numpy())
    gradient = module.batch_entropy_grad(values.cpu().numpy(), *expected[1:])
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
            x.zero_()  # right behind them
        assert same_bits(found, expected)
        stream.synchronize()
        assert same_bits([dx.cpu()], [gradient])


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_capture_in_a_cuda_graph():
    module, torch = module_with_gpu(), torch_with_gpu()
    units = 777
    x = torch.zeros((1000, units), device="cuda")
    dx = torch.empty_like(x)
    out = empty_results(torch, units)
    one = torch.ones((), device="cuda")
    size = module.cuda_workspace_bytes(x)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")

    def run():
        stream = torch.cuda.current_stream().cuda_stream
        module.batch_entropy(x, out=out, workspace=workspace, stream=stream)
        module.batch_entropy_grad(x, *out[1:], one, dx=dx, stream=stream)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
        with pytest.raises(ValueError, match="CUDA graph cannot hold a number"):
            stream = torch.cuda.current_stream().cuda_stream
            module.batch_entropy_grad(x, *out[1:], 2.0, dx=dx, stream=stream)
    for seed in range(3):
        values = normal((1000, units), "float32", seed)
        x.copy_(torch.from_numpy(values))
        graph.replay()
        torch.cuda.synchronize()
        expected = module.batch_entropy(values)
        assert same_bits([a.cpu() for a in out], expected)
        gradient = module.batch_entropy_grad(values, *expected[1:])
        assert same_bits([dx.cpu()], [gradient])


@pytest.mark.gpu
def test_bfloat16_of_torch():
    module, torch = module_with_gpu(), torch_with_gpu()
    x = torch.randn((300, 70), device="cuda").to(torch.bfloat16)
    values = x.cpu().view(torch.uint16).numpy().view(bfloat16)
    found = module.batch_entropy(x.view(torch.uint16), dtype="bfloat16")
    assert same_bits(found, module.batch_entropy(values))


@pytest.mark.gpu
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


@pytest.mark.gpu
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
    (np.float16, bfloat16, np.float32, np.float64), {SHAPES}, {BLOCKS}
):
    values = np.random.default_rng(0).normal(size=shape).astype(name)
    x = module.cuda_array(values)
    entropy, mean, variance = module.batch_entropy(x, blocks=blocks)
    for grads in ({{}}, {{"mean_grad": mean, "variance_grad": variance}}):
        dx = module.batch_entropy_grad(x, mean, variance, blocks=blocks, **grads)
    module.batch_entropy_grad(x, mean, variance, dx=x, blocks=blocks).numpy()
    assert np.isfinite(entropy.numpy())
print("every kernel ran")
"""


def test_the_sanitized_script_runs(emulated_module, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lbe_ops_numpy", emulated_module)
    exec(compile(SANITIZED, "sanitized", "exec"), {"__name__": "sanitized"})
    assert "every kernel ran" in capsys.readouterr().out
