# SPDX-License-Identifier: Apache-2.0
"""Finds, checks and loads the compiled libraries, once, and remembers why not.

The only file that knows about `.so` files. Everything else asks `select`, which
answers both "may I use the native op here?" and "why not?".

The choice is tri-state everywhere: None (auto), True (require), False (never). An
argument that is not None wins over the context manager `use_native`, which wins
over the environment variable `LBE_OPS_NATIVE` (`1` or `0`), which wins over auto.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import re
import struct
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from lbe_ops.keras_internals import compiled_by_xla

ENVIRONMENT_VARIABLE = "LBE_OPS_NATIVE"
# Beside this file there is a folder for each minor of TensorFlow that was built for.
FOLDER = pathlib.Path(__file__).parent
LIBRARY_PATH = (
    FOLDER / f"tensorflow{'.'.join(tf.__version__.split('.')[:2])}" / "libtf_ops.so"
)
# How XLA compiles the ops; a library of its own, beside that of the ops.
XLA_LIBRARY_NAME = "libxla_ops.so"

# cc/tf_ops.cc and cc/xla_ops.cc embed this text, so that the version is known
# without loading.
_MARKER = re.compile(rb"lbe_ops was built for TensorFlow (\d+\.\d+[^;]*);")

_loading = threading.Lock()  # two threads must not register the ops twice

_mode: contextvars.ContextVar[bool | None] = contextvars.ContextVar(
    "lbe_ops_native", default=None
)


# Directly below Exception: AutoGraph re-raises other types as its own.
class NativeUnavailableError(Exception):
    """The native op was required and cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Native:
    """The outcome of the one attempt to load the libraries.

    Attributes:
        ops: the module of op wrappers, or None.
        reason: why `ops` is None; empty where it is not.
        xla_reason: why XLA cannot compile `ops`; empty where it can.
        custom_call: whether XLA programs run the native kernels, and not the same
            formula in XLA's own operations.
    """

    ops: types.ModuleType | None
    reason: str
    xla_reason: str = "there is no native op."
    custom_call: bool = False


@contextlib.contextmanager
def use_native(native: bool | None) -> Iterator[None]:
    """Requires (True), forbids (False) or leaves open (None) the native op.

    Holds for ops built in the `with` block, in this thread (or asyncio task), and so
    not in the threads of `strategy.run`: set `LBE_OPS_NATIVE` for those. A
    `tf.function` keeps what was in force when it was traced. An explicit `native=`
    wins.

    Example:

    >>> x = tf.random.normal((128, 32))
    >>> with lbe_ops.use_native(False):
    ...     h = lbe_ops.batch_entropy(x)  # plain TensorFlow
    """
    token = _mode.set(_check_mode(native, "use_native()"))
    try:
        yield
    finally:
        _mode.reset(token)


def _check_mode(native: object, source: str) -> bool | None:
    if native is None or isinstance(native, bool):
        return native
    raise TypeError(
        f"{source} takes True (require the native op), False (never use it) or "
        f"None (use it where possible). Received: {native!r}"
    )


def requested_mode(native: bool | None = None) -> bool | None:
    """The mode in force: the argument, the context manager, the environment."""
    if _check_mode(native, "native=") is not None:
        return native
    if _mode.get() is not None:
        return _mode.get()
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} must be 1 (require the native op), 0 (never use "
            f"it) or unset. Received: {value!r}"
        )
    return bool(int(value)) if value else None


def select(
    native: bool | None = None, *, lowered: bool = True
) -> types.ModuleType | None:
    """The module of native ops if they are to be used here, else None.

    Args:
        native: the mode, if the caller has one.
        lowered: whether XLA knows the ops that are meant.

    Raises:
        NativeUnavailableError: the native op is required and cannot be used.
    """
    mode = requested_mode(native)
    if mode is False:
        return None
    loaded = load()
    reason = loaded.reason or _gpu_reason() or _unusable_here(loaded, lowered)
    if not reason:
        return loaded.ops
    if mode:
        raise NativeUnavailableError(
            f"The native op is required, but {reason} Pass native=None (or unset "
            f"{ENVIRONMENT_VARIABLE}) to fall back to plain TensorFlow."
        )
    return None


def _gpu_reason() -> str:
    """Why a loaded library cannot serve a GPU that TensorFlow uses, or ''.

    TensorFlow would run the op on the CPU then, and copy every layer's activations
    there and back, without a word.
    """
    gpus = tf.config.get_visible_devices("GPU")
    return next(filter(None, (_gpu_problem(gpu.name) for gpu in gpus)), "")


@functools.cache
def _gpu_problem(name: str) -> str:
    """The same of one GPU, by the name of its `tf.config.PhysicalDevice`.

    It ends with the GPU's number among all that CUDA sees, those that
    `tf.config.set_visible_devices` hides from TensorFlow included.
    """
    ask = ctypes.CDLL(os.fspath(LIBRARY_PATH)).LbeGpuProblem
    ask.restype = ctypes.c_char_p
    problem = ask(int(name.rpartition(":")[2])).decode()
    if not problem:
        return ""
    problem = f"lbe_ops cannot use a GPU that TensorFlow uses, {name}: {problem}."
    _warn(f"lbe_ops falls back to plain TensorFlow: {problem}")
    return problem


def _unusable_here(loaded: Native, lowered: bool) -> str:
    """Why a loaded library cannot serve the function being traced, or ''."""
    reason = loaded.xla_reason
    if not lowered:
        reason = reason or "XLA knows no op of synchronised entropy."
    if reason and compiled_by_xla():
        return f"this function is compiled by XLA (jit_compile=True), and {reason}"
    return ""


def compiles(native: bool | None = None) -> bool:
    """Whether XLA can compile what `select(native)` chooses outside of it."""
    if requested_mode(native) is False:
        return True
    loaded = load()
    return loaded.ops is None or not loaded.xla_reason or bool(_gpu_reason())


def binary_interface(version: str) -> str:
    """What the libraries of TensorFlows that fit together have in common.

    The minor of a release or its candidates, such as '2.21'; of a nightly build, whose
    interface may be another one tomorrow, all of its version.
    """
    if "dev" in version:
        return version.replace("-dev", ".dev")
    return ".".join(re.findall(r"\d+", version)[:2])


def built_for(path: pathlib.Path) -> str | None:
    """The `binary_interface` of the TensorFlow that a library was built for.

    None if the file is no library of lbe_ops, or not all of it is there.
    """
    content = path.read_bytes()
    marker = _MARKER.search(content)
    if marker is None or len(content) < 64:
        return None
    # An ELF file ends with its table of sections: offset, entry size, entries.
    (offset,) = struct.unpack_from("<Q", content, 0x28)
    size, entries = struct.unpack_from("<HH", content, 0x3A)
    if offset + size * entries > len(content):
        return None
    return binary_interface(marker.group(1).decode())


def minors() -> list[str]:
    """The TensorFlow minors that there are compiled libraries for, oldest first."""
    found = [path.parent.name for path in FOLDER.glob("tensorflow*/libtf_ops.so")]
    names = [name.removeprefix("tensorflow") for name in found]
    return sorted(names, key=lambda name: [int(part) for part in name.split(".")])


def build_line() -> str:
    """What the build of this installation said about itself, or ''."""
    path = FOLDER / "build.txt"
    return path.read_text().strip() if path.exists() else ""


def _hidden() -> pathlib.Path | None:
    """Where this package is installed, if Python has taken a source folder instead."""
    here = pathlib.Path(__file__).parent
    for distribution in importlib.metadata.distributions(name="lbe_ops"):
        there = pathlib.Path(str(distribution.locate_file("lbe_ops"))).resolve()
        if (there / "__init__.py").exists() and there != here.resolve():
            return there
    return None


def load() -> Native:
    """Loads the libraries at the first call; later calls return the same outcome.

    A missing file is quiet, but in a source folder that hides an installation. One that
    is there and cannot be used gives one warning.
    """
    with _loading:
        return _load()


@functools.lru_cache(maxsize=1)
def _load() -> Native:
    path = LIBRARY_PATH
    if not path.exists():
        built = minors()
        installed = None if built else _hidden()
        if installed:
            reason = (
                f"{pathlib.Path(__file__).parent} is a source folder without compiled "
                f"libraries. It hides {installed}, which is installed: run Python in "
                "another folder, or take this one from PYTHONPATH."
            )
            warnings.warn(
                f"lbe_ops falls back to plain TensorFlow: {reason}",
                RuntimeWarning,
                stacklevel=3,
            )
            return Native(None, reason)
        if not built:
            said = build_line() or "it was installed without one."
            return Native(None, f"lbe_ops has no compiled library: {said}")
        reason = (
            f"lbe_ops was built for TensorFlow {' and '.join(built)}, and this is "
            f"TensorFlow {tf.__version__}."
        )
        _warn(f"lbe_ops falls back to plain TensorFlow: {reason}")
        return Native(None, reason)
    ops, reason = _open(path, tf.load_op_library)
    if reason:
        _warn(f"lbe_ops falls back to plain TensorFlow: {reason}")
        return Native(None, reason)
    path = path.with_name(XLA_LIBRARY_NAME)
    if not path.exists():
        return Native(
            ops,
            "",
            f"lbe_ops was built without {path.name} for TensorFlow {tf.__version__}: "
            "from 2.20 on it can be, unless LBE_XLA=OFF.",
        )
    _, reason = _open(path, tf.load_library)
    if reason:
        _warn(f"lbe_ops has no native op under XLA (jit_compile=True): {reason}")
        return Native(ops, "", reason)
    return Native(ops, "", "", os.environ.get("LBE_OPS_XLA_CUSTOM_CALL") != "0")


def _open(path: pathlib.Path, load: Callable[[str], Any]) -> tuple[Any, str]:
    """What `load` returns for a library, and why it cannot be loaded, or ''."""
    try:
        built = built_for(path)
        if built is None:
            return None, f"{path} is damaged or not a library of lbe_ops."
        if built != binary_interface(tf.__version__):
            # Never load it: TensorFlow's C++ ABI changes with every minor.
            return None, (
                f"{path.name} was built for TensorFlow {built}, and this is "
                f"TensorFlow {tf.__version__}."
            )
        return load(os.fspath(path)), ""
    except (OSError, tf.errors.OpError) as error:
        return None, f"{path} does not load: {str(error).strip().splitlines()[0]}"


def _warn(what: str) -> None:
    warnings.warn(
        f"{what} `pip install --force-reinstall --no-deps .` in the source folder of "
        "lbe_ops builds it for what is installed here.",
        RuntimeWarning,
        stacklevel=4,
    )
