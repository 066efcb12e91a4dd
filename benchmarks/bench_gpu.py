# SPDX-License-Identifier: Apache-2.0
"""Times the CUDA kernels on a GPU against the ways to compute batch entropy there.

Variants: the kernels through lbe_ops_numpy, launched one by one ("fused eager") and
replayed as a CUDA graph ("fused"); PyTorch's formula, eager and compiled; JAX's under
jit; TensorFlow's op, outside of XLA and within, and its plain graph and XLA, where
these packages are installed. Passes: forward (the entropy), gradient (dx, for the
statistics that are there), and both.

Every variant is first compared with the float64 oracle of the tests. Then all take
turns, round by round, together with copies of as many bytes, and a copy and a read of
1 GiB. Before each turn the L2 cache is filled with something else, and a turn takes
every x once. So forward and gradient alone find none of x there; in forward+gradient,
the second may find what the first has read. Statistics and workspace are the same for
every x.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# Frameworks that share a GPU must not each take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import formulas
import numpy as np
import report
from machine import describe
from shapes import parse_shape

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
import oracle

try:
    import torch
except ImportError:
    sys.exit("error: PyTorch holds the buffers and the clock: pip install torch")

SHAPES = ("128x32", "512x128", "512x1024", "1024x4096", "4096x4096", "16384x16384")
SHAPES += ("128x200704",)
# Half precision is timed where bytes decide.
HALF_SHAPES = ("4096x4096", "16384x16384", "128x200704")
PASSES = ("forward", "gradient", "forward+gradient")
# Of the largest absolute value of the result; a check of sanity, not of precision.
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
# Columns of x repeat after so many, so that the oracle has less to do.
PERIOD = 1024
TURN_BYTES = 64 * 2**20
MOST_BUFFERS = 64
LARGE_COPY_BYTES = 2**30

Results = tuple[Any, Any]  # entropy and dx (a tensor of torch), or None


class UnavailableError(Exception):
    """A variant that cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run is made on: a GPU, or the CPU with emulated kernels for tests."""

    device: str
    kernels: Any  # lbe_ops_numpy

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds_of(self, call: Callable[[], None], by_host: bool) -> float:
        """Of one call, by events on the stream or by the clock of the host."""
        if by_host or not self.on_gpu:
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3


@dataclasses.dataclass(frozen=True)
class Problem:
    """Some tensors x [N, U] of one shape, dtype and content, and what is wanted."""

    setting: Setting
    kind: str  # one of PASSES
    base: np.ndarray  # the columns that repeat
    x: Sequence[torch.Tensor]

    @property
    def dtype(self) -> str:
        return str(self.x[0].dtype).removeprefix("torch.")

    @property
    def entropy_grad(self) -> float:
        """What arrives as the entropy's gradient, so that dx is no rounding error.

        With 1, float16 has no numbers for a dx of 1 / (N U). A power of two, exact in
        every dtype, and no larger than the formula in float16 can take.
        """
        rows, units = self.x[0].shape
        return 2.0 ** min(15, int(math.log2(rows * units)))

    def oracle(self, ddof: int) -> tuple[float, torch.Tensor]:
        """The entropy, and the gradient for the columns that repeat."""
        repeats = self.x[0].shape[1] // self.base.shape[1]
        entropy, dx = _oracle_of(self.base.tobytes(), self.base.shape, ddof)
        dx = dx * (self.entropy_grad / repeats)
        return entropy, torch.from_numpy(dx).to(self.setting.device)


@functools.lru_cache(maxsize=4)
def _oracle_of(
    content: bytes, shape: tuple[int, int], ddof: int
) -> tuple[float, np.ndarray]:
    base = np.frombuffer(content, np.float64).reshape(shape)
    return oracle.batch_entropy(base, ddof), oracle.batch_entropy_grad(base, ddof)


@dataclasses.dataclass(frozen=True)
class Calls:
    """A variant made ready for a problem.

    Attributes:
        run: computes for every x of the problem, once.
        results: (entropy, dx) of the first x, each None where it is not computed.
        by_host: whether it runs on a stream of its own, so that the host must wait.
    """

    run: Callable[[], None]
    results: Callable[[], Results]
    by_host: bool = False


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    ddof: int
    prepare: Callable[[Problem], Calls]


class Named:
    """A tensor by its interface alone, which PyTorch makes anew at every access."""

    def __init__(self, tensor: torch.Tensor) -> None:
        kinds = {torch.bfloat16: "<V2", torch.float16: "<f2", torch.float32: "<f4"}
        kinds |= {torch.uint8: "|u1"}
        self.tensor = tensor
        self.__cuda_array_interface__ = {
            "version": 2,
            "shape": tuple(tensor.shape),
            "typestr": kinds[tensor.dtype],
            "data": (tensor.data_ptr(), False),
            "strides": None,
        }


def fused(problem: Problem, as_graph: bool) -> Calls:
    """The kernels, on memory that is there already."""
    kernels, device = problem.setting.kernels, problem.setting.device
    units = problem.x[0].shape[1]
    entropy_grad = Named(torch.full((), problem.entropy_grad, device=device))
    size = kernels.cuda_workspace_bytes(Named(problem.x[0]))
    workspace = Named(torch.empty(size, dtype=torch.uint8, device=device))
    inputs = [Named(x) for x in problem.x]
    outputs = [Named(torch.empty_like(x)) for x in problem.x]
    out = [
        Named(torch.full(shape, math.nan, device=device))
        for shape in ((), (units,), (units,))
    ]

    def stream() -> int | None:
        return torch.cuda.current_stream().cuda_stream if device == "cuda" else None

    def forward(x: Named) -> None:
        kernels.batch_entropy(x, out=out, workspace=workspace, stream=stream())

    def gradient(x: Named, dx: Named) -> None:
        kernels.batch_entropy_grad(x, *out[1:], entropy_grad, dx=dx, stream=stream())

    def run() -> None:
        for x, dx in zip(inputs, outputs, strict=True):
            if problem.kind != "gradient":
                forward(x)
            if problem.kind != "forward":
                gradient(x, dx)

    def results() -> Results:
        run_all()
        problem.setting.synchronize()
        entropy = None if problem.kind == "gradient" else out[0].tensor
        return entropy, None if problem.kind == "forward" else outputs[0].tensor

    forward(inputs[0])  # the statistics that a gradient alone needs
    run_all = graph_of(run) if as_graph and problem.setting.on_gpu else run
    return Calls(run_all, results)


def graph_of(run: Callable[[], None]) -> Callable[[], None]:
    """`run` as a CUDA graph."""
    run()  # loads what is loaded at the first launch
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def torch_formula(problem: Problem, compiled: bool) -> Calls:
    """The formula of the PyTorch original."""
    with_gradient = problem.kind != "forward"
    entropy = formulas.pytorch_original()
    if compiled:
        torch.compiler.reset()
        entropy = torch.compile(entropy, dynamic=False)
    inputs = [x.detach().requires_grad_(with_gradient) for x in problem.x]
    entropy_grad = torch.full_like(inputs[0][0, 0], problem.entropy_grad)

    def one(x: torch.Tensor) -> torch.Tensor:
        x.grad = None
        h = entropy(x)
        if with_gradient:
            h.backward(entropy_grad)
        return h

    def run() -> None:
        for x in inputs:
            one(x)

    def results() -> Results:
        h = one(inputs[0])
        return h.detach(), inputs[0].grad if with_gradient else None

    return Calls(run, results)


def jax_formula(problem: Problem) -> Calls:
    try:
        import jax
    except ImportError as error:
        raise UnavailableError(str(error)) from error
    if problem.setting.on_gpu and jax.default_backend() != "gpu":
        raise UnavailableError(f"JAX runs on {jax.default_backend()}")
    with_gradient = problem.kind != "forward"
    entropy = formulas.jax_variance()

    def scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = entropy(x)
        return h * problem.entropy_grad, h

    gradient = jax.grad(scaled, has_aux=True)  # dx, h
    function = jax.jit(gradient if with_gradient else lambda x: (None, entropy(x)))
    inputs = [jax.dlpack.from_dlpack(x) for x in problem.x]

    def run() -> None:
        jax.block_until_ready([function(x) for x in inputs])

    def results() -> Results:
        dx, h = jax.block_until_ready(function(inputs[0]))
        return float(h), None if dx is None else torch.from_dlpack(dx)

    return Calls(run, results, by_host=True)


def tensorflow_formula(problem: Problem, native: bool, xla: bool) -> Calls:
    try:
        import tensorflow as tf

        import lbe_ops
    except ImportError as error:
        raise UnavailableError(str(error).splitlines()[0]) from error
    if problem.setting.on_gpu and not tf.config.list_physical_devices("GPU"):
        raise UnavailableError(f"TensorFlow {tf.__version__} sees no GPU")
    loaded = lbe_ops.native.load() if native else None
    if native and xla and not loaded.custom_call:
        raise UnavailableError(loaded.xla_reason or "XLA gets plain HLO of this build")
    with_gradient = problem.kind != "forward"

    @tf.function(jit_compile=xla, autograph=False)
    def function(x: tf.Tensor) -> tuple[tf.Tensor, ...]:
        if not with_gradient:
            return (lbe_ops.batch_entropy(x, native=native),)
        with tf.GradientTape() as tape:
            tape.watch(x)
            h = lbe_ops.batch_entropy(x, native=native)
        entropy_grad = tf.constant(problem.entropy_grad, h.dtype)
        return h, tape.gradient(h, x, output_gradients=entropy_grad)

    dlpack = tf.experimental.dlpack
    inputs = [
        dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach())) for x in problem.x
    ]

    def run() -> None:
        last = [function(x) for x in inputs][-1]
        last[0].numpy()  # waits for TensorFlow's stream

    def results() -> Results:
        h, *dx = found = function(inputs[0])
        if problem.setting.on_gpu and not all("GPU" in a.device for a in found):
            raise UnavailableError(f"TensorFlow ran it on {h.device}")
        problem.setting.synchronize()
        return float(h), torch.from_dlpack(dlpack.to_dlpack(dx[0])) if dx else None

    return Calls(run, results, by_host=True)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("fused", 0, lambda p: fused(p, as_graph=True)),
        Variant("fused eager", 0, lambda p: fused(p, as_graph=False)),
        Variant("torch eager", 1, lambda p: torch_formula(p, compiled=False)),
        Variant("torch compile", 1, lambda p: torch_formula(p, compiled=True)),
        Variant("JAX jit", 0, jax_formula),
        Variant(
            "TensorFlow op", 0, lambda p: tensorflow_formula(p, native=True, xla=False)
        ),
        Variant(
            "TensorFlow op XLA",
            0,
            lambda p: tensorflow_formula(p, native=True, xla=True),
        ),
        Variant(
            "pure graph", 0, lambda p: tensorflow_formula(p, native=False, xla=False)
        ),
        Variant("pure XLA", 0, lambda p: tensorflow_formula(p, native=False, xla=True)),
    )
}


def difference(found: Results, expected: tuple[float, torch.Tensor]) -> float:
    """The larger relative difference of entropy and gradient; NaN if there is one."""
    entropy, dx = found
    worst = [0.0]
    if entropy is not None:
        worst.append(abs(float(entropy) - expected[0]) / abs(expected[0]))
    if dx is not None:
        wanted = expected[1]
        for block in dx.split(wanted.shape[1], dim=1):
            error = (block.to(wanted.device).double() - wanted).abs().max().item()
            worst.append(error / wanted.abs().max().item())
    return math.nan if any(map(math.isnan, worst)) else max(worst)


def first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, UnavailableError):
        return line
    return f"{type(error).__name__}: {line}"


def make_problem(
    setting: Setting, shape: tuple[int, int], dtype: str, kind: str
) -> Problem:
    rows, units = shape
    period = PERIOD if units % PERIOD == 0 else units
    generator = torch.Generator().manual_seed(0)
    base = torch.randn((rows, period), generator=generator).to(getattr(torch, dtype))
    first = base.to(setting.device).repeat(1, units // period)
    size = first.numel() * first.element_size()
    buffers = min(MOST_BUFFERS, max(2, math.ceil(TURN_BYTES / size)))
    if not setting.on_gpu:
        buffers = 2
    x = [first, *(first.clone() for _ in range(buffers - 1))]
    # TensorFlow's and JAX's streams wait for none of PyTorch's.
    setting.synchronize()
    return Problem(setting, kind, base.double().numpy(), x)


def copies(setting: Setting, size: int, number: int) -> Calls:
    pairs = [
        [torch.ones(max(size // 4, 1), device=setting.device) for _ in range(2)]
        for _ in range(number)
    ]

    def run() -> None:
        for source, target in pairs:
            target.copy_(source)

    return Calls(run, lambda: (None, None))


def reads(setting: Setting, size: int) -> Calls:
    source = torch.ones(max(size // 4, 1), device=setting.device)
    return Calls(source.sum, lambda: (None, None))


def measure(
    problem: Problem,
    chosen: Sequence[Variant],
    rounds: int,
    flush: Callable[[], object],
) -> dict[str, object]:
    """Checks, then times the variants on one shape; a row of the results."""
    setting, number = problem.setting, len(problem.x)
    size = problem.x[0].numel() * problem.x[0].element_size()
    ready: dict[str, Calls] = {}
    skipped: dict[str, str] = {}
    differences: dict[str, float] = {}
    for variant in chosen:
        try:
            calls = variant.prepare(problem)
            worst = difference(calls.results(), problem.oracle(variant.ddof))
            calls.run()
        except Exception as error:  # a compiler or memory that is missing, for one
            if variant.name == "fused":
                raise
            skipped[variant.name] = first_line(error)
            continue
        differences[variant.name] = worst
        if worst <= TOLERANCES[problem.dtype]:
            ready[variant.name] = calls
        else:
            skipped[variant.name] = f"differs from the oracle by {worst:.1e}"
    if "fused" not in ready:
        sys.exit(f"error: the kernels, {tuple(problem.x[0].shape)}: {skipped}")
    large = LARGE_COPY_BYTES if setting.on_gpu else size
    moved = {"copy": (size, number), "large copy": (large, 1)}
    for name, (bytes_copied, copied) in moved.items():
        ready[name] = copies(setting, bytes_copied, copied)
    ready["large read"] = reads(setting, large)
    moved["large read"] = (large, 1)
    seconds = {name: np.empty(rounds) for name in ready}
    for calls in ready.values():
        calls.run()
    for index in range(rounds):
        for name, calls in ready.items():
            setting.synchronize()
            flush()
            took = setting.seconds_of(calls.run, calls.by_host)
            seconds[name][index] = took / moved.get(name, (0, number))[1]

    def quantiles(values: np.ndarray) -> dict[str, float]:
        low, median, high = np.quantile(values, (0.1, 0.5, 0.9))
        return {"median": median, "q10": low, "q90": high}

    def bandwidth(name: str) -> dict[str, float]:
        """Copies are the measure of reads, too; a plain read stands beside it."""
        rate = 2 * moved[name][0] / float(np.median(seconds[name])) / 1e9
        return {"read": rate, "copy": rate}

    timed = [name for name in ready if name not in moved]
    return {
        "shape": list(problem.x[0].shape),
        "dtype": problem.dtype,
        "pass": problem.kind,
        "bytes": size,
        "buffers": number,
        # x once forward; for the gradient, x and dx.
        "bytes_to_move": size * (1, 2, 3)[PASSES.index(problem.kind)],
        "seconds": {name: quantiles(seconds[name]) for name in timed},
        "times_fused": {
            name: quantiles(seconds[name] / seconds["fused"]) for name in timed
        },
        "difference_from_oracle": differences,
        "skipped": skipped,
        "memory_GB_per_s": bandwidth("large copy"),
        "large_read_GB_per_s": large / float(np.median(seconds["large read"])) / 1e9,
        "same_size_GB_per_s": bandwidth("copy"),
    }


def describe_gpu(setting: Setting) -> dict[str, object]:
    if not setting.on_gpu:
        return {"name": "none: kernels emulated on the CPU"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        **setting.kernels.cuda_system(),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "jax", "tensorflow"):
        with contextlib.suppress(ImportError):
            found[name] = importlib.import_module(name).__version__
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="NxU")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCES, default=TOLERANCES)
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--emulate", action="store_true", help="no GPU: test this script, not the time"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("results/benchmark-gpu")
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if "fused" not in arguments.variants:
        arguments.variants.insert(0, "fused")
    return arguments


def make_setting(emulate: bool) -> Setting:
    if emulate:
        return Setting("cpu", importlib.import_module("lbe_ops_numpy_emulated"))
    kernels = importlib.import_module("lbe_ops_numpy")
    problem = kernels.cuda_system()["problem"]
    if not problem and not torch.cuda.is_available():
        problem = f"PyTorch {torch.__version__} sees none"
    if problem:
        sys.exit(f"no GPU: {problem}")
    return Setting("cuda", kernels)


def main() -> None:
    arguments = parse_arguments()
    setting = make_setting(arguments.emulate)
    gpu = describe_gpu(setting)
    # Reading several times the L2 leaves nothing of the buffers in it.
    filler = torch.ones(int(gpu.get("l2_bytes", 2**20)), device=setting.device)
    chosen = [VARIANTS[name] for name in arguments.variants]
    for dtype in arguments.dtypes:
        results: dict[str, object] = {
            "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
            "rounds": arguments.rounds,
            "machine": describe(),
            "gpu": gpu,
            "build": setting.kernels.build_info(),
            "versions": versions(),
            "rows": [],
        }
        shapes = arguments.shapes or [
            parse_shape(text)
            for text in (SHAPES if dtype == "float32" else HALF_SHAPES)
        ]
        folder = arguments.output / dtype
        for shape in shapes:
            for kind in PASSES:
                problem = make_problem(setting, shape, dtype, kind)
                # The others have no gradient without a forward pass.
                able = [v for v in chosen if kind != "gradient" or "fused" in v.name]
                row = measure(problem, able, arguments.rounds, filler.sum)
                results["rows"].append(row)
                report.print_progress(row)
                report.write(results, folder)
        notes, judged = report.gpu_notes(results), report.gpu_targets(results)
        report.finish(results, folder, notes, judged)


if __name__ == "__main__":
    main()
