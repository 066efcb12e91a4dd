# SPDX-License-Identifier: Apache-2.0
"""`diagnose`: which illness keeps a deep net from training, and what cures it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lbe_ops.layers import Selection
from lbe_ops.measure import GRADIENT, Probe, as_tensors, weighted_layers

# Thresholds, between what trained and what did not in the map of trainability
# (benchmarks/results/map): dense nets of 64 units, 10 to 100 layers, of all activations
# but GELU, whose nets were kept to check them. diagnosis.md there counts how often they
# are right.
#
# The batch has lost its scale where its deviation from its mean has fallen to this
# share of the largest of any layer. Did not train: sigmoid, 10 layers, 2.2e-4; trained:
# ReLU, Glorot, 20 layers, 6.3e-4.
SCALE_GONE = 4e-4
# Nor does a net learn where the gradient of the first layer is this share of the last:
# the same nets, 7e-5 and 0.011.
GRADIENT_GONE = 1e-3
# The rank is gone where it is below RANK_GONE, and has lost this share of what it had
# above 1. A net trains all the same unless that many layers follow: tanh, 39, trained;
# ReLU, 55, did not.
RANK_GONE = 2.0
RANK_LOST = 0.9
LAYERS_WITHOUT_RANK = 45
# It explodes where the root mean square has grown by this factor since the first layer
# (linear nets, 2e7, trained with clipped gradients, which is the remedy),
SCALE_EXPLODES = 1e4
# or the gradient, by its exponential trend over the layers, grows by this factor on its
# way back: tanh, 47, trained, 131 did not; of nets with normalization, which train, the
# most is 32 (ResNet50).
GRADIENT_EXPLODES = 60.0
# A layer adds little to a gradient: in nets with fewer layers than this one, a trend
# says that they differ in size.
DEEP = 10
# How many layers a table has at most.
ROWS = 20

FINE = "fine"
REMEDIES = {
    "scale gone": (
        "Start from kernels of the right gain: looks-linear ones "
        "(lbe_ops.initializers.LooksLinear) for relu, gelu and silu, and with "
        "gain=2.2 for sigmoid; Orthogonal(gain=1) with zero biases for tanh, "
        "lecun_normal for selu. Or train with LBE (lbe_ops.add_lbe), where weights "
        "cannot be made anew or no gain is known: it has trained most gelu and relu "
        "nets of 50 layers, but none of sigmoid."
    ),
    "rank gone": (
        "All samples have become multiples of one direction, which no gain of an "
        "initializer cures, and an entropy does not show. For relu, gelu and silu "
        "start looks-linear (lbe_ops.initializers.LooksLinear), for tanh from "
        "orthogonal kernels at the critical gain 1 with zero biases; or add skip "
        "connections, or normalization. LBE (lbe_ops.add_lbe) helps relu a little, and "
        "gelu without training it in full."
    ),
    "exploding": (
        "Take a smaller gain of the initializer (for tanh: orthogonal, gain 1; for "
        "relu: he_normal, not more), clip gradients (global_clipnorm=1), or both. "
        "LBE does not help."
    ),
    FINE: "Nothing to cure.",
}


@dataclasses.dataclass(frozen=True)
class LayerHealth:
    """What `lbe_ops.measure.Probe` says of one layer.

    gradient_norm is None where it was not measured, or the layer has no gradient.
    """

    name: str
    batch_entropy: float
    effective_rank: float
    mean_cosine: float
    rms: float
    deviation: float
    dead_share: float
    gradient_norm: float | None = None


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a net; `str()` of it is the table and the text.

    Attributes:
        layers: every layer measured, in the order of the forward pass.
        illness: "scale gone", "rank gone", "exploding" or "fine".
        evidence: the numbers that say so, and what was not measured.
        remedy: what to do.
    """

    layers: list[LayerHealth]
    illness: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        """A table of at most `ROWS` layers, evenly spread; illness and remedy."""
        chosen = np.linspace(0, len(self.layers) - 1, min(ROWS, len(self.layers)))
        shown = [int(i) for i in chosen.round()]
        width = max(len("layer"), *(len(self.layers[i].name) for i in shown))
        titles = ("H", "rank", "cosine", "rms", "deviation", "dead", "gradient")
        lines = [f"{'':>4} {'layer':{width}}" + "".join(f"{t:>11}" for t in titles)]
        for i in shown:
            name, *values = dataclasses.astuple(self.layers[i])
            cells = ["-" if value is None else f"{value:.3g}" for value in values]
            lines.append(
                f"{i + 1:4} {name:{width}}" + "".join(f"{c:>11}" for c in cells)
            )
        if len(shown) < len(self.layers):
            lines.append(f"({len(shown)} of {len(self.layers)} layers)")
        return "\n".join(
            [*lines, f"{self.illness}: {self.evidence}", f"Remedy: {self.remedy}"]
        )


def diagnose(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    layers: Selection | None = None,
    print_fn: Callable[[str], Any] | None = print,
) -> Diagnosis:
    """Looks at a batch on its way through a net, and says what is wrong, if anything.

    - scale gone: the samples have become the same, or their gradients nothing;
    - rank gone: they differ, but along one line only;
    - exploding: activations or gradients grow over decades, or are not finite;
    - fine: none of these, as far as could be measured.

    Meant for a net before it is trained, or one that does not train: that a net which
    tells two classes apart has a rank of 1 in the end is no illness. The forward pass
    is that of training (BatchNormalization takes the statistics of the batch), run
    eagerly; the model stays as it was. The last layer, as a rule the head, is not
    judged. Thresholds stand at the top of `lbe_ops/diagnose.py`.

    Args:
        model: any Keras model.
        x: inputs for at least two samples, some 100 to 500.
        y: their targets, for the gradients of the compiled loss (without LBE). Without
            them, gradients that explode are not found.
        layers: which layers, as for `add_lbe`; None takes every layer with a kernel.
        print_fn: called with the table; None prints nothing.

    Returns:
        A `Diagnosis`.

    Raises:
        ValueError: no layer has a kernel or matches; y without a compiled loss, or of
            another number of samples.
        TypeError: x is a data set, not a batch of one.
        tf.errors.InvalidArgumentError: fewer than two samples.

    Example:

    >>> lbe_ops.diagnose(model, x_train[:512], y_train[:512], print_fn=None).illness
    'rank gone'
    """
    if isinstance(x, tf.data.Dataset):
        raise TypeError(
            "x must be an array or a batch: x, y = next(iter(dataset)) takes one of a "
            f"data set with targets. Received: {type(x).__name__}"
        )
    x = as_tensors(x)
    if not model.built:
        model(x)
    if layers is None:
        layers = weighted_layers(model)
    probe = Probe(model, x, layers, targets=y, training=True, compiled=False)
    measured = probe()
    columns = {name: values.tolist() for name, values in measured.items()}
    if GRADIENT in columns:
        columns[GRADIENT] = [
            norm if exists else None
            for norm, exists in zip(columns[GRADIENT], probe.has_gradient, strict=True)
        ]
    rows = [
        LayerHealth(name, **dict(zip(columns, values, strict=True)))
        for name, *values in zip(probe.names, *columns.values(), strict=True)
    ]
    illness, evidence = _judge(rows)
    if y is None:
        evidence += ". Gradients were not measured: that takes targets (y)"
    diagnosis = Diagnosis(rows, illness, f"{evidence}.", REMEDIES[illness])
    if print_fn is not None:
        print_fn(str(diagnosis))
    return diagnosis


def _judge(rows: list[LayerHealth]) -> tuple[str, str]:
    """The illness and the evidence for it."""
    for row in rows:
        gradient = row.gradient_norm or 0.0
        if not (math.isfinite(row.rms) and math.isfinite(gradient)):
            what = "gradient" if math.isfinite(row.rms) else "output"
            return "exploding", f"the {what} of '{row.name}' is not finite"
    judged = rows[:-1] or rows
    first, last = judged[0], judged[-1]
    if last.rms > SCALE_EXPLODES * first.rms > 0:
        return "exploding", (
            f"the root mean square of the outputs grows from {first.rms:.2g} to "
            f"{last.rms:.2g}"
        )
    *gradients, head = [
        row.gradient_norm for row in rows if row.gradient_norm is not None
    ] or [0.0]
    deep = len(judged) >= DEEP
    growth = growth_backwards(gradients)
    if deep and growth > GRADIENT_EXPLODES:
        return "exploding", (
            f"the gradient grows backwards by a factor of {growth:.2g}, to "
            f"{max(gradients):.2g}"
        )
    widest = max(row.deviation for row in judged)
    if last.deviation <= SCALE_GONE * widest:
        gone = next(row for row in judged if row.deviation <= SCALE_GONE * widest)
        return "scale gone", (
            f"the deviation of the samples from their mean falls from {widest:.2g} to "
            f"{last.deviation:.2g}; '{gone.name}' is the first below {SCALE_GONE:g} of "
            "the largest"
        )
    # All of them are 0 behind a head that starts from zeros.
    if any(gradients) and gradients[0] < GRADIENT_GONE * head:
        return "scale gone", (
            f"the gradient falls backwards, from {head:.2g} in the last layer to "
            f"{gradients[0]:.2g} in the first"
        )
    ranks = [row.effective_rank for row in judged]
    without = layers_without_rank(ranks)
    if without > LAYERS_WITHOUT_RANK:
        return "rank gone", (
            f"the effective rank falls from {max(ranks):.3g} to {ranks[-1]:.3g} (mean "
            f"cosine {last.mean_cosine:.3g}); it is gone from "
            f"'{judged[-without].name}' on, for {without} layers"
        )
    return FINE, (
        f"from the first layer to '{last.name}' the deviation goes from "
        f"{first.deviation:.2g} to {last.deviation:.2g}, the effective rank from "
        f"{ranks[0]:.3g} to {ranks[-1]:.3g}"
        + (
            f"; it is gone for {without} layers, which was not too many"
            if without
            else ""
        )
    )


def layers_without_rank(ranks: list[float]) -> int:
    """How many layers there are from the first on behind which no rank comes back."""
    limit = min(RANK_GONE, 1 + (1 - RANK_LOST) * (max(ranks) - 1))
    kept = [place for place, rank in enumerate(ranks, 1) if rank >= limit]
    return len(ranks) - max(kept, default=0)


def growth_backwards(gradients: list[float]) -> float:
    """By which factor an exponential through the norms grows, from last to first."""
    layer, norm = np.arange(len(gradients)), np.asarray(gradients)
    layer, norm = layer[norm > 0], norm[norm > 0]
    if len(norm) < 2:
        return 1.0
    slope, _ = np.polyfit(layer, np.log(norm), 1)
    return math.exp(-slope * (len(gradients) - 1))
