# SPDX-License-Identifier: Apache-2.0
"""Fixtures: device, path and dtype; what they are made of is in `helpers.py`."""

import importlib.util
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")
# TensorFlow must leave memory of the GPU to PyTorch and to other processes.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

import hypothesis
import numpy as np
import pytest
from helpers import (
    DTYPES,
    EMULATION,
    PATHS,
    TOLERANCES,
    build,
    left_to_long,
    require_native,
    require_op_on_gpu,
    require_xla,
    save_patterns,
)

if importlib.util.find_spec("tensorflow"):
    import tensorflow as tf

    from lbe_ops import native
else:  # what tests lbe_ops_numpy alone runs without it, on GPU machines for one
    served = {"cuda_arrays", "cuda_build", "jax_ffi", "numpy_module"}
    collect_ignore = sorted(
        path.name
        for path in pathlib.Path(__file__).parent.glob("test_*.py")
        if path.stem.removeprefix("test_") not in served
    )

# The same examples in every run of CI; elsewhere new ones each time.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

# The files that take longest, those of `make test-long` first: whole files go to
# processes.
LONGEST = (
    *("cuda_emulation", "experiments_failures", "synchronized", "cuda_build"),
    *("examples", "experiments_distributed", "loss", "jax_ffi", "fuzz"),
    *("bench_training", "bench_distributed", "ops", "epilogue", "variants"),
    *("experiments", "strength", "xla", "model"),
)


@pytest.hookimpl(tryfirst=True)  # before marks are looked at
def pytest_collection_modifyitems(items):
    for item in items:
        if "emulated_module" in item.fixturenames:  # compiled first
            item.add_marker(pytest.mark.long)
    first = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


@pytest.fixture(scope="session")
def emulated_module():
    """lbe_ops_numpy with CUDA kernels that run on the CPU; see cuda_emulation.h."""
    build(EMULATION, "all", "-DLBE_CUDA=EMULATED")
    (library,) = (EMULATION / "out").glob("lbe_ops_numpy_emulated.*.so")
    spec = importlib.util.spec_from_file_location("lbe_ops_numpy_emulated", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    """A small data set: noisy images of three patterns, 150 + 40 samples."""
    return save_patterns(tmp_path_factory.mktemp("data"), train=150, test=40)


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """The TensorFlow device on which the ops of the test run."""
    if request.param == "cpu":
        with tf.device("/CPU:0"):
            yield "/CPU:0"
        return
    require_op_on_gpu()
    with tf.device("/GPU:0"):
        yield "/GPU:0"


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture
def tolerance(dtype):
    return TOLERANCES[dtype]


# XLA takes its time for what plain TensorFlow does in many operations.
@pytest.fixture(params=left_to_long(PATHS, "reference-xla".__eq__))
def path(request):
    chosen = PATHS[request.param]
    if chosen.native:
        require_native()
    if chosen.native and chosen.mode == "xla":
        require_xla()
    return chosen


@pytest.fixture
def native_ops():
    require_native()
    return native.load().ops


@pytest.fixture
def rng():
    return np.random.default_rng(0)
