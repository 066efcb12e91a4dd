# SPDX-License-Identifier: Apache-2.0
"""Runs every CUDA kernel through lbe_ops_numpy: for bits, sanitizers and profilers.

    python3 benchmarks/gpu_kernels.py bits     compares with the CPU kernels, bit by bit
    python3 benchmarks/gpu_kernels.py launch   runs the large cases once, and no other
                                               kernel: for Nsight Compute

`bits` takes all dtypes and activations, with and without a bias, rows that are aligned
and rows that are not, and several numbers of blocks. A case that fails ends nothing; a
line of JSON is written after each, and the exit status is 1 where one has failed.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}
ACTIVATIONS = (
    *(None, "relu", "tanh", "linear", "leaky_relu"),
    *("elu", "selu", "sigmoid", "softplus"),
)
SLOPE = 0.3
# One warp and less, rows that are not aligned, several tiles, many splits.
SHAPES = ((2, 1), (9, 38), (512, 128), (1000, 3), (259, 333), (130, 4096), (9000, 64))
BLOCKS = (0, 1, 264, 2048)
# For tools under which a kernel takes a hundred times as long.
QUICK_SHAPES = ((2100, 16), (259, 333), (9, 38))
QUICK_ACTIVATIONS = (None, "relu", "tanh", "softplus")

# Dtype, shape and pass: first what a model of the kernels is least sure of.
LAUNCHES = (
    ("float16", (128, 200704), "forward"),
    ("float32", (65536, 64), "forward"),
    ("float32", (4096, 4096), "relu gradient"),
    ("float16", (4096, 4096), "relu gradient"),
    ("float16", (16384, 16384), "forward"),
    ("float32", (4096, 4096), "tanh forward"),
    ("float16", (4096, 4096), "tanh forward"),
    ("float32", (4096, 4096), "relu forward"),
)
MORE_LAUNCHES = (
    ("float32", (4096, 4096), "forward"),
    ("float32", (4096, 4096), "gradient"),
    ("float32", (4096, 4096), "relu+bias gradient"),
    ("float16", (4096, 4096), "forward"),
    ("float16", (4096, 4096), "gradient"),
    ("float16", (4096, 4096), "relu forward"),
    ("float16", (4096, 4096), "relu+bias gradient"),
    ("float32", (128, 200704), "forward"),
    ("float16", (65536, 64), "forward"),
    ("float32", (4096, 777), "forward"),
    ("float16", (4096, 777), "forward"),
    ("float32", (4096, 777), "gradient"),
    ("bfloat16", (4096, 4096), "forward"),
    ("float64", (4096, 4096), "forward"),
    ("float64", (4096, 4096), "gradient"),
    ("float32", (4096, 4096), "softplus forward"),
    ("float16", (4096, 4096), "elu forward"),
    ("float32", (65536, 64), "relu+bias gradient"),
)


def normal(shape: Sequence[int], dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1.7, shape).astype(DTYPES[dtype])


def on_host(array: Any) -> np.ndarray:
    return array.numpy() if hasattr(array, "numpy") else np.asarray(array)


def different(found: Sequence[Any], expected: Sequence[Any]) -> list[int]:
    """Which of the arrays have not the same bits."""
    pairs = enumerate(zip(found, expected, strict=True))
    return [
        index
        for index, (a, b) in pairs
        if (a is None) != (b is None)
        or (a is not None and on_host(a).tobytes() != on_host(b).tobytes())
    ]


def check(
    module: Any,
    x: np.ndarray,
    dy: np.ndarray,
    bias: np.ndarray | None,
    activation: str | None,
    blocks: int,
) -> list[str]:
    """Which results of a pass and its gradient have other bits than on the CPU."""
    entropy_grad = 0.5 * x.size  # so that its share is as large as dy's
    given, given_dy = module.cuda_array(x), module.cuda_array(dy)
    if activation is None:
        expected = module.batch_entropy(x)
        found = module.batch_entropy(given, blocks=blocks)
        statistics = list(found)[1:]
        expected_grads = [module.batch_entropy_grad(x, *expected[1:], entropy_grad)]
        grads = [
            module.batch_entropy_grad(given, *statistics, entropy_grad, blocks=blocks)
        ]
        names = ["entropy", "mean", "variance", "dx"]
    else:
        of = {"activation": activation, "slope": SLOPE}
        expected = module.epilogue(x, bias, **of)
        given_bias = None if bias is None else module.cuda_array(bias)
        found = module.epilogue(given, given_bias, blocks=blocks, **of)
        of["bias_grad"] = bias is not None
        expected_grads = module.epilogue_grad(
            *(dy, expected[0], *expected[2:], entropy_grad), **of
        )
        grads = module.epilogue_grad(
            *(given_dy, found[0], *list(found)[2:], entropy_grad), blocks=blocks, **of
        )
        names = ["y", "entropy", "mean", "variance", "dz", "dbias"]
    return [names[i] for i in different([*found, *grads], [*expected, *expected_grads])]


def bit_cases(quick: bool) -> Iterator[tuple[tuple[int, int], str, Any, bool, int]]:
    """Shape, dtype, activation, bias and blocks: every kernel early."""
    activations = QUICK_ACTIVATIONS if quick else ACTIVATIONS
    outer = itertools.product(QUICK_SHAPES, (0,)) if quick else None
    for shape, of_blocks in outer or itertools.product(SHAPES, BLOCKS):
        for dtype, activation in itertools.product(DTYPES, activations):
            for bias in (False, True):
                if activation is not None or not bias:
                    yield shape, dtype, activation, bias, of_blocks


def bits(module: Any, quick: bool, most: int | None, log: TextIO) -> int:
    """Compares all cases; how many have failed."""
    failed = done = 0
    for case in itertools.islice(bit_cases(quick), most):
        shape, dtype, activation, has_bias, blocks = case
        x, dy = normal(shape, dtype), normal(shape, dtype, seed=1)
        bias = normal(shape[-1:], dtype, seed=2) if has_bias else None
        line: dict[str, Any] = {
            "shape": shape,
            "dtype": dtype,
            "activation": activation,
            "bias": has_bias,
            "blocks": blocks,
        }
        try:
            line["different"] = check(module, x, dy, bias, activation, blocks)
        except Exception as error:  # the next case says more
            line["error"] = f"{type(error).__name__}: {error}"
        log.write(json.dumps(line) + "\n")
        log.flush()
        done += 1
        if done % 20 == 0:
            print(f"{done} cases, {failed} failed", flush=True)
        if line.get("error") or line["different"]:
            failed += 1
            if failed <= 20:
                print(f"failed: {json.dumps(line)}", flush=True)
    print(f"{done} cases, {failed} failed: the bits of the CPU", flush=True)
    return failed


def launch(module: Any, cases: Sequence[tuple[str, Any, str]], emulated: bool) -> int:
    """Runs each case's kernels once; how many have failed.

    The gradient gets statistics from the host, so that it is launched alone.
    """
    failed = 0
    for dtype, full_shape, what in cases:
        rows, units = (min(side, 70) for side in full_shape) if emulated else full_shape
        *of, direction = what.split()
        activation, _, bias_word = of[0].partition("+") if of else ("", "", "")
        print(f"{dtype} {rows}x{units} {what}", flush=True)
        try:
            some = normal((rows, min(units, 1024)), dtype)
            values = np.tile(some, (1, -(-units // some.shape[1])))[:, :units]
            x = module.cuda_array(np.ascontiguousarray(values))
            result = np.float64 if dtype == "float64" else np.float32
            mean = module.cuda_array(np.full(units, 0.3, result))
            variance = module.cuda_array(np.full(units, 2.9, result))
            channels = module.cuda_array(normal((units,), dtype)) if bias_word else None
            grad = module.cuda_array(np.full((), 1e3, result))
            formula = {"activation": activation} if activation else {}
            if direction == "forward" and activation:
                done = module.epilogue(x, channels, **formula)
            elif direction == "forward":
                done = module.batch_entropy(x)
            elif activation:
                done = module.epilogue_grad(
                    *(x, x, mean, variance, grad), bias_grad=bool(bias_word), **formula
                )
            else:
                done = [module.batch_entropy_grad(x, mean, variance, grad)]
            on_host(done[1 if direction == "forward" and activation else 0])
        except Exception as error:  # the next case says more
            failed += 1
            print(f"failed: {type(error).__name__}: {error}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("bits", "launch"))
    parser.add_argument("--quick", action="store_true", help="few shapes and blocks")
    parser.add_argument("--more", action="store_true", help="launch the other cases")
    parser.add_argument("--most", type=int, help="stop after so many cases")
    parser.add_argument("--output", type=pathlib.Path, help="lines of JSON, of bits")
    parser.add_argument(
        "--emulate", action="store_true", help="no GPU: test this script"
    )
    arguments = parser.parse_args()
    name = "lbe_ops_numpy_emulated" if arguments.emulate else "lbe_ops_numpy"
    module = importlib.import_module(name)
    problem = "" if arguments.emulate else module.cuda_system()["problem"]
    if problem:
        sys.exit(f"no GPU: {problem}")
    if arguments.command == "launch":
        cases = MORE_LAUNCHES if arguments.more else LAUNCHES
        failed = launch(module, cases[: arguments.most], arguments.emulate)
    else:
        path = arguments.output or pathlib.Path(os.devnull)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as log:
            failed = bits(module, arguments.quick, arguments.most, log)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
