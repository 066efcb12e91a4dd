# SPDX-License-Identifier: Apache-2.0
"""The CUDA build: no kernel spills on any architecture, or reads or writes narrowly;
what the libraries need.
"""

import collections
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
from helpers import configure, import_numpy_module, run_cmake

NVCC = (
    os.environ.get("CUDACXX")
    or shutil.which("nvcc")
    or shutil.which("/usr/local/cuda/bin/nvcc")
)


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """A folder to build in, and what CMake said."""
    if NVCC is None:
        pytest.skip("no nvcc in PATH, CUDACXX or /usr/local/cuda/bin")
    folder = tmp_path_factory.mktemp("cuda_report")
    options = ("-DLBE_CUDA_REPORT=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    status, output = configure(folder, "-DLBE_CUDA=ON", *options)
    assert status == 0, output
    return folder, output


@pytest.fixture(scope="module")
def report(configured):
    """What ptxas says of every kernel, by architecture, and the compiler's output."""
    folder, output = configured
    targets = re.search(r"With CUDA \S+: (.*)", output).group(1).split()
    status, output = run_cmake("--build", folder, "--target", "cuda_kernels")
    assert status == 0, output
    return targets, output


# Element, columns of a vector, and a bool or a GradientOf, in the name of a kernel.
KERNEL = re.compile(
    r"(?P<kernel>Statistics|Gradient)I(?P<element>f|d|NS_4HalfE|NS_8BFloat16E)"
    r"Li(?P<vector>\d+)EL(?:b|NS\w*?GradientOfE)(?P<of>\d)E"
)
WHOLE_VECTOR = {"f": 4, "d": 2, "NS_4HalfE": 8, "NS_8BFloat16E": 8}
ACCESS = re.compile(r"\b(ld|st)\.global((?:\.\w+)*?)(?:\.v(\d))?\.[a-z](\d+)\b")


@pytest.fixture(scope="module")
def accesses(configured):
    """Of each kernel for whole vectors how often its code reads ("ld") and writes
    ("st") how many bytes of global memory at once, at once.
    """
    folder, _ = configured
    commands = json.loads((folder / "compile_commands.json").read_text())
    (command,) = [c for c in commands if c["file"].endswith("launch.cu")]
    options = re.sub(
        r"-arch=\S+|\S*-gencode\S*|\S*--generate-code=\S*", "", command["command"]
    )
    kept = [
        option
        for option in shlex.split(options)[1:]
        if option.startswith(("-D", "-I", "-O", "-std", "-ftz", "-fmad", "--expt"))
    ]
    ptx = folder / "launch.ptx"
    compiler = [NVCC, "-ptx", "-arch=compute_90", *kept, command["file"], "-o", ptx]
    done = subprocess.run(compiler, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = {}
    # A function that kernels call stands before them, and a kernel to its last line.
    for name, code in re.findall(r"\.entry (\w+)\((.*?)\n}", ptx.read_text(), re.S):
        kernel = KERNEL.search(name)
        if kernel and int(kernel["vector"]) == WHOLE_VECTOR[kernel["element"]]:
            found[kernel["kernel"], kernel["element"], int(kernel["of"])] = (
                collections.Counter(
                    (way, int(bits) // 8 * int(count or 1))
                    for way, _, count, bits in ACCESS.findall(code)
                )
            )
    return found


@pytest.mark.long
def test_rows_are_read_and_written_16_bytes_at_once(accesses):
    assert len(accesses) == len(WHOLE_VECTOR) * (2 + 4)
    for (kernel, element, of), counts in accesses.items():
        narrow = dict.fromkeys(("ld", "st"), 0)
        for (way, size), count in counts.items():
            assert size <= 16
            narrow[way] += count if size < 16 else 0
        name = f"{kernel} of {element}, {of}: {dict(counts)}"
        assert counts["ld", 16] >= 8, name
        if kernel == "Statistics":
            # The bias of an epilogue, whose channels are anywhere.
            bias = WHOLE_VECTOR[element] if of == 1 else 0
            assert narrow == {"ld": bias, "st": 0}, name
            assert (counts["st", 16] > 0) == (of == 1), name
        else:
            # The scalar gradient of the entropy and the count; sums of dz, a column
            # of a thread.
            assert narrow == {"ld": 2, "st": 2 if of == 3 else 0}, name
            assert counts["st", 16] >= 4, name


@pytest.mark.long
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


@pytest.mark.long
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
    framed = [p for p in properties if p[1] != "0"]
    assert not framed


@pytest.mark.long
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
