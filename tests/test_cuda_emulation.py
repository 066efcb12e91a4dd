# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a machine without a GPU, as threads of cuda_emulation.h.

cuda_emulation_test.cc compares every result with the definition, bit for bit, and an
epilogue's with the CPU's. Here it runs with and without sanitizers, and on kernels with
planted faults, each of which it must find.
"""

import os
import pathlib
import subprocess

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
KERNELS = TESTS.parent / "cuda" / "batch_entropy.cu"

SANITIZERS = {
    "none": ["-O2"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}


def compile_cxx(*arguments: object) -> None:
    """With what CPU and emulated kernels need for the same bits."""
    command = [
        *(os.environ.get("CXX", "c++"), "-std=c++17", "-Wall", "-Wextra", "-Werror"),
        *("-ffp-contract=off", f"-I{TESTS.parent / 'cc'}", *arguments),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


@pytest.fixture(scope="module")
def cpu_kernels(tmp_path_factory) -> list[pathlib.Path]:
    """The CPU kernels, compiled for any processor."""
    folder = tmp_path_factory.mktemp("cpu_kernels")
    names = ["cpu_kernels", "cpu_dispatch"]
    for name in names:
        source = TESTS.parent / "cc" / f"{name}.cc"
        options = ("-O1", "-Wno-psabi", "-DLBE_CPU_LOOPS=CpuLoopsBaseline")
        compile_cxx(*options, "-c", source, "-o", folder / f"{name}.o")
    return [folder / f"{name}.o" for name in names]


def build(
    kernels: pathlib.Path,
    sanitizer: str,
    cpu_kernels: list[pathlib.Path],
    folder: pathlib.Path,
    quick: bool,
) -> pathlib.Path:
    program = folder / f"cuda_emulation_test_{sanitizer}"
    compile_cxx(
        *("-Wno-unknown-pragmas", "-fno-strict-aliasing"),
        *("-fno-sanitize-recover=all", *SANITIZERS[sanitizer]),
        *(f"-I{TESTS}", f'-DLBE_CUDA_SOURCE="{kernels}"'),
        *(["-DLBE_QUICK", "-Wno-switch"] if quick else []),
        *(TESTS / "cuda_emulation_test.cc", *cpu_kernels, "-o", program),
    )
    return program


def run(program: pathlib.Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [program], env=env, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_kernels_compute_the_tree_bit_for_bit(sanitizer, cpu_kernels, tmp_path):
    quick = sanitizer != "none"
    done = run(build(KERNELS, sanitizer, cpu_kernels, tmp_path, quick))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout


# What is replaced by what, what looks for it, and what it then says.
FAULTS = {
    "a missing barrier before the warps merge": (
        "  __syncthreads();\n  Moments<Scalar> nodes[kWarps]",
        "  Moments<Scalar> nodes[kWarps]",
        ("thread", "data race"),
    ),
    "a missing barrier, seen by the order of threads alone": (
        "  __syncthreads();\n  Moments<Scalar> nodes[kWarps]",
        "  Moments<Scalar> nodes[kWarps]",
        ("none", "FAILED"),
    ),
    "a missing barrier between two steps of a sum": (
        "    __syncthreads();\n    if (place < half) value +=",
        "    if (place < half) value +=",
        ("thread", "data race"),
    ),
    "a column too many": (
        "return column(piece) < columns;",
        "return column(piece) <= columns;",
        ("address", "heap-buffer-overflow"),
    ),
    "a row too many": (
        "        if (r < rows) {",
        "        if (r < rows + 1) {",
        ("address", "heap-buffer-overflow"),
    ),
    "shared memory too small": (
        "shared, kWarps * kWarpSlots);",
        "shared, (kWarps - 1) * kWarpSlots);",
        ("address", "AddressSanitizer"),
    ),
    "shared memory that is not written": (
        "if (Thread() % kLanes < cut.lanes) {",
        "if (Thread() % kLanes < cut.lanes && Thread() < 224) {",
        ("none", "FAILED"),
    ),
    "a return before a barrier": (
        "  const Moments<Scalar> moments =\n      MergeGroups<kCount>",
        "  if (own_rows == 0) return;\n"
        "  const Moments<Scalar> moments =\n      MergeGroups<kCount>",
        ("none", "threads wait at a barrier or a shuffle"),
    ),
    "a race between blocks": (
        "atomicAdd(partials.ticket, 1u) == cut.tiles - 1",
        "blockIdx.x + 1 == cut.tiles",
        ("thread", "data race"),
    ),
    "a ticket that is not reset": (
        "*partials.ticket = 0;",
        "partials.ticket += 0;",
        ("none", "FAILED"),
    ),
    "groups that are not merged": (
        "for (int lanes = cut.lanes; lanes < kLanes;",
        "for (int lanes = cut.lanes; 2 * lanes < kLanes;",
        ("none", "FAILED"),
    ),
    "a merge in another order": (
        "MergeColumns<kCount>(stack[kLevel], kLeafRows << kLevel, node, rows,\n"
        "                           node);",
        "MergeColumns<kCount>(node, rows, stack[kLevel], kLeafRows << kLevel,\n"
        "                           node);",
        ("none", "FAILED"),
    ),
    "y of a row too many": (
        "if (r >= rows) return;",
        "if (r > rows) return;",
        ("address", "heap-buffer-overflow"),
    ),
    "the bias of the neighbour": (
        "channel = channel + 1 == arguments.channels ? 0 : channel + 1;",
        "channel = channel + 1;",
        ("address", "heap-buffer-overflow"),
    ),
    "a missing barrier before the leaves of dbias are added up": (
        "  __syncthreads();\n  // The leaves of these",
        "  // The leaves of these",
        ("thread", "data race"),
    ),
    "a missing barrier after the leaves of dbias are added up": (
        "    }\n  }\n  __syncthreads();\n}\n\n// A block has the rows",
        "    }\n  }\n}\n\n// A block has the rows",
        ("thread", "data race"),
    ),
    "a part of dbias too many": (
        "(part + 1) * kLeafRows <= cut.groups && row < cut.rows",
        "(part + 1) * kLeafRows <= cut.groups",
        # So far off that the memory may be another buffer's, freed before.
        ("address", "AddressSanitizer: heap-"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, cpu_kernels, tmp_path):
    old, new, (sanitizer, message) = FAULTS[fault]
    source = KERNELS.read_text()
    assert source.count(old) == 1, "the kernels have changed: plant it anew"
    faulty = tmp_path / "faulty.cu"
    faulty.write_text(source.replace(old, new))
    done = run(build(faulty, sanitizer, cpu_kernels, tmp_path, quick=True))
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
