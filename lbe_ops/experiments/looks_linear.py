# SPDX-License-Identifier: Apache-2.0
"""The looks-linear initialization of deep plain ReLU networks."""

from __future__ import annotations

import keras
import numpy as np


@keras.saving.register_keras_serializable(package="lbe_ops")
class LooksLinear(keras.initializers.Initializer):
    """Mirrored orthogonal kernels, with which a ReLU net starts as a linear map.

    The units of a layer are pairs that see `z` and `-z`, and the next layer takes
    `relu(z) - relu(-z) = z` from them: with a semi-orthogonal matrix A, the first
    kernel is `[A, -A]` and every later one `[[A, -A], [-A, A]]`. However deep, the
    net starts as an isometry, neither signals nor gradients vanish, explode or become
    alike, and the pairs part as soon as it trains. Convolutions have it at the centre
    of their kernel and zeros around that.

    Args:
        first: whether the layer's input is not made of such pairs.
        seed: of the orthogonal matrix; equal seeds give equal kernels.

    Raises:
        ValueError: units (or, but for the first layer, inputs) are odd in number.

    Example:

    >>> kernel = LooksLinear(first=True, seed=1)((3, 4))
    >>> bool(np.allclose(kernel[:, :2], -kernel[:, 2:]))
    True

    Source: Balduzzi et al., "The Shattered Gradients Problem", ICML 2017
    (arXiv 1702.08591), section 4.
    """

    def __init__(self, first: bool = False, seed: int | None = None) -> None:
        self.first = first
        self.seed = seed

    def __call__(self, shape: tuple[int, ...], dtype: str | None = None) -> object:
        *window, inputs, units = shape
        if units % 2 or (inputs % 2 and not self.first):
            raise ValueError(
                "looks_linear makes pairs of units: their number must be even. "
                f"Received: a kernel of shape {tuple(shape)}"
            )
        size = (inputs if self.first else inputs // 2, units // 2)
        normal = np.random.default_rng(self.seed).normal(size=(max(size), min(size)))
        orthogonal, triangular = np.linalg.qr(normal)
        orthogonal *= np.sign(np.diag(triangular))  # any of them is equally likely
        matrix = orthogonal if size[0] >= size[1] else orthogonal.T
        matrix = np.concatenate([matrix, -matrix], axis=1)
        if not self.first:
            matrix = np.concatenate([matrix, -matrix])
        kernel = np.zeros(shape)
        kernel[tuple((length - 1) // 2 for length in window)] = matrix
        return keras.ops.convert_to_tensor(kernel, dtype or keras.config.floatx())

    def get_config(self) -> dict[str, object]:
        """Whether it is for a first layer, and the seed."""
        return {"first": self.first, "seed": self.seed}
