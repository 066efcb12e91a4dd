# SPDX-License-Identifier: Apache-2.0
"""What `python -m lbe_ops info` prints: versions, and what the native library is."""

from __future__ import annotations

import importlib
import platform
import warnings

import keras
import tensorflow as tf

import lbe_ops
from lbe_ops import native

_MODES = {None: "auto", True: "require", False: "never"}


def collect() -> dict[str, str | dict[str, str]]:
    """Everything that a bug report about the installation needs.

    Returns:
        Names and values in the order in which `render` prints them. `native`, `numpy`
        and `xla` are "yes", or "no: " and the reason (`xla` may be "yes: plain HLO
        only", without the native kernels); `cuda` is the toolkit and the architectures
        that the library was built for, `gpu` the device that it runs on, or "no: " and
        the reason; `installation` is what its build said; `build` is what else the
        compiled code says about itself, empty where there is none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the reason is printed
        loaded = native.load()
    try:
        mode = _MODES[native.requested_mode()]
    except ValueError as error:
        mode = f"invalid: {error}"
    build: dict[str, str] = {}
    simd = gpu = "none"
    try:
        module = importlib.import_module("lbe_ops_numpy")
    except ImportError as error:
        numpy = f"no: {error}"
    else:
        numpy, build, simd = "yes", module.build_info(), module.simd_level()
        gpu = _describe_gpu(module.cuda_system())
    if loaded.xla_reason:
        xla = f"no: {loaded.xla_reason}"
    else:
        xla = "yes" if loaded.custom_call else "yes: plain HLO only"
    return {
        "lbe_ops": lbe_ops.__version__,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "platform": platform.platform(),
        "native": f"no: {loaded.reason}" if loaded.reason else "yes",
        "native_mode": mode,
        "numpy": numpy,
        "simd": simd,
        "cuda": build.pop("cuda", "no"),
        "installation": native.build_line() or "from a source folder",
        "gpu": gpu,
        "xla": xla,
        "build": build,
    }


def _describe_gpu(system: dict[str, str]) -> str:
    driver = f"driver for CUDA {system['driver']}"
    if system["problem"]:
        driver = f" ({driver})" if system["driver"] not in ("", "none") else ""
        return f"no: {system['problem']}{driver}"
    return f"{system['device']}, sm_{system['compute_capability']}, {driver}"


def render(values: dict[str, str | dict[str, str]]) -> str:
    """The values as lines of text; those of `build` as `built ...`."""
    build = values["build"]
    rows = {key: value for key, value in values.items() if key != "build"}
    rows |= {f"built: {key}": value for key, value in build.items()}
    width = max(map(len, rows))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())
