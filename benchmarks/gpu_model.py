# SPDX-License-Identifier: Apache-2.0
"""How long the CUDA kernels should take on an H100 or H200: a model, no measurement.

`predict` says so from what a kernel must move and what its warps issue, so that a
measurement can be compared with an expectation that was there before it:

    python3 benchmarks/gpu_model.py H100 --shapes 4096x4096

What the model knows, and assumes:

- A warp works on one unit at a time: it reads some rows of 512 bytes, waits for them,
  computes, and perhaps writes. `Kernel` holds the bytes and the instructions of such a
  unit, counted in the machine code for sm_90.
- The warps of a multiprocessor share its part of the memory's usable bandwidth (what
  copies of a GiB reach: 3.05 TB/s on an H100, 4.4 TB/s on an H200), and its four
  schedulers (one instruction a cycle each; ALU instructions take two). A memory access
  takes 650 cycles when nothing else is under way.
- So the warps are customers in a closed network of two queues, memory and schedulers,
  and of a delay in which nobody waits for anybody. Mean value analysis gives the
  throughput of that: the slower queue where there are many warps, the delay where there
  are few.
- A launch adds a constant for its start and its end, in which the memory is not busy;
  a second launch adds the gap before it and the latency of what it does.
- The caches hold nothing of the arrays before, and clocks stay at 1.755 GHz.

Large arrays should come out within 10 points of the bandwidth; small ones, where
latencies add up, are rougher. How a pass is launched is an input, `Design`, so that
the numbers can follow the kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence

from shapes import parse_shape

WARPS = 8  # of a block
LEAF_ROWS = 8
SCHEDULERS = 4  # of a multiprocessor
LATENCY = 650  # cycles of a memory access
# Cycles that a single warp waits for earlier results, for each instruction.
STALLS = 2.0
# Cycles of a block's beginning and end: indices, merge of its groups, partial results.
BLOCK_CYCLES = 2500
# Bytes that a multiprocessor can take from L2 in a cycle.
MOST_BYTES_A_CYCLE = 64
# What kernels reach of the usable bandwidth and of all issue slots, at best.
BANDWIDTH_SHARE = 0.985
ISSUE_SHARE = 0.9
# What L2 takes of writes; assumed.
L2_BYTES_PER_SECOND = 5.5e12
# Nodes that a thread merges, where the last blocks of a launch do it.
MERGE_NODES = 16
# Microseconds: until the first bytes arrive and after the last; between two launches,
# or a memset and a launch.
START = 2.0
GAP = 1.0
# Microseconds of a launch that only adds up; of the sum that a last block adds up.
SUM = 2.5
LAST_SUM = 0.9

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
CHEAP = ("linear", "relu", "leaky_relu")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU."""

    name: str
    bytes_per_second: float  # usable: what large copies reach
    multiprocessors: int = 132
    clock: float = 1.755e9


H100 = Gpu("H100", 3.05e12)
H200 = Gpu("H200", 4.4e12)


def gpu_named(name: str) -> Gpu | None:
    """The GPU of a name such as "NVIDIA H100 80GB HBM3", or None."""
    return next((gpu for gpu in (H200, H100) if gpu.name in name), None)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A unit of work of one warp, and how many blocks are on a multiprocessor.

    Attributes:
        rows: that the unit has.
        instructions: that the warp issues for it.
        alu: how many of them go to the ALU, which takes two cycles for each.
        read, written: in rows of 512 bytes.
        resident: blocks on a multiprocessor at once, by registers.
    """

    rows: int
    instructions: float
    alu: float
    read: int
    written: int
    resident: int


# Statistics alone: a leaf of eight rows.
_FORWARD = {
    "float32": Kernel(8, 253.5, 0, 8, 0, 3),
    "float16": Kernel(8, 486, 0, 8, 0, 2),
    "bfloat16": Kernel(8, 530, 0, 8, 0, 2),
    "float64": Kernel(8, 175.5, 72.5, 8, 0, 2),
}
# The gradient alone: four rows at a time.
_GRADIENT = {
    "float32": Kernel(4, 130, 0, 4, 4, 4),
    "float16": Kernel(4, 211, 0, 4, 4, 4),
    "bfloat16": Kernel(4, 237, 0, 4, 4, 4),
    "float64": Kernel(4, 118, 0, 4, 4, 4),
}
# That of an epilogue, without and with the sums for a bias.
_EPILOGUE_GRADIENT = {
    "float32": Kernel(4, 462, 284, 8, 4, 3),
    "float16": Kernel(4, 678, 351, 8, 4, 3),
}
_BIAS_GRADIENT = {
    "float32": Kernel(8, 972, 532, 16, 8, 2),
    "float16": Kernel(8, 1356, 702, 16, 8, 2),
}
# Instructions of an epilogue for a leaf, by activation. The exponential ones have few
# that are not for the multiply-add pipes.
_EPILOGUE = {
    "float32": {"elu": 2160, "tanh": 2544, "softplus": 3696},
    "float16": {"elu": 3915, "tanh": 4715, "softplus": 7019},
}
_LIKE = {"selu": "elu", "sigmoid": "tanh"}


@dataclasses.dataclass(frozen=True)
class Design:
    """How the kernels are launched, and what of their code may change.

    Attributes:
        launches: of a forward pass: 2 where a second one merges the splits or adds up
            the units; 1 where the last blocks of the first do, after a small memset of
            their tickets.
        blocks: to aim for in a launch; None for the launchers' own choice: as many as
            there are tiles, if these make a wave, or else nearly two waves.
        cheap_epilogue: instructions and those for the ALU of an epilogue that is
            linear, relu or leaky_relu, by dtype.
        saved: instructions that an exponential takes less than _EPILOGUE says, for
            each element of a thread.
        write_amplification: how many times as often as needed L2 is written to by the
            gradient of an epilogue without a bias, whose stores may be narrow.
        merge: cycles of a merge of splits by a second launch: its start, each round of
            eight, its end; or of each level of a merge by the last blocks.
        sum_parts: threads that add up the gradient of one channel's bias.
        resident: blocks on a multiprocessor where they are others than in the tables:
            by kind ("forward", "epilogue", "gradient", "epilogue gradient", "bias
            gradient") and dtype.
    """

    launches: int
    blocks: int | None
    cheap_epilogue: Mapping[str, tuple[float, float]]
    saved: float = 0
    write_amplification: float = 1
    merge: tuple[float, ...] = (342, 3900, 3500)
    sum_parts: int = 32
    resident: Mapping[tuple[str, str], int] = dataclasses.field(default_factory=dict)


# As the kernels were when their instructions were counted.
TWO_LAUNCHES = Design(2, 1024, {"float32": (992, 661), "float16": (1563, 812)})
# One launch a forward pass, specialised code for cheap activations, shorter series of
# exponentials; the cycles of a level of the merge are estimated.
ONE_LAUNCH = Design(
    1,
    None,
    {"float32": (374, 249), "float16": (809, 420)},
    saved=8,
    merge=(3500,),
    sum_parts=256,
    resident={
        ("epilogue gradient", dtype): 2 for dtype in ("float32", "float16", "bfloat16")
    },
)


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a call computes: which kernel, and of which activation.

    Attributes:
        gradient: of the entropy; or the forward pass.
        activation: of an epilogue; None for the statistics of x alone.
        bias: whether the epilogue has one, and its gradient is wanted.
    """

    gradient: bool = False
    activation: str | None = None
    bias: bool = False

    @property
    def kind(self) -> str:
        """As in Design.resident."""
        if self.activation is None:
            return "gradient" if self.gradient else "forward"
        if not self.gradient:
            return "epilogue"
        return "bias gradient" if self.bias else "epilogue gradient"


def kernel_of(what: Pass, dtype: str, design: Design) -> Kernel | None:
    """The unit of work, or None where nobody has counted its instructions."""
    counted = "float16" if dtype == "bfloat16" else dtype  # differ by a tenth
    if what.activation is None:
        kernel = (_GRADIENT if what.gradient else _FORWARD)[dtype]
    elif what.gradient:
        kernel = (_BIAS_GRADIENT if what.bias else _EPILOGUE_GRADIENT).get(counted)
    elif what.activation in CHEAP and counted in design.cheap_epilogue:
        instructions, alu = design.cheap_epilogue[counted]
        kernel = Kernel(LEAF_ROWS, instructions, alu, 8, 8, 2)
    else:
        name = _LIKE.get(what.activation, what.activation)
        instructions = _EPILOGUE.get(counted, {}).get(name)
        if instructions is None:
            return None
        elements = LEAF_ROWS * 16 // ELEMENT_BYTES[counted]
        instructions -= design.saved * elements
        kernel = Kernel(LEAF_ROWS, instructions, 0, 8, 8, 2)
    resident = design.resident.get((what.kind, dtype))
    if kernel is None or resident is None:
        return kernel
    return dataclasses.replace(kernel, resident=resident)


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a launch divides [rows, units], as the launchers in cuda/ do.

    Attributes:
        tiles, splits: blocks across and down.
        lanes: threads side by side in a block.
        run_rows: rows of a thread, or of as many threads as take turns at them.
        tile_columns: columns of a tile.
    """

    tiles: int
    splits: int
    lanes: int
    run_rows: int
    tile_columns: int

    @property
    def blocks(self) -> int:
        return self.tiles * self.splits


def launch_of(
    what: Pass, dtype: str, shape: Sequence[int], blocks: int | None, wave: int = 0
) -> Launch:
    """The launch of a pass that aims for so many blocks; see Design.blocks.

    `wave` is how many blocks all multiprocessors have at once.
    """
    rows, units = shape
    columns = 16 // ELEMENT_BYTES[dtype]
    vectors = _ceil_div(units, columns)
    plain_gradient = what.gradient and not what.bias
    lanes = _power_of_two(vectors, 32 * WARPS if plain_gradient else 32)
    if plain_gradient:
        while lanes > 32 and _ceil_div(vectors, lanes) * lanes > vectors * 9 // 8:
            lanes //= 2
    groups = 32 * WARPS // lanes
    tiles = _ceil_div(units, lanes * columns)
    wanted = blocks or (tiles if tiles >= wave else 2 * wave - 2 * wave // 8)
    if what.gradient:
        longest, shortest = 64, LEAF_ROWS if what.bias else 4
    else:
        one_block = tiles == 1 and rows <= 2 * LEAF_ROWS * groups
        longest, shortest = 4 * LEAF_ROWS, LEAF_ROWS * (2 if one_block else 1)
    run_rows = longest
    while run_rows > shortest and (
        run_rows * groups // 2 >= rows
        or tiles * _ceil_div(rows, run_rows * groups) < wanted
    ):
        run_rows //= 2
    splits = _ceil_div(rows, run_rows * groups)
    return Launch(tiles, splits, lanes, run_rows, lanes * columns)


def predict(
    what: Pass, dtype: str, shape: Sequence[int], gpu: Gpu, design: Design = ONE_LAUNCH
) -> float | None:
    """Microseconds of a pass over [rows, units], or None for a kernel not counted."""
    kernel = kernel_of(what, dtype, design)
    if kernel is None:
        return None
    wave = gpu.multiprocessors * kernel.resident
    launch = launch_of(what, dtype, shape, design.blocks, wave)
    return _first(what, dtype, shape, gpu, design, kernel, launch) + _rest(
        what, dtype, shape, launch, design
    )


def _first(
    what: Pass,
    dtype: str,
    shape: Sequence[int],
    gpu: Gpu,
    design: Design,
    kernel: Kernel,
    launch: Launch,
) -> float:
    """Microseconds of the launch that reads the array."""
    rows, units = shape
    element = ELEMENT_BYTES[dtype]
    # Rows that are no multiple of 16 bytes are read in pieces, one after the other.
    pitch = units * element
    vector = 16 if pitch % 16 == 0 else element
    if element == 2 and pitch % 16 != 0 and pitch % 4 == 0:
        vector = 4
    pieces = 16 // vector
    resident = kernel.resident if pieces == 1 else min(kernel.resident, 2)
    across = launch.tiles * launch.lanes / 32
    number = max(1.0, _ceil_div(rows, kernel.rows) * across)  # units of work
    used = min(gpu.multiprocessors, launch.blocks)
    warps = min(resident * WARPS, max(1.0, number / used))
    moved = pitch * rows * (kernel.read + kernel.written) / kernel.rows / number
    share = BANDWIDTH_SHARE * gpu.bytes_per_second / gpu.clock / used
    memory = moved / min(MOST_BYTES_A_CYCLE, share)
    if kernel.written and what.kind == "epilogue gradient":
        stored = moved * kernel.written / (kernel.read + kernel.written)
        l2 = stored * design.write_amplification / L2_BYTES_PER_SECOND
        memory = max(memory, l2 * gpu.clock * used)
    instructions = kernel.instructions * (1 if pieces == 1 else 1.5)
    issue = max(instructions, 2 * kernel.alu) / SCHEDULERS / ISSUE_SHARE
    delay = LATENCY * pieces + STALLS * instructions
    delay += BLOCK_CYCLES * kernel.rows / launch.run_rows
    cycles = number / used / throughput(warps, (memory, issue), delay)
    return START + 1e6 * cycles / gpu.clock


def _rest(
    what: Pass, dtype: str, shape: Sequence[int], launch: Launch, design: Design
) -> float:
    """Microseconds after the launch that reads the array: what adds up its results."""
    rows, units = shape
    cycle = 1e6 / H100.clock
    if what.gradient:
        if not what.bias or rows <= 64:
            return 0.0
        rounds = _ceil_div(_ceil_div(rows, 64), design.sum_parts * 8)
        return GAP + SUM + rounds * LATENCY * cycle
    if launch.blocks == 1:
        return 0.0
    if design.launches == 1:  # of merges, all but the last ones are hidden
        cluster = MERGE_NODES * max(1, 32 * WARPS // launch.tile_columns)
        nodes, levels = launch.splits, 0
        while nodes > 1:
            nodes, levels = _ceil_div(nodes, cluster), levels + 1
        return GAP + levels * sum(design.merge) * cycle + LAST_SUM
    if launch.splits == 1:
        return GAP + SUM
    lanes = _power_of_two(_ceil_div(units, 2), 32)
    at_once = 32 * WARPS // lanes * 8  # splits that a block merges in one round
    start, per_round, end = design.merge
    rounds = _power_of_two(_ceil_div(launch.splits, at_once), 2**30)
    merge = (start + rounds * per_round + end) * cycle
    waves = _ceil_div(_ceil_div(units, 2 * lanes), 2 * H100.multiprocessors)
    return GAP + waves * merge + LAST_SUM


def throughput(customers: float, services: Sequence[float], delay: float) -> float:
    """Customers a cycle through queues in a closed network, by mean value analysis.

    Each customer takes the service of every queue in turn and then spends the delay.
    """
    lengths = [0.0] * len(services)
    rate, present = 0.0, 0.0
    while present < customers:
        present = min(present + 1, customers)
        waits = [s * (1 + q) for s, q in zip(services, lengths, strict=True)]
        rate = present / (delay + sum(waits))
        lengths = [rate * wait for wait in waits]
    return rate


def bytes_to_move(what: Pass, dtype: str, shape: Sequence[int]) -> int:
    """Every element read once and written once, the vectors of units left out."""
    arrays = {"forward": 1, "gradient": 2, "epilogue": 2}.get(what.kind, 3)
    return arrays * math.prod(shape) * ELEMENT_BYTES[dtype]


def share_of_bandwidth(
    microseconds: float, what: Pass, dtype: str, shape: Sequence[int], gpu: Gpu
) -> float:
    """Of what large copies reach."""
    moved = bytes_to_move(what, dtype, shape)
    return moved / gpu.bytes_per_second / (1e-6 * microseconds)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(value: int, largest: int) -> int:
    """The least one that is not below value, up to the largest."""
    return min(largest, 1 << max(0, value - 1).bit_length())


PASSES = {
    "forward": Pass(),
    "gradient": Pass(gradient=True),
    "relu forward": Pass(activation="relu"),
    "relu gradient": Pass(gradient=True, activation="relu"),
    "relu+bias gradient": Pass(gradient=True, activation="relu", bias=True),
    "tanh forward": Pass(activation="tanh"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gpu", choices=("H100", "H200"))
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="NxU")
    arguments = parser.parse_args()
    gpu = gpu_named(arguments.gpu)
    print("| shape | dtype | pass | microseconds | of bandwidth |")
    print("|---|---|---|---:|---:|")
    for shape in arguments.shapes or [(4096, 4096)]:
        for dtype in ELEMENT_BYTES:
            for name, what in PASSES.items():
                time = predict(what, dtype, shape, gpu)
                if time is None:
                    continue
                share = share_of_bandwidth(time, what, dtype, shape, gpu)
                label = " x ".join(map(str, shape))
                print(f"| {label} | {dtype} | {name} | {time:.1f} | {share:.0%} |")


if __name__ == "__main__":
    main()
