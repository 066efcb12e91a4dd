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

from lbe_ops.callbacks import BatchEntropyLogger
from lbe_ops.layers import Conv2D_LBE, Dense_LBE, add_lbe, with_lbe
from lbe_ops.model import LBE_Model, LBEModel
from lbe_ops.native import NativeUnavailableError, use_native
from lbe_ops.ops import UnitStatistics, batch_entropy, unit_statistics
from lbe_ops.regularizer import LBERegularizer

__all__ = [
    "BatchEntropyLogger",
    "Conv2D_LBE",
    "Dense_LBE",
    "LBEModel",
    "LBERegularizer",
    "LBE_Model",
    "NativeUnavailableError",
    "UnitStatistics",
    "add_lbe",
    "batch_entropy",
    "unit_statistics",
    "use_native",
    "with_lbe",
]

try:
    __version__ = importlib.metadata.version("lbe_ops")
except importlib.metadata.PackageNotFoundError:  # a source folder on sys.path
    __version__ = "0+unknown"
