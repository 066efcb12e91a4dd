# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a machine without a GPU, as threads of cuda_emulation.h.

cuda_emulation_test.cc compares every result with the definition, bit for bit, and an
epilogue's with the CPU's. Here it runs with and without sanitizers, and on kernels with
planted faults, each of which it must find.
"""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.long

TESTS = pathlib.Path(__file__).resolve().parent
KERNELS = TESTS.parent / "cuda"

# Of the kernels as they are; with sanitizers fewer of them, and fewer cases.
CLEAN = {
    "none": ["-O2"],
    "address": ["-DLBE_QUICK", "-O0", "-g1", "-fsanitize=address,undefined"],
    "thread": ["-DLBE_QUICK", "-O1", "-g1", "-fsanitize=thread"],
}
# Of those with a planted fault: what is compiled fastest.
FAULTY = {
    "none": ["-DLBE_QUICK", "-O0"],
    "address": ["-DLBE_QUICK", "-O0", "-g1", "-fsanitize=address"],
    "thread": ["-DLBE_QUICK", "-O0", "-g1", "-fsanitize=thread"],
}


def compile_cxx(*arguments: object) -> None:
    """With what CPU and emulated kernels need for the same bits."""
    command = [
        *(os.environ.get("CXX", "c++"), "-std=c++17", "-Wall", "-Wextra", "-Werror"),
        *("-ffp-contract=off", f"-I{TESTS.parent / 'cc'}", *arguments),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


def compile_cpu_kernels(folder: pathlib.Path) -> list[pathlib.Path]:
    """The CPU kernels, compiled for any processor."""
    names = ["cpu_loops", "cpu_launch"]
    for name in names:
        source = TESTS.parent / "cc" / f"{name}.cc"
        options = ("-O1", "-Wno-psabi", "-DLBE_CPU_LOOPS=CpuLoopsBaseline")
        compile_cxx(*options, "-c", source, "-o", folder / f"{name}.o")
    return [folder / f"{name}.o" for name in names]


def build_and_run(
    cuda: pathlib.Path, options: list[str], cpu_kernels: list[pathlib.Path]
) -> subprocess.CompletedProcess:
    """The emulated kernels of a folder against the definition and the CPU's."""
    program = cuda / "cuda_emulation_test"
    compile_cxx(
        *("-Wno-unknown-pragmas", "-Wno-switch", "-fno-strict-aliasing"),
        *("-fno-sanitize-recover=all", *options, f"-I{TESTS}", "-DLBE_CUDA"),
        f'-DLBE_CUDA_SOURCE="{cuda}/launch.cu"',
        f'-DLBE_CUDA_SYSTEM_SOURCE="{cuda}/cuda_system.cc"',
        *(TESTS / "cuda_emulation_test.cc", *cpu_kernels, "-o", program),
    )
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [program], env=env, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Of every program that a selected test is about, as many at a time as there are
    cores: a future of its run."""
    cpu_kernels = compile_cpu_kernels(tmp_path_factory.mktemp("cpu_kernels"))
    selected = {
        name
        for item in request.session.items
        if item.path == request.path
        for name in item.callspec.params.values()
    }

    def outcome(name: str) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp("cuda")
        if name in CLEAN:
            shutil.copytree(KERNELS, folder, dirs_exist_ok=True)
            return build_and_run(folder, CLEAN[name], cpu_kernels)
        old, new, (sanitizer, _) = FAULTS[name]
        found = 0
        for path in KERNELS.iterdir():
            text = path.read_text()
            found += text.count(old)
            (folder / path.name).write_text(text.replace(old, new))
        assert found == 1, "the kernels have changed: plant it anew"
        return build_and_run(folder, FAULTY[sanitizer], cpu_kernels)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(outcome, name)
            for name in [*CLEAN, *FAULTS]
            if name in selected
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("sanitizer", CLEAN)
def test_the_kernels_compute_the_tree_bit_for_bit(sanitizer, outcomes):
    done = outcomes[sanitizer].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout


# What is replaced by what, in the one file where it stands; what looks for it, and
# what it then says.
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
        "if (r < rows && pieces.inside(piece)) {",
        "if (r < rows + 1 && pieces.inside(piece)) {",
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
        "  FinishBlock(forward,",
        "  if (own_rows == 0) return;\n  FinishBlock(forward,",
        ("none", "threads wait at a barrier or a shuffle"),
    ),
    "a race between the blocks of a tile": (
        "if (!IsLast(&tickets[own * cut.tiles + place.tile], present)) return false;",
        "if (place.split + 1 != cut.splits) return false;",
        ("thread", "data race"),
    ),
    "a race between tiles": (
        "!IsLast(&forward.partials.tickets[0], cut.tiles)",
        "blockIdx.x + 1 != cut.tiles * cut.splits",
        ("thread", "data race"),
    ),
    "a race of the order of blocks alone": (
        "!IsLast(&forward.partials.tickets[0], cut.tiles)",
        "blockIdx.x + 1 != cut.tiles * cut.splits",
        ("none", "FAILED"),
    ),
    "tickets that are not set to zero": (
        "SetZeroCuda(stream, forward.partials.tickets, parts.ticket_bytes)",
        "SetZeroCuda(stream, forward.partials.tickets, 0)",
        ("none", "FAILED"),
    ),
    "too few tickets set to zero": (
        "SetZeroCuda(stream, forward.partials.tickets, parts.ticket_bytes)",
        "SetZeroCuda(stream, forward.partials.tickets, parts.ticket_bytes - 4)",
        ("none", "FAILED"),
    ),
    "one ticket for all tiles": (
        "&tickets[own * cut.tiles + place.tile]",
        "&tickets[own * cut.tiles]",
        ("none", "FAILED"),
    ),
    "one ticket for two levels": (
        "    tickets += cut.tiles * nodes;\n",
        "",
        ("none", "FAILED"),
    ),
    "a workspace without room for the last node": (
        "bytes = nodes + 2 * splits * cut.units * scalar_bytes;",
        "bytes = nodes + splits * cut.units * scalar_bytes;",
        ("address", "heap-buffer-overflow"),
    ),
    "an answer of IsLast that a slow thread misses": (
        "  // All threads have written, and nobody reads the answer of the last call.\n"
        "  __syncthreads();\n",
        "",
        ("thread", "data race"),
    ),
    "a node of the wrong level": (
        "    pitch <<= cluster_bits;\n",
        "",
        ("none", "FAILED"),
    ),
    "a missing barrier before groups of threads merge": (
        "      shared[Thread()] = *moments;\n      __syncthreads();\n",
        "      shared[Thread()] = *moments;\n",
        ("thread", "data race"),
    ),
    "a short node in the middle": (
        "first + present < nodes",
        "first + present <= nodes",
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
        "channel = channel + 1 == epilogue.channels ? 0 : channel + 1;",
        "channel = channel + 1;",
        ("address", "heap-buffer-overflow"),
    ),
    "statistics of the neighbour": (
        "for (int j = 0; j < kVector; ++j) to[i + j] = read.elements[j];",
        "for (int j = 0; j < kVector; ++j) to[i + j] = read.elements[j ^ 1];",
        ("none", "FAILED"),
    ),
    "a missing barrier before the leaves of dbias are added up": (
        "  __syncthreads();\n  // The leaves of these",
        "  // The leaves of these",
        ("thread", "data race"),
    ),
    "a missing barrier after the leaves of dbias are added up": (
        "    }\n  }\n  __syncthreads();\n}\n\n// Writes zeros to the rows",
        "    }\n  }\n}\n\n// Writes zeros to the rows",
        ("thread", "data race"),
    ),
    "a part of dbias too many": (
        "(part + 1) * kLeafRows <= cut.groups && row < cut.rows",
        "(part + 1) * kLeafRows <= cut.groups",
        # So far off that the memory may be another buffer's, freed before.
        ("address", "AddressSanitizer: heap-"),
    ),
    "a missing barrier before the parts of dbias are added up": (
        "    shared[Thread()] = sum;\n    __syncthreads();\n",
        "    shared[Thread()] = sum;\n",
        ("thread", "data race"),
    ),
    "a part of dbias too few": (
        "i < count; i += kSumParts) {",
        "i + 1 < count; i += kSumParts) {",
        ("none", "FAILED"),
    ),
    "a column of moments too many": (
        "column < cut.units) {\n    results.mean[column] =",
        "column <= cut.units) {\n    results.mean[column] =",
        ("address", "heap-buffer-overflow"),
    ),
    "the rows of a shard instead of the count": (
        "GradientFactorsOfCount(*a.count, cut.units, a.formula)",
        "GradientFactorsOf<Scalar>(cut.rows, cut.units, a.formula)",
        ("none", "FAILED"),
    ),
    "a row of zeros too many": (
        "row < rows; row += cut.groups",
        "row <= rows; row += cut.groups",
        ("address", "heap-buffer-overflow"),
    ),
    "a replica without rows that is merged": (
        "  if (b.rows == 0) return a;\n",
        "",
        ("none", "FAILED"),
    ),
    "replicas that are merged in another order": (
        "MergeCounted(stack[kLevel], *node)",
        "MergeCounted(*node, stack[kLevel])",
        ("none", "FAILED"),
    ),
    "a missing barrier before the next groups of a layer": (
        "    __syncthreads();\n    const double sum = SumHalvesInBlock<kGroupUnits>(",
        "    const double sum = SumHalvesInBlock<kGroupUnits>(",
        ("thread", "data race"),
    ),
    "a missing barrier before the lanes of a layer are added up": (
        "  __syncthreads();\n  const double sum = SumHalvesInBlock<kSumLanes>(lanes",
        "  const double sum = SumHalvesInBlock<kSumLanes>(lanes",
        ("thread", "data race"),
    ),
    "a sum of dbias too many": (
        "read[j] = i + j * kStep < count",
        "read[j] = i + j * kStep <= count",
        ("address", "heap-buffer-overflow"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, outcomes):
    _, _, (_, message) = FAULTS[fault]
    done = outcomes[fault].result()
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
