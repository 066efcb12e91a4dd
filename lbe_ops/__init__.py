# SPDX-License-Identifier: Apache-2.0
"""Layerwise batch entropy (LBE) for TensorFlow: a fused op and Keras on top."""

import importlib.metadata
import importlib.util

if importlib.util.find_spec("tensorflow") is None:
    raise ImportError(
        "lbe_ops needs TensorFlow, and none is installed: `pip install "
        'tensorflow-cpu`, or `pip install "tensorflow[and-cuda]"` on a machine with an '
        "NVIDIA GPU."
    )

import keras

if keras.config.backend() != "tensorflow":
    raise ImportError(
        "lbe_ops needs Keras on its TensorFlow backend. Set KERAS_BACKEND=tensorflow "
        "in the environment (or the backend in keras.json) before Keras is imported. "
        f"Received: backend={keras.config.backend()!r}"
    )

from lbe_ops import initializers
from lbe_ops.callbacks import BatchEntropyLogger
from lbe_ops.diagnose import Diagnosis, diagnose
from lbe_ops.layers import LBE, Conv2D_LBE, Dense_LBE, add_lbe, with_lbe
from lbe_ops.measure import effective_rank, mean_cosine
from lbe_ops.model import LBE_Model, LBEModel
from lbe_ops.native import NativeUnavailableError, load, use_native
from lbe_ops.ops import UnitStatistics, batch_entropy, unit_statistics
from lbe_ops.recorder import recording
from lbe_ops.regularizer import LBERegularizer
from lbe_ops.targets import max_entropy

__all__ = [
    "BatchEntropyLogger",
    "LBE",
    "Conv2D_LBE",
    "Dense_LBE",
    "Diagnosis",
    "LBEModel",
    "LBERegularizer",
    "LBE_Model",
    "NativeUnavailableError",
    "UnitStatistics",
    "add_lbe",
    "batch_entropy",
    "initializers",
    "diagnose",
    "effective_rank",
    "mean_cosine",
    "max_entropy",
    "recording",
    "unit_statistics",
    "use_native",
    "with_lbe",
]

# A SavedModel that holds the ops needs no more than the import of this package.
load()

try:
    __version__ = importlib.metadata.version("lbe_ops")
except importlib.metadata.PackageNotFoundError:  # a source folder on sys.path
    __version__ = "0+unknown"
