# SPDX-License-Identifier: Apache-2.0
"""The CUDA build: no kernel spills on any architecture; what the libraries need."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest
from helpers import configure, import_numpy_module, run_cmake

NVCC = (
    os.environ.get("CUDACXX")
    or shutil.which("nvcc")
    or shutil.which("/usr/local/cuda/bin/nvcc")
)

# Kernels that may keep an array in local memory, and why.
STACK_FRAMES = {"MergeSplits": "a stack of moments that rarely holds more than one"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What ptxas says of every kernel, by architecture, and the compiler's output."""
    if NVCC is None:
        pytest.skip("no nvcc in PATH, CUDACXX or /usr/local/cuda/bin")
    folder = tmp_path_factory.mktemp("cuda_report")
    status, output = configure(folder, "-DLBE_CUDA=ON", "-DLBE_CUDA_REPORT=ON")
    assert status == 0, output
    targets = re.search(r"With CUDA \S+: (.*)", output).group(1).split()
    status, output = run_cmake("--build", folder, "--target", "cuda_kernels")
    assert status == 0, output
    return targets, output


def test_every_kernel_is_compiled_for_every_architecture(report):
    targets, output = report
    compiled = re.findall(r"Compiling entry function '(\w+)' for '(sm_\w+)'", output)
    architectures = {target for target in targets if target.startswith("sm_")}
    assert {architecture for _, architecture in compiled} == architectures
    kernels = {kernel for kernel, _ in compiled}
    assert len(compiled) == len(kernels) * len(architectures)
    assert "sm_90" in architectures
    # Code for GPUs that are newer than the toolkit.
    assert sum(target.startswith("compute_") for target in targets) == 1


def test_no_kernel_spills_registers(report):
    _, output = report
    properties = re.findall(
        r"Function properties for (\w+)\s+.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads",
        output,
    )
    compiled = re.findall(r"Compiling entry function", output)
    assert len(properties) >= len(compiled) > 0
    spilling = [p for p in properties if (p[2], p[3]) != ("0", "0")]
    assert not spilling
    framed = {kernel for kernel, frame, _, _ in properties if frame != "0"}
    unexpected = [
        kernel for kernel in framed if not any(name in kernel for name in STACK_FRAMES)
    ]
    assert not unexpected


def test_the_compiler_does_not_warn(report):
    assert "warning" not in report[1].lower()


def test_a_compiler_that_does_not_work_is_named(tmp_path):
    """One line, and a build without CUDA; an error where CUDA is asked for."""
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho 'nvcc: error: out of order' >&2\nexit 1\n")
    broken.chmod(0o755)
    status, output = configure(tmp_path / "auto", CUDACXX=str(broken))
    assert status == 0, output
    (line,) = [line for line in output.splitlines() if "CUDA" in line]
    assert re.search(r"Without CUDA: .*nvcc --version fails.*out of order", line)
    status, output = configure(tmp_path / "on", "-DLBE_CUDA=ON", CUDACXX=str(broken))
    assert status != 0
    assert "LBE_CUDA=ON, but" in output


@pytest.mark.parametrize(
    "release, trial, words",
    [
        ("12.2", "exit 0", "is CUDA 12.2, and 12.3 or newer is needed"),
        (
            "13.0",
            "echo '#error -- unsupported GNU version!' >&2; exit 1",
            "fails: #error -- unsupported GNU version!",
        ),
    ],
)
def test_a_compiler_that_does_not_suit_is_named(tmp_path, release, trial, words):
    """An old toolkit; one that does not take so new a C++ compiler."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "release {release}, V0" && exit\n'
        f"{trial}\n"
    )
    nvcc.chmod(0o755)
    status, output = configure(tmp_path / "auto", CUDACXX=str(nvcc))
    assert status == 0, output
    (line,) = [line for line in output.splitlines() if "Without CUDA: " in line]
    assert words in line


def test_the_installed_libraries_need_no_cuda():
    """The runtime is inside, and nobody sees it; the driver is looked for later."""
    module = import_numpy_module()
    built = module.build_info()["cuda"]
    if not built.startswith("CUDA"):
        pytest.skip(f"built without CUDA: {built}")
    path = pathlib.Path(module.__file__)
    libraries = [path, *(path.parent / "lbe_ops").glob("*.so")]
    if shutil.which("readelf") is None:
        pytest.skip("no readelf: apt-get install binutils")
    for library in libraries:
        read = ["readelf", "--wide", "--dynamic", "--dyn-syms", library]
        text = subprocess.run(read, capture_output=True, text=True, check=True).stdout
        assert not re.search(r"NEEDED.*(cuda|nvidia)", text)
        assert not re.search(r"\b(__)?cuda[A-Z]\w+", text)


def test_the_libraries_are_built_with_cuda_where_there_is_a_compiler():
    if NVCC is None:
        pytest.skip("no nvcc in PATH, CUDACXX or /usr/local/cuda/bin")
    if os.environ.get("LBE_TEST_INSTALLED") != "1":
        pytest.skip("a source folder on sys.path; `make test` tests the wheel")
    built = import_numpy_module().build_info()["cuda"]
    assert "sm_90" in built or os.environ.get("LBE_CUDA") == "OFF", built
