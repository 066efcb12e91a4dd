# SPDX-License-Identifier: Apache-2.0
"""The kernels without TensorFlow: on NumPy arrays, and on those of a GPU.

python examples/arrays.py
"""

import lbe_ops_numpy
import numpy as np

x = np.random.default_rng(0).normal(size=(512, 128)).astype(np.float32)
entropy, mean, variance = lbe_ops_numpy.batch_entropy(x, threads=2)
dx = lbe_ops_numpy.batch_entropy_grad(x, mean, variance)
print(f"NumPy: H = {entropy:.4f} nats, largest gradient {abs(dx).max():.2e}")

y, entropy, *_ = lbe_ops_numpy.epilogue(x, np.zeros(128, "f4"), activation="relu")
print(f"behind a bias and a ReLU: {entropy:.4f}")

try:
    import cupy
except ImportError:
    cupy = None
if cupy and lbe_ops_numpy.cuda_system()["problem"] == "":
    on_gpu = cupy.asarray(x)
    entropy, *_ = lbe_ops_numpy.batch_entropy(on_gpu)
    print(f"CuPy: {float(cupy.asarray(entropy)):.4f}, the same bits")
