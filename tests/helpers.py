# SPDX-License-Identifier: Apache-2.0
"""What tests share: the one table of tolerances, requirements, samples, assertions."""

import ast
import contextlib
import dataclasses
import fcntl
import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

if importlib.util.find_spec("tensorflow"):
    import tensorflow as tf

    import lbe_ops
    from lbe_ops import native

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Kept, so that only what changed is compiled again.
EMULATION = ROOT / "build" / f"emulation-{sys.implementation.cache_tag}"


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far results may be from float64 arithmetic on the same rounded x.

    statistics: relative, of entropy, mean and variance (in float32 or float64).
    grad: of dx, relative to its largest element: the rounding of its dtype.
    grad_atol: of dx, absolute: half the smallest number of its dtype.
    """

    statistics: float
    grad: float
    grad_atol: float


TOLERANCES = {
    "float64": Tolerance(1e-13, 1e-12, 0.0),
    "float32": Tolerance(4e-6, 1e-5, 0.0),
    "float16": Tolerance(4e-6, 2**-11 + 1e-5, 2**-25),
    "bfloat16": Tolerance(4e-6, 2**-8 + 1e-5, 0.0),
}
DTYPES = tuple(TOLERANCES)


def _require(variable, reason):
    """Skips where there is a reason; fails where the environment forbids that."""
    if reason and os.environ.get(variable) == "1":
        pytest.fail(f"{variable}=1, but {reason}")
    elif reason:
        pytest.skip(reason)


def require_native():
    """Skips without the native library; fails where LBE_REQUIRE_NATIVE=1."""
    _require("LBE_REQUIRE_NATIVE", native.load().reason)


def require_xla():
    """Skips where XLA cannot compile the native op; LBE_REQUIRE_XLA=1 then fails."""
    _require("LBE_REQUIRE_XLA", native.load().xla_reason)


def run_script(script, *arguments, **env):
    """What a script prints as JSON, last, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def import_numpy_module():
    """lbe_ops_numpy; the tests skip without it, or fail, as by require_native."""
    if os.environ.get("LBE_REQUIRE_NATIVE") == "1":
        return importlib.import_module("lbe_ops_numpy")
    return pytest.importorskip(
        "lbe_ops_numpy", reason="built without the native library"
    )


def stubbed():
    """What the stub of lbe_ops_numpy names, with all signatures that it has of each."""
    stub = ROOT / "lbe_ops_numpy-stubs" / "__init__.pyi"
    found = {}

    def visit(nodes, prefix=""):
        for node in nodes:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name] = []
                visit(node.body, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                found.setdefault(prefix + node.name, []).append(_arguments(node))

    visit(ast.parse(stub.read_text()).body)
    return found


def signatures(module):
    """The same of a module by pybind11, which writes signatures into docstrings."""
    found = {}

    def visit(owner, prefix=""):
        for name, value in vars(owner).items():
            if isinstance(value, property):
                found[prefix + name] = [_arguments(_parsed("f(self)"))]
            elif isinstance(value, type):
                found[name] = []
                visit(value, f"{name}.")
            elif callable(value) and not name.startswith("_"):
                first = value.__doc__.splitlines()[0]
                found[prefix + name] = [_arguments(_parsed(first))]

    visit(module)
    return found


def _parsed(signature):
    return ast.parse(f"def {signature}: ...").body[0]


def _arguments(function):
    """Names, kinds and default values of the arguments."""
    given = function.args
    required = [None] * (len(given.args) - len(given.defaults))
    return [
        (kind, argument.arg, None if default is None else ast.literal_eval(default))
        for kind, arguments, defaults in (
            ("positional", given.args, [*required, *given.defaults]),
            ("keyword", given.kwonlyargs, given.kw_defaults),
        )
        for argument, default in zip(arguments, defaults, strict=True)
    ]


def missing_gpu(reason):
    """Skips where there is no GPU to test; fails where LBE_REQUIRE_GPU=1."""
    if os.environ.get("LBE_REQUIRE_GPU") == "1":
        pytest.fail(f"LBE_REQUIRE_GPU=1, but {reason}", pytrace=False)
    pytest.skip(reason)


def module_with_gpu():
    """lbe_ops_numpy, built with CUDA and with a GPU; or as by missing_gpu."""
    module = import_numpy_module()
    problem = module.cuda_system()["problem"]
    if problem:
        missing_gpu(f"no GPU: {problem}")
    return module


def require_op_on_gpu():
    """Returns where TensorFlow runs the op on a GPU; else as by missing_gpu.

    Skips, whatever is required, where the GPU is there and TensorFlow is one for CPUs:
    lbe_ops_numpy can be tested all the same.
    """
    module_with_gpu()
    name = f"TensorFlow {tf.__version__}"
    if not tf.test.is_built_with_cuda():
        pytest.skip(f"{name} was built without GPU support")
    require_native()
    if not tf.config.list_physical_devices("GPU"):
        missing_gpu(
            f"{name} sees no GPU, and the driver has one: does it lack its libraries "
            "(pip install tensorflow[and-cuda])?"
        )


def run_cmake(*arguments, **env):
    """Exit status and output; skips or fails without CMake, as by require_native."""
    path = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=path) is None:
            reason = f"{tool} is missing: pip install {tool}"
            if os.environ.get("LBE_REQUIRE_NATIVE") == "1":
                pytest.fail(f"LBE_REQUIRE_NATIVE=1, but {reason}")
            pytest.skip(reason)
    done = subprocess.run(
        [shutil.which("cmake", path=path), *arguments],
        env={**os.environ, "PATH": path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def configure(folder, *options, **env):
    """CMake's first step, for lbe_ops_numpy alone, which is then built to out/."""
    return run_cmake(
        *("-S", ROOT, "-B", folder, "-G", "Ninja", "-DLBE_TENSORFLOW=OFF"),
        "-DBUILD_SHARED_LIBS=OFF",  # two libraries of one name in a process are one
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-DLBE_OUTPUT_DIR={folder}/out"),
        *options,
        **env,
    )


def build(folder, target, *options):
    """Builds a target in a folder that is kept: one pytest process after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, output = configure(folder, *options)
        assert status == 0, output
        status, output = run_cmake("--build", folder, "--target", target)
        assert status == 0, output[-5000:]


@dataclasses.dataclass(frozen=True)
class Path:
    """Who computes (native or reference) and how it is run (eager, graph, xla)."""

    native: bool
    mode: str

    def run(self, function, *args):
        """function(*args) with every op on this path."""

        def call(*tensors):
            with lbe_ops.use_native(self.native):
                return function(*tensors)

        args = [tf.convert_to_tensor(a) for a in args]
        if self.mode == "eager":
            return call(*args)
        return tf.function(call, jit_compile=self.mode == "xla")(*args)


PATHS = {
    "native-eager": Path(True, "eager"),
    "native-graph": Path(True, "graph"),
    "reference-eager": Path(False, "eager"),
    "reference-graph": Path(False, "graph"),
    "native-xla": Path(True, "xla"),
    "reference-xla": Path(False, "xla"),
}


def left_to_long(values, which):
    """Parameters of a test; those that `which` says are for `make test-long`."""
    return [
        pytest.param(value, marks=[pytest.mark.long] if which(value) else [])
        for value in values
    ]


# A training of `lbe-ops train` on the fixture `npz`.
TINY = (
    "--depth 2 --width 8 --epochs 3 --batch-size 64 --learning-rate 0.01 "
    "--schedule constant --activation relu --initializer glorot_uniform"
)


def samples(*shape, seed=0, dtype=np.float32):
    """Normal random values of mean 0 and variance 1."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def logs_of_batch(step, x, y):
    """The logs of `train_on_batch` or `test_on_batch` for this batch alone, as floats.

    Before 3.14 Keras adds them to those of earlier batches.
    """
    step.__self__.reset_metrics()
    return {name: float(x) for name, x in step(x, y, return_dict=True).items()}


def save_patterns(folder, train, test):
    """The file of a small data set: noisy images of three patterns."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (3, 6, 6))
    arrays = {}
    for part, n in (("train", train), ("test", test)):
        labels = np.arange(n) % 3
        noise = rng.integers(0, 56, (n, 6, 6))
        arrays[f"x_{part}"] = (patterns[labels] + noise).astype(np.uint8)
        arrays[f"y_{part}"] = labels.astype(np.uint8)
    path = folder / "patterns.npz"
    np.savez(path, **arrays)
    return path


def tensor(values, dtype):
    """values as a tensor, and what it holds after rounding, in float64."""
    rounded = tf.cast(tf.constant(np.asarray(values)), dtype)
    return rounded, tf.cast(rounded, tf.float64).numpy()


def assert_statistics(actual, expected, tolerance, scale=None):
    """Within tolerance.statistics of expected, relative to it or to `scale`."""
    actual = np.asarray(tf.cast(actual, tf.float64))
    scale = np.abs(expected) if scale is None else scale
    np.testing.assert_array_less(
        np.abs(actual - expected), tolerance.statistics * scale + 1e-300
    )


def assert_grad(actual, expected, tolerance):
    actual = np.asarray(tf.cast(actual, tf.float64))
    assert actual.shape == expected.shape
    error = np.max(np.abs(actual - expected), initial=0)
    bound = tolerance.grad * np.max(np.abs(expected), initial=0) + tolerance.grad_atol
    assert error <= bound, f"error {error:.3g}, allowed {bound:.3g}"


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at just now."""
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("", 0))) for _ in range(count)
        ]
        return [each.getsockname()[1] for each in sockets]


def worker_config(index: int, ports: list[int]) -> str:
    """TF_CONFIG of one of the workers that listen at these ports."""
    workers = [f"127.0.0.1:{port}" for port in ports]
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": workers}, "task": task})
