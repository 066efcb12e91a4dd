# SPDX-License-Identifier: Apache-2.0
"""Times the CUDA kernels on a GPU against the ways to compute batch entropy there.

Variants: the kernels through lbe_ops_numpy, launched one by one ("fused eager") and
replayed as a CUDA graph ("fused"); PyTorch's formula, eager and compiled; JAX's under
jit; TensorFlow's op, outside of XLA and within, and its plain graph and XLA, where
these packages are installed.

Passes: forward (the entropy of x), gradient (dx, for the statistics that are there),
and both; the same of a layer's end, y = activation(z + bias) and the entropy of y, and
its gradient from dy, for an activation that costs nothing and one that does (relu,
tanh), without and with a bias.

Every variant is first compared with the float64 oracle of the tests. Then all take
turns, round by round, together with copies and reads of as many bytes, and of 1 GiB.
Before each turn the L2 cache is filled with something else, and a turn takes every x
once. So forward and gradient alone find none of x there; in forward+gradient, the
second may find what the first has read. Tensors that fit the L2 cache are timed there
as well ("in L2"), as a training step finds them. Statistics and workspace are the same
for every x. For an H100 or H200 the table has what gpu_model.py predicts.

Whatever fails is named in the row that it belongs to, and all the rest is measured; the
exit status is 1 where that was one of the kernels. Results are written after every row.
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
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# Frameworks that share a GPU must not each take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import formulas
import gpu_model
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

# What says most comes first: a run may be cut off. Dense layers, an image, columns
# that are no multiple of 16 bytes, few columns.
SHAPES = ("4096x4096", "128x200704", "65536x64", "512x128", "16384x16384")
SHAPES += ("4096x777", "1024x4096", "128x100352", "512x1024", "256x4095", "128x32")
# Half precision is timed where bytes decide, and where rows are not aligned.
HALF_SHAPES = ("4096x4096", "128x200704", "65536x64", "16384x16384", "4096x777")
SHAPES_OF = {
    "float32": SHAPES,
    "float16": HALF_SHAPES,
    "bfloat16": HALF_SHAPES,
    "float64": ("4096x4096",),
}
# Of the largest absolute value of the result; a check of sanity, not of precision.
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2, "float64": 1e-6}
# Columns of x repeat after so many, so that the oracle has less to do.
PERIOD = 256
TURN_BYTES = 64 * 2**20
MOST_BUFFERS = 16
LARGE_COPY_BYTES = 2**30
# That are compared at a time, in float64.
MOST_ELEMENTS = 2**25
# Of one tensor: three of them fit the L2 cache of an H100.
MOST_BYTES_IN_L2 = 16e6
HOT_REPEATS = 20


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a turn computes for each tensor: a forward pass, a gradient, or both."""

    forward: bool
    gradient: bool
    activation: str | None = None
    bias: bool = False

    @property
    def tensors(self) -> tuple[int, int]:
        """How many of x's size are read and written, and how many only read."""
        read = written = 0
        if self.forward:
            read += 1
            written += self.activation is not None
        if self.gradient:
            read += 1 + (self.activation is not None)
            written += 1
        return read + written, read - written

    def predicted_seconds(
        self, dtype: str, shape: Sequence[int], gpu: gpu_model.Gpu | None
    ) -> float | None:
        """By the model; both passes one after the other, with nothing in L2."""
        parts = [
            gpu
            and gpu_model.predict(
                gpu_model.Pass(gradient, self.activation, self.bias), dtype, shape, gpu
            )
            for gradient, wanted in ((False, self.forward), (True, self.gradient))
            if wanted
        ]
        return None if None in parts else 1e-6 * sum(parts)


PASSES = {
    "forward": Kind(True, False),
    "gradient": Kind(False, True),
    "forward+gradient": Kind(True, True),
}
for _activation in ("relu", "tanh"):
    PASSES |= {
        f"{_activation} forward": Kind(True, False, _activation),
        f"{_activation} gradient": Kind(False, True, _activation),
        f"{_activation}+bias forward": Kind(True, False, _activation, True),
        f"{_activation}+bias gradient": Kind(False, True, _activation, True),
        f"{_activation}+bias forward+gradient": Kind(True, True, _activation, True),
    }
# Value and derivative as functions of z.
ACTIVATIONS = {
    "relu": (lambda z: np.maximum(z, 0), lambda z: 1.0 * (z > 0)),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
}

# What was computed for the first x, by name: entropy, y, dx (dz of an epilogue), dbias.
Results = dict[str, Any]


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
    """Some tensors of one shape, dtype and content; what is computed is chosen later.

    Attributes:
        setting: where they are.
        base: the columns that repeat, in float64: "x", "bias", "dy".
        x, dy: tensors [N, U]; where the L2 cache may hold them, the same one again.
        bias: [U].
        hot: whether it may.
        oracles: what has been computed for `base` already.
    """

    setting: Setting
    base: dict[str, np.ndarray]
    x: Sequence[torch.Tensor]
    dy: Sequence[torch.Tensor]
    bias: torch.Tensor
    hot: bool
    oracles: dict[object, Results] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.x[0].shape)

    @property
    def dtype(self) -> str:
        return str(self.x[0].dtype).removeprefix("torch.")

    @property
    def bytes(self) -> int:
        return self.x[0].numel() * self.x[0].element_size()

    @property
    def entropy_grad(self) -> float:
        """What arrives as the entropy's gradient, so that dx is no rounding error.

        With 1, float16 has no numbers for a dx of 1 / (N U). A power of two, exact in
        every dtype, and no larger than the formula in float16 can take.
        """
        return entropy_grad_of(self.shape)

    def distinct(self, tensors: Sequence[Any]) -> int:
        return 1 if self.hot else len(tensors)

    def oracle(self, kind: Kind, ddof: int) -> Results:
        """The results for the columns that repeat."""
        key = (kind.activation, kind.bias, ddof)
        if key not in self.oracles:
            self.oracles[key] = self._oracle(kind, ddof)
        return self.oracles[key]

    def _oracle(self, kind: Kind, ddof: int) -> Results:
        z = self.base["x"]
        repeats = self.shape[1] // z.shape[1]
        found: dict[str, np.ndarray] = {}
        if kind.activation is None:
            y, derivative, dy = z, 1.0, 0.0
        else:
            value, slope = ACTIVATIONS[kind.activation]
            z = z + self.base["bias"] if kind.bias else z
            y, derivative, dy = value(z), slope(z), self.base["dy"]
            found["y"] = y
        share = oracle.batch_entropy_grad(y, ddof) * (self.entropy_grad / repeats)
        found["dx"] = derivative * (dy + share)
        if kind.bias:
            found["dbias"] = found["dx"].sum(axis=0)
        device = self.setting.device
        tensors = {name: torch.from_numpy(a).to(device) for name, a in found.items()}
        return {"entropy": float(oracle.batch_entropy(y, ddof)), **tensors}


def entropy_grad_of(shape: Sequence[int]) -> float:
    return 2.0 ** min(15, int(math.log2(math.prod(shape))))


@dataclasses.dataclass(frozen=True)
class Calls:
    """A variant made ready for a problem.

    Attributes:
        run: computes for every x of the problem, once.
        results: of the first x.
        by_host: whether it runs on a stream of its own, so that the host must wait.
    """

    run: Callable[[], None]
    results: Callable[[], Results]
    by_host: bool = False


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    ddof: int
    prepare: Callable[[Problem, Kind], Calls]


class Named:
    """A tensor by its interface alone, which PyTorch makes anew at every access."""

    def __init__(self, tensor: torch.Tensor) -> None:
        kinds = {torch.bfloat16: "<V2", torch.float16: "<f2", torch.float32: "<f4"}
        kinds |= {torch.float64: "<f8", torch.uint8: "|u1"}
        self.tensor = tensor
        self.__cuda_array_interface__ = {
            "version": 2,
            "shape": tuple(tensor.shape),
            "typestr": kinds[tensor.dtype],
            "data": (tensor.data_ptr(), False),
            "strides": None,
        }


def fused(problem: Problem, kind: Kind, as_graph: bool, blocks: int = 0) -> Calls:
    """The kernels, on memory that is there already; 0 blocks are their own choice."""
    kernels, device = problem.setting.kernels, problem.setting.device
    units = problem.shape[1]
    result = torch.float64 if problem.dtype == "float64" else torch.float32

    def new(*shape: int, dtype: torch.dtype = result) -> Named:
        return Named(torch.full(shape, math.nan, dtype=dtype, device=device))

    def like(tensors: Sequence[torch.Tensor]) -> list[Named]:
        """One for each tensor that is another."""
        made = [
            Named(torch.full_like(tensor, math.nan))
            for tensor in tensors[: problem.distinct(tensors)]
        ]
        return made * (len(tensors) // len(made))

    def bytes_for(size: int) -> Named:
        return Named(torch.empty(max(size, 16), dtype=torch.uint8, device=device))

    epilogue = kind.activation is not None
    x, dy = [Named(t) for t in problem.x], [Named(t) for t in problem.dy]
    bias = Named(problem.bias) if kind.bias else None
    y = like(problem.x) if epilogue else x
    dx = like(problem.x) if kind.gradient else []
    dbias = new(units, dtype=problem.x[0].dtype) if kind.bias else None
    out = [new(*shape) for shape in ((), (units,), (units,))]
    entropy_grad = new()
    entropy_grad.tensor.fill_(problem.entropy_grad)
    sizes = {"epilogue": True} if epilogue else {}
    workspace = bytes_for(kernels.cuda_workspace_bytes(x[0], blocks=blocks, **sizes))
    grad_workspace = None
    if kind.bias and kind.gradient:
        grad_workspace = bytes_for(kernels.cuda_grad_workspace_bytes(y[0]))

    def options() -> dict[str, Any]:
        on_gpu = device == "cuda"
        stream = torch.cuda.current_stream().cuda_stream if on_gpu else None
        return {"stream": stream, "blocks": blocks}

    def forward(i: int) -> None:
        given = {"out": out, "workspace": workspace, **options()}
        if epilogue:
            kernels.epilogue(x[i], bias, activation=kind.activation, y=y[i], **given)
        else:
            kernels.batch_entropy(x[i], **given)

    def gradient(i: int) -> None:
        given = (*out[1:], entropy_grad)
        if not epilogue:
            kernels.batch_entropy_grad(x[i], *given, dx=dx[i], **options())
            return
        kernels.epilogue_grad(
            *(dy[i], y[i], *given),
            activation=kind.activation,
            bias_grad=kind.bias,
            dz=dx[i],
            dbias=dbias,
            workspace=grad_workspace,
            **options(),
        )

    def run() -> None:
        for i in range(len(x)):
            if kind.forward:
                forward(i)
            if kind.gradient:
                gradient(i)

    def results() -> Results:
        run_all()
        problem.setting.synchronize()
        found = {}
        if kind.forward:
            found["entropy"] = out[0].tensor
            if epilogue:
                found["y"] = y[0].tensor
        if kind.gradient:
            found["dx"] = dx[0].tensor
            if kind.bias:
                found["dbias"] = dbias.tensor
        return found

    for i in range(problem.distinct(x)):  # what a gradient alone needs
        forward(i)
    run_all = graph_of(run) if as_graph and problem.setting.on_gpu else run
    return Calls(run_all, results)


def graph_of(run: Callable[[], None]) -> Callable[[], None]:
    """`run` as a CUDA graph."""
    run()  # loads what is loaded at the first launch
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # What JAX's threads do meanwhile must not end the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def named_results(kind: Kind, y: Any, entropy: Any, grads: Sequence[Any]) -> Results:
    """Those of a formula, which computes forward and maybe the gradient, too."""
    found = {"entropy": entropy}
    if kind.activation is not None:
        found["y"] = y
    return found | dict(zip(("dx", "dbias"), grads, strict=False))


def torch_formula(problem: Problem, kind: Kind, compiled: bool) -> Calls:
    """The formula of the PyTorch original."""
    formula = formulas.pytorch_original()

    def forward(z: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, Any]:
        if kind.activation is None:
            return None, formula(z)
        y = getattr(torch, kind.activation)(z if bias is None else z + bias)
        return y, formula(y)

    if compiled:
        torch.compiler.reset()
        forward = torch.compile(forward, dynamic=False)
    inputs = [x.detach().requires_grad_(kind.gradient) for x in problem.x]
    bias = problem.bias.detach().requires_grad_(kind.gradient) if kind.bias else None
    entropy_grad = torch.full_like(inputs[0][0, 0], problem.entropy_grad)

    def one(i: int) -> tuple[Any, Any]:
        leaves = [inputs[i]] if bias is None else [inputs[i], bias]
        for leaf in leaves:
            leaf.grad = None
        y, entropy = forward(inputs[i], bias)
        if kind.gradient and y is None:
            entropy.backward(entropy_grad)
        elif kind.gradient:
            torch.autograd.backward([y, entropy], [problem.dy[i], entropy_grad])
        return y, entropy

    def run() -> None:
        for i in range(len(inputs)):
            one(i)

    def results() -> Results:
        y, entropy = one(0)
        leaves = [inputs[0]] if bias is None else [inputs[0], bias]
        grads = [leaf.grad for leaf in leaves] if kind.gradient else []
        return named_results(
            kind, None if y is None else y.detach(), entropy.detach(), grads
        )

    return Calls(run, results)


def jax_formula(problem: Problem, kind: Kind) -> Calls:
    """One jitted function over all tensors of a turn, as a graph is one replay."""
    try:
        import jax
    except ImportError as error:
        raise UnavailableError(str(error)) from error
    if problem.setting.on_gpu and jax.default_backend() not in ("gpu", "cuda"):
        raise UnavailableError(f"JAX runs on {jax.default_backend()}")
    if problem.dtype == "float64" and not jax.config.jax_enable_x64:
        raise UnavailableError("float64 is off in JAX (jax_enable_x64)")
    formula = formulas.jax_variance()

    def forward(z: jax.Array, *bias: jax.Array) -> tuple[Any, Any]:
        if kind.activation is None:
            return (), formula(z)
        z = sum(bias, z)
        y = jax.numpy.tanh(z) if kind.activation == "tanh" else jax.nn.relu(z)
        return y, formula(y)

    def one(z: jax.Array, dy: jax.Array, bias: Sequence[jax.Array]) -> tuple[Any, ...]:
        if not kind.gradient:
            return *forward(z, *bias), ()
        (y, entropy), pull_back = jax.vjp(forward, z, *bias)
        entropy_grad = jax.numpy.full_like(entropy, problem.entropy_grad)
        into_y = () if kind.activation is None else dy
        return y, entropy, pull_back((into_y, entropy_grad))

    @jax.jit
    def function(inputs: Sequence[Any], grads: Sequence[Any], bias: Any) -> list[Any]:
        return [one(z, dy, bias) for z, dy in zip(inputs, grads, strict=True)]

    inputs = [jax.dlpack.from_dlpack(x.detach()) for x in problem.x]
    grads = [jax.dlpack.from_dlpack(dy) for dy in problem.dy]
    bias = [jax.dlpack.from_dlpack(problem.bias)] if kind.bias else []

    def run() -> None:
        jax.block_until_ready(function(inputs, grads, bias))

    def results() -> Results:
        y, entropy, found = jax.block_until_ready(function(inputs, grads, bias))[0]
        return named_results(
            kind,
            torch.from_dlpack(y) if kind.activation is not None else None,
            float(entropy),
            [torch.from_dlpack(grad) for grad in found],
        )

    return Calls(run, results, by_host=True)


def tensorflow_formula(problem: Problem, kind: Kind, native: bool, xla: bool) -> Calls:
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
    dlpack = tf.experimental.dlpack

    def given(tensor: torch.Tensor) -> tf.Tensor:
        return dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(tensor.detach()))

    def forward(x: tf.Tensor, bias: Sequence[tf.Tensor]) -> tuple[Any, ...]:
        if kind.activation is None:
            return (lbe_ops.batch_entropy(x, native=native),)
        y, entropy, _ = lbe_ops.ops.epilogue(
            x, *bias, activation=kind.activation, native=native
        )
        return entropy, y

    @tf.function(jit_compile=xla, autograph=False)
    def function(x: tf.Tensor, dy: tf.Tensor, *bias: tf.Tensor) -> tuple[Any, ...]:
        if not kind.gradient:
            return forward(x, bias)
        with tf.GradientTape() as tape:
            tape.watch([x, *bias])
            found = forward(x, bias)
        into = [tf.constant(problem.entropy_grad, found[0].dtype), dy][: len(found)]
        return *found, *tape.gradient(found, [x, *bias], output_gradients=into)

    inputs = [
        (given(x), given(dy)) for x, dy in zip(problem.x, problem.dy, strict=True)
    ]
    bias = [given(problem.bias)] if kind.bias else []

    def run() -> None:
        last = [function(*pair, *bias) for pair in inputs][-1]
        last[0].numpy()  # waits for TensorFlow's stream

    def results() -> Results:
        entropy, *rest = found = function(*inputs[0], *bias)
        if problem.setting.on_gpu and not all("GPU" in a.device for a in found):
            raise UnavailableError(f"TensorFlow ran it on {entropy.device}")
        problem.setting.synchronize()
        tensors = [torch.from_dlpack(dlpack.to_dlpack(tensor)) for tensor in rest]
        y = tensors.pop(0) if kind.activation is not None else None
        return named_results(kind, y, float(entropy), tensors)

    return Calls(run, results, by_host=True)


VARIANTS = {
    name: Variant(name, ddof, prepare)
    for name, ddof, prepare in (
        ("fused", 0, functools.partial(fused, as_graph=True)),
        ("fused eager", 0, functools.partial(fused, as_graph=False)),
        ("torch eager", 1, functools.partial(torch_formula, compiled=False)),
        ("torch compile", 1, functools.partial(torch_formula, compiled=True)),
        ("JAX jit", 0, jax_formula),
        *(
            (name, 0, functools.partial(tensorflow_formula, native=native, xla=xla))
            for name, native, xla in (
                ("TensorFlow op", True, False),
                ("TensorFlow op XLA", True, True),
                ("pure graph", False, False),
                ("pure XLA", False, True),
            )
        ),
    )
}


def with_blocks(blocks: int) -> Variant:
    """The kernels, made to aim for so many blocks."""
    prepare = functools.partial(fused, as_graph=True, blocks=blocks)
    return Variant(f"fused, {blocks} blocks", 0, prepare)


def difference(found: Results, expected: Results) -> float:
    """The largest relative difference of a result; NaN if there is one."""
    worst = [0.0]
    for name, value in found.items():
        wanted = expected[name]
        if name == "entropy":
            worst.append(abs(float(value) - wanted) / abs(wanted))
            continue
        period = wanted.shape[-1]
        repeated = value.detach().reshape(-1, value.shape[-1] // period, period)
        columns = wanted.reshape(-1, 1, period)
        some = max(1, MOST_ELEMENTS // value.shape[-1])  # rows at a time
        errors = [
            (rows.to(columns.device).double() - expected_rows).abs().max()
            for rows, expected_rows in zip(
                repeated.split(some), columns.split(some), strict=True
            )
        ]
        worst.append((torch.stack(errors).max() / columns.abs().max()).item())
    return math.nan if any(map(math.isnan, worst)) else max(worst)


def first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, UnavailableError):
        return line
    return f"{type(error).__name__}: {line}"


def make_problem(setting: Setting, shape: tuple[int, int], dtype: str) -> Problem:
    """Tensors that no cache holds: as many as make a turn long enough."""
    rows, units = shape
    period = PERIOD if units % PERIOD == 0 else units
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        values = scale * torch.randn(size, generator=generator)
        return values.to(getattr(torch, dtype))

    # dy is as large as the entropy's share, so that a check sees both.
    share = entropy_grad_of(shape) / (rows * units)
    base = {
        "x": normal(rows, period),
        "bias": normal(period),
        "dy": normal(rows, period, scale=share),
    }
    size = rows * units * base["x"].element_size()
    buffers = min(MOST_BUFFERS, max(2, math.ceil(TURN_BYTES / size)))
    if not setting.on_gpu:
        buffers = 2

    def several(name: str) -> list[torch.Tensor]:
        first = base[name].to(setting.device).repeat(1, units // period)
        return [first, *(first.clone() for _ in range(buffers - 1))]

    x, dy = several("x"), several("dy")
    bias = base["bias"].to(setting.device).repeat(units // period)
    # TensorFlow's and JAX's streams wait for none of PyTorch's.
    setting.synchronize()
    exact = {name: tensor.double().numpy() for name, tensor in base.items()}
    return Problem(setting, exact, x, dy, bias, hot=False)


def in_l2(problem: Problem) -> Problem:
    """The same tensor again and again."""
    repeats = HOT_REPEATS if problem.setting.on_gpu else 2
    x, dy = [problem.x[0]] * repeats, [problem.dy[0]] * repeats
    return dataclasses.replace(problem, x=x, dy=dy, hot=True)


def copies(setting: Setting, size: int, number: int) -> Calls:
    pairs = [
        [torch.ones(max(size // 4, 1), device=setting.device) for _ in range(2)]
        for _ in range(number)
    ]

    def run() -> None:
        for source, target in pairs:
            target.copy_(source)

    return Calls(run, dict)


READ = """
extern "C" __global__ void read(const uint4* from, long long count, unsigned* to) {
  const long long step = (long long)gridDim.x * blockDim.x;
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned all = 0;
  for (; i + 3 * step < count; i += 4 * step) {
    const uint4 a = from[i], b = from[i + step];
    const uint4 c = from[i + 2 * step], d = from[i + 3 * step];
    all ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
    all ^= c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < count; i += step) all ^= from[i].x ^ from[i].y ^ from[i].z ^ from[i].w;
  if (all == 0x12345678u) *to = all;  // never; so that nothing is left out
}
"""


@functools.lru_cache(maxsize=1)
def read_kernel() -> tuple[Callable[[torch.Tensor], object], str]:
    """What reads a tensor on the GPU as fast as it can be read, and its name.

    Loads of 16 bytes, four of them under way in each thread, where CuPy compiles that.
    """
    try:
        import cupy

        kernel = cupy.RawKernel(READ, "read")
        blocks = 8 * torch.cuda.get_device_properties(0).multi_processor_count
        scratch = torch.zeros(4, device="cuda")

        def read(tensor: torch.Tensor) -> None:
            stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
            size = tensor.numel() * tensor.element_size()
            arguments = (
                np.uint64(tensor.data_ptr()),
                np.int64(size // 16),
                np.uint64(scratch.data_ptr()),
            )
            with stream:
                kernel((blocks,), (256,), arguments)

        read(torch.zeros(64, device="cuda"))
        torch.cuda.synchronize()
        return read, "a kernel of wide loads"
    except Exception as error:  # no CuPy, or one that cannot compile here
        return torch.sum, f"PyTorch's sum (CuPy: {first_line(error)})"


def reads(setting: Setting, size: int, number: int) -> Calls:
    read = read_kernel()[0] if setting.on_gpu else torch.sum
    sources = [
        torch.ones(max(size // 4, 1), device=setting.device) for _ in range(number)
    ]

    def run() -> None:
        for source in sources:
            read(source)

    return Calls(run, dict)


def ceilings(problem: Problem) -> dict[str, tuple[Calls, int, int]]:
    """What the memory reaches: calls, the bytes of an array, and how many arrays."""
    setting, size, number = problem.setting, problem.bytes, len(problem.x)
    large = LARGE_COPY_BYTES if setting.on_gpu else size
    if problem.hot:
        number = 1
    return {
        "copy": (copies(setting, size, number), size, number),
        "read": (reads(setting, size, number), size, number),
        "large copy": (copies(setting, large, 1), large, 1),
        "large read": (reads(setting, large, 1), large, 1),
    }


def quantiles(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, (0.1, 0.5, 0.9))
    return {"median": median, "q10": low, "q90": high}


def row_of(problem: Problem, name: str) -> dict[str, Any]:
    """A row of the results with nothing measured."""
    copied, read = PASSES[name].tensors
    return {
        "shape": list(problem.shape),
        "dtype": problem.dtype,
        "pass": name + (", in L2" if problem.hot else ""),
        "bytes": problem.bytes,
        "buffers": 1 if problem.hot else len(problem.x),
        "bytes_to_move": problem.bytes * copied,
        "bytes_only_read": problem.bytes * read,
        "seconds": {},
        "times_fused": {},
        "difference_from_oracle": {},
        "skipped": {},
    }


def measure(
    problem: Problem,
    name: str,
    chosen: Sequence[Variant],
    rounds: int,
    flush: Callable[[], object],
    memory: dict[str, tuple[Calls, int, int]],
) -> dict[str, Any]:
    """Checks, then times the variants of a pass; a row of the results."""
    setting, kind = problem.setting, PASSES[name]
    row = row_of(problem, name)
    ready: dict[str, tuple[Calls, int]] = {}
    for variant in chosen:
        try:
            calls = variant.prepare(problem, kind)
            worst = difference(calls.results(), problem.oracle(kind, variant.ddof))
            calls.run()
            setting.synchronize()
        except Exception as error:  # a compiler or memory that is missing, for one
            row["skipped"][variant.name] = first_line(error)
            continue
        row["difference_from_oracle"][variant.name] = worst
        if worst <= TOLERANCES[problem.dtype]:
            ready[variant.name] = (calls, len(problem.x))
        else:
            reason = f"differs from the oracle by {worst:.1e}"
            row["skipped"][variant.name] = reason
    timed = list(ready)
    ready |= {name: (calls, number) for name, (calls, _, number) in memory.items()}
    seconds = {name: np.empty(rounds) for name in ready}
    for calls, _ in ready.values():
        calls.run()
    for index in range(rounds):
        for variant_name, (calls, number) in ready.items():
            setting.synchronize()
            if not problem.hot:
                flush()
            took = setting.seconds_of(calls.run, calls.by_host)
            seconds[variant_name][index] = took / number

    def rate(name: str, times: int) -> float:
        return times * memory[name][1] / float(np.median(seconds[name])) / 1e9

    row["seconds"] = {name: quantiles(seconds[name]) for name in timed}
    if "fused" in timed:
        row["times_fused"] = {
            name: quantiles(seconds[name] / seconds["fused"]) for name in timed
        }
    for key, prefix in (("memory_GB_per_s", "large "), ("same_size_GB_per_s", "")):
        row[key] = {"read": rate(prefix + "read", 1), "copy": rate(prefix + "copy", 2)}
    return row


def describe_gpu(setting: Setting) -> dict[str, object]:
    if not setting.on_gpu:
        return {"name": "none: kernels emulated on the CPU", "read_by": "torch.sum"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        **setting.kernels.cuda_system(),
        "read_by": read_kernel()[1],
        "state": gpu_state(),
    }


def gpu_state() -> list[str]:
    """The exact driver, clocks, power and ECC, as the driver's tool says them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ["no nvidia-smi in PATH"]
    try:
        done = subprocess.run(
            [tool, "-q", "-d", "CLOCK,POWER,ECC"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except subprocess.TimeoutExpired:
        return ["nvidia-smi does not answer"]
    return (done.stdout + done.stderr).splitlines()


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
    parser.add_argument(
        "--dtypes", nargs="+", choices=TOLERANCES, default=list(TOLERANCES)
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)
    )
    parser.add_argument(
        *("--blocks", "-b"),
        nargs="+",
        type=int,
        default=[],
        help="time the kernels with so many blocks as well",
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--no-l2", action="store_true", help="leave out what the L2 cache may hold"
    )
    parser.add_argument(
        "--model",
        choices=("H100", "H200"),
        help="predict for this GPU, not for the one that is there",
    )
    parser.add_argument(
        "--emulate", action="store_true", help="no GPU: test this script, not the time"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("results/benchmark-gpu")
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if any(blocks < 1 for blocks in arguments.blocks):
        parser.error("--blocks must be at least 1")
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


def cases(arguments: argparse.Namespace) -> list[tuple[tuple[int, int], str]]:
    """Shapes and dtypes, each shape with all of its dtypes before the next one."""
    shapes = arguments.shapes or [parse_shape(text) for text in SHAPES]
    chosen = [
        (shape, dtype)
        for shape in shapes
        for dtype in arguments.dtypes
        if arguments.shapes or shape in map(parse_shape, SHAPES_OF[dtype])
    ]
    return list(dict.fromkeys(chosen))


def main() -> int:
    arguments = parse_arguments()
    setting = make_setting(arguments.emulate)
    gpu = describe_gpu(setting)
    model = gpu_model.gpu_named(arguments.model or gpu["name"])
    # Reading several times the L2 leaves nothing of the buffers in it.
    filler = torch.ones(int(gpu.get("l2_bytes", 2**20)), device=setting.device)
    chosen = [VARIANTS[name] for name in arguments.variants]
    chosen += map(with_blocks, arguments.blocks)
    results = {
        dtype: {
            "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
            "rounds": arguments.rounds,
            "machine": describe(),
            "gpu": gpu,
            "model": model and dataclasses.asdict(model),
            "build": setting.kernels.build_info(),
            "versions": versions(),
            "rows": [],
        }
        for dtype in arguments.dtypes
    }
    failed = []

    def keep(row: dict[str, Any], predicted: float | None) -> None:
        row["predicted_seconds"] = predicted
        results[row["dtype"]]["rows"].append(row)
        report.print_progress(row)
        if "fused" in row["skipped"]:
            failed.append(row)
        tables(row["dtype"], aloud=False)

    def tables(dtype: str, aloud: bool) -> None:
        found, folder = results[dtype], arguments.output / dtype
        report.write(found, folder)
        notes, judged = report.gpu_notes(found), report.gpu_targets(found)
        report.finish(found, folder, notes, judged, aloud)

    for shape, dtype in cases(arguments):
        problem, problems = None, []
        try:
            problem = make_problem(setting, shape, dtype)
            problems = [(problem, ceilings(problem))]
            if problem.bytes <= MOST_BYTES_IN_L2 and not arguments.no_l2:
                hot = in_l2(problem)
                problems.append((hot, ceilings(hot)))
        except Exception as error:  # memory, for one
            print(f"{shape}, {dtype}: {first_line(error)}", flush=True)
            failed.append({"shape": shape, "dtype": dtype, "error": first_line(error)})
            continue
        for name in arguments.passes:
            kind = PASSES[name]
            # The others have no gradient without a forward pass.
            able = [v for v in chosen if kind.forward or v.name.startswith("fused")]
            for given, memory in problems:
                try:
                    row = measure(
                        given, name, able, arguments.rounds, filler.sum, memory
                    )
                except Exception as error:  # of a kernel, reported by a later call
                    row = row_of(given, name)
                    row["skipped"]["fused"] = first_line(error)
                predicted = kind.predicted_seconds(dtype, shape, model)
                keep(row, None if given.hot else predicted)
        del problem, problems, given, memory
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()  # for JAX and TensorFlow
    for dtype, found in results.items():
        if found["rows"]:
            tables(dtype, aloud=True)
    if failed:
        print(f"error: {len(failed)} rows without the kernels", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
