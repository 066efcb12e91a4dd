# SPDX-License-Identifier: Apache-2.0
"""Layerwise batch entropy (LBE) for TensorFlow: a fused op and Keras on top."""

from lbe_ops.native import NativeUnavailableError, use_native
from lbe_ops.ops import UnitStatistics, batch_entropy, unit_statistics

__all__ = [
    "NativeUnavailableError",
    "UnitStatistics",
    "batch_entropy",
    "unit_statistics",
    "use_native",
]
