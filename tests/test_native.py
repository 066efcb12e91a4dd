# SPDX-License-Identifier: Apache-2.0
"""Native or reference: who chooses, and what happens where native is impossible."""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tensorflow as tf
from helpers import import_numpy_module, require_native

import lbe_ops
from lbe_ops import native

X = tf.constant([[0.0, 1.0], [2.0, 1.0]])


def op_types(**options):
    """The types of the ops that batch_entropy builds."""

    @tf.function
    def function(x):
        return lbe_ops.batch_entropy(x, **options)

    graph = function.get_concrete_function(X).graph
    return {op.type for op in graph.get_operations()}


def is_native(**options):
    return "LBE>BatchEntropy" in op_types(**options)


@pytest.fixture
def no_environment(monkeypatch):
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)


def test_argument_wins_over_context_over_environment(no_environment, monkeypatch):
    require_native()
    assert is_native()
    assert not is_native(native=False)
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "0")
    assert not is_native()
    assert is_native(native=True)
    with lbe_ops.use_native(True):
        assert is_native()
        assert not is_native(native=False)
        with lbe_ops.use_native(None):
            assert not is_native()
        assert is_native()
    assert not is_native()
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "1")
    with lbe_ops.use_native(False):
        assert not is_native()
    assert is_native()


def test_bad_modes_name_what_was_received(monkeypatch):
    context = lbe_ops.use_native("yes")
    with pytest.raises(TypeError, match=r"use_native\(\).*'yes'"), context:
        pass
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "yes")
    with pytest.raises(ValueError, match="LBE_OPS_NATIVE.*'yes'"):
        lbe_ops.batch_entropy(X)


@pytest.fixture
def library(monkeypatch, tmp_path, no_environment):
    """A copy of the library in place of the real one, not yet loaded."""
    require_native()
    path = tmp_path / native.LIBRARY_PATH.parent.name / native.LIBRARY_PATH.name
    path.parent.mkdir()
    shutil.copy(native.LIBRARY_PATH, path)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "LIBRARY_PATH", path)
    native._load.cache_clear()
    yield path
    monkeypatch.undo()
    native._load.cache_clear()
    assert native.load().ops is not None


def falls_back(expected_warnings):
    """The results stay right, with that many warnings over several calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert not is_native()
            assert float(lbe_ops.batch_entropy(X)) == pytest.approx(0.5638664)
    assert len(caught) == expected_warnings
    with pytest.raises(lbe_ops.NativeUnavailableError) as error:
        lbe_ops.batch_entropy(X, native=True)
    assert float(lbe_ops.batch_entropy(X, native=False)) == pytest.approx(0.5638664)
    return "".join(str(w.message) for w in caught), str(error.value)


def test_a_missing_library_is_quiet(library):
    library.unlink()
    _, reason = falls_back(expected_warnings=0)
    assert "lbe_ops has no compiled library" in reason


def test_a_source_folder_that_hides_the_installed_package_says_so(tmp_path):
    """`python -m` looks into the present folder first."""
    package = pathlib.Path(lbe_ops.__file__).parent
    if not any(package.glob("tensorflow*/libtf_ops.so")):
        pytest.skip("there is no installed package with libraries to be hidden")
    without = shutil.ignore_patterns("*.so", "build.txt", "__pycache__")
    shutil.copytree(package, tmp_path / "lbe_ops", ignore=without)
    done = subprocess.run(
        [sys.executable, "-W", "always", "-m", "lbe_ops", "info"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    said = f"{tmp_path / 'lbe_ops'} is a source folder without compiled libraries"
    hidden = f"It hides {package}, which is installed"
    for text in (done.stdout, done.stderr):
        assert said in text and hidden in text


def test_what_the_build_said_is_the_reason(library):
    library.unlink()
    said = "without native libraries: there is no C++ compiler."
    (native.FOLDER / "build.txt").write_text(f"{said}\n")
    _, reason = falls_back(expected_warnings=0)
    assert f"lbe_ops has no compiled library: {said}" in reason


def test_other_minors_than_the_running_one_are_named_once(library):
    for minor in ("2.100", "2.99"):
        (native.FOLDER / f"tensorflow{minor}").mkdir()
        shutil.copy(library, native.FOLDER / f"tensorflow{minor}")
    library.unlink()
    warning, reason = falls_back(expected_warnings=1)
    expected = (
        f"lbe_ops was built for TensorFlow 2.99 and 2.100, and this is TensorFlow "
        f"{tf.__version__}."
    )
    assert expected in warning
    assert expected in reason


@pytest.mark.parametrize("kept", [0, 1000, 0.5, 0.97])
def test_a_truncated_library_warns_once(library, kept):
    content = library.read_bytes()
    size = int(kept * len(content)) if isinstance(kept, float) else kept
    library.write_bytes(content[:size])
    warning, reason = falls_back(expected_warnings=1)
    assert str(library) in warning
    assert str(library) in reason


def test_a_file_that_is_no_library_warns_once(library):
    library.write_bytes(b"lbe_ops, but not as we know it" * 1000)
    warning, _ = falls_back(expected_warnings=1)
    assert "damaged or not a library of lbe_ops" in warning


def test_a_missing_symbol_warns_once(library):
    content = library.read_bytes()
    broken = content.replace(b"_ZN10tensorflow", b"_ZN10tensorfl0w")
    assert broken != content
    library.write_bytes(broken)
    warning, reason = falls_back(expected_warnings=1)
    assert "undefined symbol" in warning
    assert "undefined symbol" in reason


def test_a_library_for_another_minor_is_never_loaded(library, monkeypatch):
    marker = b"lbe_ops was built for TensorFlow "
    content = library.read_bytes()
    at = content.index(marker) + len(marker)
    running = ".".join(tf.__version__.split(".")[:2]).encode()
    assert content[at : at + len(running)] == running
    library.write_bytes(content[:at] + b"2.99" + content[at + len(running) :])

    def load(path):
        raise AssertionError(f"loaded {path}")

    monkeypatch.setattr(tf, "load_op_library", load)
    warning, reason = falls_back(expected_warnings=1)
    for text in (warning, reason):
        assert "built for TensorFlow 2.99" in text
        assert f"this is TensorFlow {tf.__version__}" in text
    assert "builds it for what is installed here" in warning


def test_release_candidates_are_known_by_their_minor(library):
    content = library.read_bytes()
    version = tf.__version__.encode() + b";"
    candidate = tf.__version__[:-2].encode() + b"-1;"
    assert len(candidate) == len(version)
    library.write_bytes(content.replace(version, candidate))
    assert native.built_for(library) == ".".join(tf.__version__.split(".")[:2])


def test_a_nightly_build_fits_itself_alone():
    assert native.binary_interface("2.22.0-dev20260101") == "2.22.0.dev20260101"
    assert native.binary_interface("2.22.0.dev20260101") == "2.22.0.dev20260101"
    assert native.binary_interface("2.22.0-rc0") == "2.22"


def test_native_and_reference_agree(rng):
    require_native()
    x = rng.normal(size=(100, 30)).astype(np.float32)
    for function in (lbe_ops.batch_entropy, lbe_ops.unit_statistics):
        for a, b in zip(
            tf.nest.flatten(function(x, native=True)),
            tf.nest.flatten(function(x, native=False)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture
def a_gpu(monkeypatch):
    """As if TensorFlow used one GPU of two, in a library that has not been asked."""
    require_native()
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:1", "GPU")
    monkeypatch.setattr(
        tf.config, "get_visible_devices", lambda kind=None: [gpu] * (kind == "GPU")
    )
    asked = native._gpu_problem
    asked.cache_clear()
    yield
    asked.cache_clear()


def test_a_gpu_that_the_library_cannot_use_is_left_to_tensorflow(a_gpu, no_environment):
    """One warning with the reason, and never copies to the CPU and back."""
    if import_numpy_module().cuda_system(1)["problem"] == "":
        pytest.skip("the library can use this machine's GPU")
    with pytest.warns(RuntimeWarning, match="cannot use a GPU.*GPU:1: ") as caught:
        assert not is_native()
    assert len(caught) == 1
    assert not is_native()
    assert native.compiles()  # the reference, which XLA compiles
    with pytest.raises(lbe_ops.NativeUnavailableError, match="cannot use a GPU"):
        lbe_ops.batch_entropy(X, native=True)


def test_a_gpu_that_the_library_can_use(a_gpu, no_environment, monkeypatch):
    monkeypatch.setattr(native, "_gpu_problem", lambda name: "")
    assert is_native()


def test_every_gpu_that_tensorflow_uses_is_asked_about(
    a_gpu, no_environment, monkeypatch
):
    """By the number that CUDA has for it, and once; the others are not."""
    asked = []

    class Library:
        class LbeGpuProblem:
            restype = None

            def __new__(cls, device):
                asked.append(device)
                return b"it is too old" if device == 3 else b""

    gpus = [
        tf.config.PhysicalDevice(f"/physical_device:GPU:{i}", "GPU") for i in (1, 3)
    ]
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind=None: gpus)
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: Library)
    with pytest.warns(RuntimeWarning, match="GPU:3: it is too old") as caught:
        assert native.select() is None
    assert native.select() is None
    assert len(caught) == 1
    assert asked == [1, 3]


FORKED = """
import os, signal, sys
import numpy as np
import lbe_ops, lbe_ops_numpy

x = np.random.default_rng(0).normal(size=(3000, 200)).astype(np.float32)
expected = lbe_ops_numpy.batch_entropy(x, threads=4)[0]
child = os.fork()
if child == 0:
    signal.alarm(120)  # a child that waits for a thread it does not have
    found = lbe_ops_numpy.batch_entropy(x, threads=4)[0]
    here = float(lbe_ops.batch_entropy(x, native=True))
    os._exit(0 if found == expected == np.float32(here) else 1)
_, status = os.waitpid(child, 0)
assert lbe_ops_numpy.batch_entropy(x, threads=4)[0] == expected
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_after_the_import_computes(native_ops):
    """TensorFlow itself allows a fork until its first op."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_many_threads_at_once_get_the_same_bits(native_ops, rng):
    """Of Python, each of which lets the kernels use several."""
    numpy_module = import_numpy_module()
    x = rng.normal(size=(2000, 300)).astype(np.float32)
    expected = numpy_module.batch_entropy(x)[0]

    def call(number):
        if number % 2:
            return numpy_module.batch_entropy(x, threads=1 + number % 5)[0]
        return lbe_ops.batch_entropy(x, native=True).numpy()

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert set(pool.map(call, range(320))) == {expected}
