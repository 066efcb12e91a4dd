# SPDX-License-Identifier: Apache-2.0
"""Layerwise batch entropy (LBE) for TensorFlow: a fused op and Keras on top."""

import importlib.metadata
import importlib.util

if importlib.util.find_spec("tensorflow") is None:
    raise ImportError(
        "lbe_ops needs TensorFlow, and none is installed. Install the one that it was "
        'built for: `pip install "lbe_ops[cpu]"`, or `pip install "lbe_ops[cuda]"` on '
        "a machine with an NVIDIA GPU."
    )

from lbe_ops.native import NativeUnavailableError, use_native
from lbe_ops.ops import UnitStatistics, batch_entropy, unit_statistics

__all__ = [
    "NativeUnavailableError",
    "UnitStatistics",
    "batch_entropy",
    "unit_statistics",
    "use_native",
]

try:
    __version__ = importlib.metadata.version("lbe_ops")
except importlib.metadata.PackageNotFoundError:  # a source folder on sys.path
    __version__ = "0+unknown"
