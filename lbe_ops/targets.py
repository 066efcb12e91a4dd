# SPDX-License-Identifier: Apache-2.0
"""Which entropies activations can reach, and which are asked for by default.

A unit whose values lie in [low, high] has a variance of at most `((high - low) / 2)^2`,
half of the samples at either end. A target above the entropy of that can only push the
unit into saturation, and its loss never ends.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable
from typing import Any

import keras

from lbe_ops import ops

_functions = keras.activations
# Every bounded activation of Keras, and where its values lie.
RANGES = {
    _functions.tanh: (-1.0, 1.0),
    _functions.hard_tanh: (-1.0, 1.0),
    _functions.softsign: (-1.0, 1.0),
    _functions.sigmoid: (0.0, 1.0),
    _functions.hard_sigmoid: (0.0, 1.0),
    _functions.sparse_sigmoid: (0.0, 1.0),
    _functions.softmax: (0.0, 1.0),
    _functions.sparsemax: (0.0, 1.0),
    _functions.relu6: (0.0, 6.0),
}
_SUM_IS_ONE = (_functions.softmax, _functions.sparsemax)

# What `with_lbe` and `add_lbe` ask for, in nats.
UNBOUNDED, SHARE_OF_BOUND, AT_LEAST = 1.0, 0.4, 0.05
DEFAULTS = {_functions.tanh: 0.5, _functions.sigmoid: 0.2}


def max_entropy(
    activation: Any,
    units: int | None = None,
    *,
    scale: float = ops.SCALE,
    offset: float = ops.OFFSET,
) -> float:
    """What the batch entropy of an activation's outputs cannot exceed, in nats.

    For outputs in [low, high], `1/2 ln(scale * ((high - low) / 2)^2 + offset)`: 1.13
    for tanh, 0.57 for sigmoid. The `lbe_alpha` of a layer should be well below: outputs
    that are spread evenly have 0.67 and 0.27. For a large batch; with `ddof=1` the
    variance, and so the bound, can be larger by N / (N - 1).

    Args:
        activation: as for a layer of Keras: a function, its name or None.
        units: how many units a softmax or sparsemax goes over, whose sum is 1: of many
            units each varies little. Has no effect on others.
        scale, offset: as for `batch_entropy`.

    Returns:
        The bound; infinity for an unbounded activation, and for functions that are none
        of Keras' own, of which nothing is known.

    Raises:
        ValueError: Keras knows no such activation, or an argument is out of its range.

    Example:

    >>> lbe_ops.max_entropy("tanh")
    1.1277...
    """
    formula = ops.check_formula(0, scale, offset)
    function = keras.activations.get(activation)
    if units is not None and not units >= 1:
        raise ValueError(f"units must be at least 1. Received: units={units!r}")
    low, high = RANGES.get(function, (-math.inf, math.inf))
    variance = ((high - low) / 2) ** 2
    if function in _SUM_IS_ONE and units is not None and units > 2:
        variance = (1 - 1 / units) / units
    return 0.5 * math.log(formula["scale"] * variance + formula["offset"])


def default_arguments(layer: Any, **formula: Any) -> dict[str, float]:
    """What the trainability map ran with; targets that suit a layer's activation."""
    alpha = UNBOUNDED
    reach = reach_of(layer, **formula)
    if reach is not None:
        alpha = DEFAULTS.get(layer.activation, math.inf)
        # Another formula may have another bound, below zero even.
        if alpha > reach.bound:
            alpha = max(0.0, SHARE_OF_BOUND * reach.bound)
    at_least = min(AT_LEAST, alpha / 4)
    return {"lbe_alpha": alpha, "lbe_alpha_min": at_least, "lbe_beta": 1.0}


@dataclasses.dataclass(frozen=True)
class Reach:
    """What the outputs of a layer can reach: a bounded activation, and the bound."""

    activation: str
    bound: float


def reach_of(
    layer: Any, *, scale: float = ops.SCALE, offset: float = ops.OFFSET, **_: Any
) -> Reach | None:
    """None for what has no bound, or none that is known.

    Of a layer class of the user's nobody knows what its `activation` is applied to.
    """
    activation = getattr(layer, "activation", None)
    package = type(layer).__module__.partition(".")[0]
    if package not in ("keras", "lbe_ops") or not _is_bounded(activation):
        return None
    units = getattr(layer, "units", getattr(layer, "filters", None))
    if getattr(layer, "data_format", None) == "channels_first":
        units = None
    bound = max_entropy(activation, units, scale=scale, offset=offset)
    return Reach(activation.__name__, bound)


def _is_bounded(activation: Any) -> bool:
    return any(activation is function for function in RANGES)


def unreachable(layers: Iterable[tuple[str, Reach | None, float]]) -> str | None:
    """What to say of layers whose target is above what their activation reaches.

    Args:
        layers: of each its name, or nothing; what it reaches; and what it is to reach.
    """
    kinds: dict[tuple[Reach, float], list[str]] = {}
    for name, reach, target in layers:
        if reach is not None and target > reach.bound:
            kinds.setdefault((reach, target), []).append(name)
    if not kinds:
        return None
    found = []
    for (reach, target), names in kinds.items():
        found.append(f"{target:g} on {reach.activation}, at most {reach.bound:.3g}")
        if names[0]:
            others = f" and {len(names) - 1} more" if names[1:] else ""
            found[-1] += f" ({names[0]!r}{others})"
    return (
        "An entropy to reach, max(|lbe_alpha|, lbe_alpha_min), is above what the "
        f"activation of its layer can have: {'; '.join(found)}. LBE pushes such layers "
        "into saturation, without end. Give them an lbe_alpha of about half of what "
        "lbe_ops.max_entropy says, or none to with_lbe or add_lbe: the default fits."
    )


@functools.cache
def warn_once(text: str) -> None:
    """Warns once in a process: a plain Keras model has hundreds of layers."""
    warnings.warn(text, stacklevel=3)
