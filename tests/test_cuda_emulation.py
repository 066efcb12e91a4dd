# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a machine without a GPU, as threads of cuda_emulation.h.

cuda_emulation_test.cc compares every result with the definition, bit for bit, and an
epilogue's with the CPU's. Here it runs with and without sanitizers, on the kernels and
on kernels with planted faults, each of which it must find.
"""

import concurrent.futures
import os
import pathlib
import subprocess

import pytest

pytestmark = pytest.mark.long

TESTS = pathlib.Path(__file__).resolve().parent
KERNELS = TESTS.parent / "cuda"

# Of each program its options. The first has all cases and no faults in it; the others
# have fewer cases, are compiled fast, and each has the faults that it is to find.
PROGRAMS = {
    "optimized": ["-O2"],
    "plain": ["-DLBE_QUICK", "-O0"],
    "address": ["-DLBE_QUICK", "-O0", "-g1", "-fsanitize=address,undefined"],
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


def plant(folder: pathlib.Path, program: str) -> None:
    """Writes the kernels with all faults of a program, each off until it is chosen."""
    texts = {path.name: path.read_text() for path in KERNELS.iterdir()}
    for number, (old, new, (finder, _)) in enumerate(FAULTS.values()):
        if finder == program:
            found = [name for name, text in texts.items() for _ in text.split(old)[1:]]
            assert len(found) == 1, f"the kernels have changed, plant anew: {old}"
            new = new.replace("PLANTED", f"(::emulation::planted == {number})")
            texts[found[0]] = texts[found[0]].replace(old, new)
    for name, text in texts.items():
        (folder / name).write_text(text)


def run(program: pathlib.Path, fault: int) -> subprocess.CompletedProcess:
    """What a program says of its kernels, with the fault of a number >= 0."""
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "LBE_PLANTED": f"{fault}"}
    return subprocess.run(
        [program], env=env, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Of every program and fault that a selected test is about, as many at a time as
    there are cores: a future of its run."""
    cpu_kernels = compile_cpu_kernels(tmp_path_factory.mktemp("cpu_kernels"))

    def build(name: str) -> pathlib.Path:
        cuda = tmp_path_factory.mktemp("cuda")
        plant(cuda, name)
        program = cuda / "cuda_emulation_test"
        compile_cxx(
            *("-Wno-unknown-pragmas", "-Wno-switch", "-fno-strict-aliasing"),
            *("-fno-sanitize-recover=all", *PROGRAMS[name], f"-I{TESTS}"),
            *("-DLBE_CUDA", f'-DLBE_CUDA_SOURCE="{cuda}/launch.cu"'),
            f'-DLBE_CUDA_SYSTEM_SOURCE="{cuda}/cuda_system.cc"',
            *(TESTS / "cuda_emulation_test.cc", *cpu_kernels, "-o", program),
        )
        return program

    runs = {name: (name, -1) for name in PROGRAMS}
    for number, (fault, (_, _, (finder, _))) in enumerate(FAULTS.items()):
        runs[fault] = finder, number
    selected = {
        item.callspec.params["name"]: runs[item.callspec.params["name"]]
        for item in request.session.items
        if item.path == request.path
    }
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # All are built before the first run, which waits for its program.
        built = {
            name: pool.submit(build, name)
            for name in dict.fromkeys(program for program, _ in selected.values())
        }
        yield {
            name: pool.submit(
                lambda program, fault: run(built[program].result(), fault), *how
            )
            for name, how in selected.items()
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_kernels_compute_the_tree_bit_for_bit(name, outcomes):
    done = outcomes[name].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout


# What is replaced by what, in the one file where it stands, and is as it was unless
# PLANTED; what looks for it, and what it then says.
FAULTS = {
    "a missing barrier before the warps merge": (
        "  __syncthreads();\n  Moments<Scalar> nodes[kWarps]",
        "  if (!PLANTED) __syncthreads();\n  Moments<Scalar> nodes[kWarps]",
        ("thread", "data race"),
    ),
    "a missing barrier, seen by the order of threads alone": (
        "  __syncthreads();\n  Moments<Scalar> nodes[kWarps]",
        "  if (!PLANTED) __syncthreads();\n  Moments<Scalar> nodes[kWarps]",
        ("plain", "FAILED"),
    ),
    "a missing barrier between two steps of a sum": (
        "    __syncthreads();\n    if (place < half) value +=",
        "    if (!PLANTED) __syncthreads();\n    if (place < half) value +=",
        ("thread", "data race"),
    ),
    "a column too many": (
        "return column(piece) < columns;",
        "return column(piece) < columns + PLANTED;",
        ("address", "heap-buffer-overflow"),
    ),
    "a row too many": (
        "if (r < rows && pieces.inside(piece)) {",
        "if (r < rows + PLANTED && pieces.inside(piece)) {",
        ("address", "heap-buffer-overflow"),
    ),
    "shared memory too small": (
        "shared, kWarps * kWarpSlots);",
        "shared, (kWarps - PLANTED) * kWarpSlots);",
        ("address", "AddressSanitizer"),
    ),
    "shared memory that is not written": (
        "if (Thread() % kLanes < cut.lanes) {",
        "if (Thread() % kLanes < cut.lanes && (!PLANTED || Thread() < 224)) {",
        ("plain", "FAILED"),
    ),
    "a return before a barrier": (
        "  FinishBlock(forward,",
        "  if (PLANTED && own_rows == 0) return;\n  FinishBlock(forward,",
        ("plain", "threads wait at a barrier or a shuffle"),
    ),
    "a race between the blocks of a tile": (
        "!IsLast(&tickets[own * cut.tiles + place.tile], present)",
        "PLANTED ? place.split + 1 != cut.splits\n"
        "  : !IsLast(&tickets[own * cut.tiles + place.tile], present)",
        ("thread", "data race"),
    ),
    "a race between tiles": (
        "!IsLast(&forward.partials.tickets[0], cut.tiles)",
        "PLANTED ? blockIdx.x + 1 != cut.tiles * cut.splits\n"
        "  : !IsLast(&forward.partials.tickets[0], cut.tiles)",
        ("thread", "data race"),
    ),
    "a race of the order of blocks alone": (
        "!IsLast(&forward.partials.tickets[0], cut.tiles)",
        "PLANTED ? blockIdx.x + 1 != cut.tiles * cut.splits\n"
        "  : !IsLast(&forward.partials.tickets[0], cut.tiles)",
        ("plain", "FAILED"),
    ),
    "tickets that are not set to zero": (
        "SetZeroCuda(stream, forward.partials.tickets,",
        "SetZeroCuda(stream, forward.partials.tickets, PLANTED ? 0 :",
        ("plain", "FAILED"),
    ),
    "too few tickets set to zero": (
        "parts.ticket_bytes);",
        "parts.ticket_bytes - 4 * PLANTED);",
        ("plain", "FAILED"),
    ),
    "one ticket for all tiles": (
        "&tickets[own * cut.tiles + place.tile]",
        "&tickets[own * cut.tiles + (PLANTED ? 0 : place.tile)]",
        ("plain", "FAILED"),
    ),
    "one ticket for two levels": (
        "tickets += cut.tiles * nodes;",
        "if (!PLANTED) tickets += cut.tiles * nodes;",
        ("plain", "FAILED"),
    ),
    "a workspace without room for the last node": (
        "bytes = nodes + 2 * splits * cut.units * scalar_bytes;",
        "bytes = nodes + (2 - PLANTED) * splits * cut.units * scalar_bytes;",
        ("address", "heap-buffer-overflow"),
    ),
    "an answer of IsLast that a slow thread misses": (
        "nobody reads the answer of the last call.\n  __syncthreads();",
        "nobody reads the answer of the last call.\n  if (!PLANTED) __syncthreads();",
        ("thread", "data race"),
    ),
    "a node of the wrong level": (
        "pitch <<= cluster_bits;",
        "if (!PLANTED) pitch <<= cluster_bits;",
        ("plain", "FAILED"),
    ),
    "a missing barrier before groups of threads merge": (
        "shared[Thread()] = *moments;\n      __syncthreads();",
        "shared[Thread()] = *moments;\n      if (!PLANTED) __syncthreads();",
        ("thread", "data race"),
    ),
    "a short node in the middle": (
        "first + present < nodes",
        "first + present < nodes + PLANTED",
        ("plain", "FAILED"),
    ),
    "groups that are not merged": (
        "for (int lanes = cut.lanes; lanes < kLanes;",
        "for (int lanes = cut.lanes; (1 + PLANTED) * lanes < kLanes;",
        ("plain", "FAILED"),
    ),
    "a merge in another order": (
        "MergeColumns<kCount>(stack[kLevel], kLeafRows << kLevel, node, rows,\n"
        "                           node);",
        "if (PLANTED) MergeColumns<kCount>(node, rows, stack[kLevel],\n"
        "  kLeafRows << kLevel, node);\n"
        "else MergeColumns<kCount>(stack[kLevel], kLeafRows << kLevel, node, rows,\n"
        "  node);",
        ("plain", "FAILED"),
    ),
    "y of a row too many": (
        "if (r >= rows) return;",
        "if (r >= rows + PLANTED) return;",
        ("address", "heap-buffer-overflow"),
    ),
    "the bias of the neighbour": (
        "channel = channel + 1 == epilogue.channels",
        "channel = channel + 1 == epilogue.channels && !PLANTED",
        ("address", "heap-buffer-overflow"),
    ),
    "statistics of the neighbour": (
        "for (int j = 0; j < kVector; ++j) to[i + j] = read.elements[j];",
        "for (int j = 0; j < kVector; ++j) to[i + j] = read.elements[j ^ PLANTED];",
        ("plain", "FAILED"),
    ),
    "a missing barrier before the leaves of dbias are added up": (
        "  __syncthreads();\n  // The leaves of these",
        "  if (!PLANTED) __syncthreads();\n  // The leaves of these",
        ("thread", "data race"),
    ),
    "a missing barrier after the leaves of dbias are added up": (
        "    }\n  }\n  __syncthreads();\n}\n\n// Writes zeros to the rows",
        "    }\n  }\n  if (!PLANTED) __syncthreads();\n}\n\n"
        "// Writes zeros to the rows",
        ("thread", "data race"),
    ),
    "a part of dbias too many": (
        "(part + 1) * kLeafRows <= cut.groups && row < cut.rows",
        "(part + 1) * kLeafRows <= cut.groups && (PLANTED || row < cut.rows)",
        # So far off that the memory may be another buffer's, freed before.
        ("address", "AddressSanitizer: heap-"),
    ),
    "a missing barrier before the parts of dbias are added up": (
        "shared[Thread()] = sum;\n    __syncthreads();",
        "shared[Thread()] = sum;\n    if (!PLANTED) __syncthreads();",
        ("thread", "data race"),
    ),
    "a part of dbias too few": (
        "i < count; i += kSumParts) {",
        "i + PLANTED < count; i += kSumParts) {",
        ("plain", "FAILED"),
    ),
    "a column of moments too many": (
        "column < cut.units) {\n    results.mean[column] =",
        "column < cut.units + PLANTED) {\n    results.mean[column] =",
        ("address", "heap-buffer-overflow"),
    ),
    "the rows of a shard instead of the count": (
        "GradientFactorsOfCount(*a.count, cut.units, a.formula)",
        "PLANTED ? GradientFactorsOf<Scalar>(cut.rows, cut.units, a.formula)\n"
        "  : GradientFactorsOfCount(*a.count, cut.units, a.formula)",
        ("plain", "FAILED"),
    ),
    "a row of zeros too many": (
        "row < rows; row += cut.groups",
        "row < rows + PLANTED; row += cut.groups",
        ("address", "heap-buffer-overflow"),
    ),
    "a replica without rows that is merged": (
        "if (b.rows == 0) return a;",
        "if (b.rows == 0 && !PLANTED) return a;",
        ("plain", "FAILED"),
    ),
    "replicas that are merged in another order": (
        "MergeCounted(stack[kLevel], *node)",
        "PLANTED ? MergeCounted(*node, stack[kLevel])\n"
        "  : MergeCounted(stack[kLevel], *node)",
        ("plain", "FAILED"),
    ),
    "a missing barrier before the next groups of a layer": (
        "    __syncthreads();\n    const double sum = SumHalvesInBlock<kGroupUnits>(",
        "    if (!PLANTED) __syncthreads();\n"
        "    const double sum = SumHalvesInBlock<kGroupUnits>(",
        ("thread", "data race"),
    ),
    "a missing barrier before the lanes of a layer are added up": (
        "  __syncthreads();\n  const double sum = SumHalvesInBlock<kSumLanes>(lanes",
        "  if (!PLANTED) __syncthreads();\n"
        "  const double sum = SumHalvesInBlock<kSumLanes>(lanes",
        ("thread", "data race"),
    ),
    "a sum of dbias too many": (
        "read[j] = i + j * kStep < count",
        "read[j] = i + j * kStep < count + PLANTED",
        ("address", "heap-buffer-overflow"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, outcomes):
    _, _, (_, message) = FAULTS[name]
    done = outcomes[name].result()
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
