# SPDX-License-Identifier: Apache-2.0
"""Entropies of the whole batch, where a `tf.distribute` strategy spreads it.

Replica r has n_r of the N samples, and of each unit their mean and their sum of squared
deviations from it, M2. The moments of all replicas are merged by the tree of the
kernels (`cc/batch_entropy.h`), and with `v = M2 / (N - ddof)` of the merged ones

    dH/dx_nu = scale * (x_nu - mean_u) / (U (N - ddof) (scale * v_u + offset))

holds on every replica: it needs no more than mean, v and N of the whole batch, which
the forward pass has found out. Moments of all layers go out in one all-reduce at the
end of the forward pass, and with them the compiled loss CE. Then every replica has the
same H and CE, and the same loss `L(H, CE)`. Keras adds up the gradients of `L / R` over
the R replicas, so that each has to take R times its own derivative by H: there is no
communication in the backward pass.

The moments lie in slots of a tensor `[R, ...]` that is zero elsewhere. Adding zeros is
exact, so that the all-reduce moves the very bits, in whatever order it adds up. Where
all shards have 8 * 2^k samples (and the last no more), mean, variance, H and its
gradient have the same bits as on one device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from lbe_ops import ops
from lbe_ops.recorder import Entry

# How long a replica waits for the others: they may be tracing, or writing a file.
TIMEOUT_SECONDS = 600.0
# Slots send R times the moments. Where they would be larger than this there are two
# sums instead, which are right to rounding: of n mean, and then of M2 + n (mean - that
# of all)^2.
SLOT_BYTES = 32 << 20


def replicas() -> int:
    """How many replicas share the batch here: 1 outside of what `strategy.run` runs."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def warn_of(strategy: tf.distribute.Strategy) -> None:
    """Says where a model would silently train otherwise than its user expects."""
    if keras.distribution.distribution() is not None:
        warnings.warn(
            "keras.distribution does nothing with TensorFlow: the model stays on one "
            "device. Make and compile it in the scope of a tf.distribute.Mirrored"
            "Strategy (or MultiWorkerMirroredStrategy) instead. "
            f"Received: {keras.distribution.distribution()}",
            stacklevel=3,
        )
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        warnings.warn(
            "Under a ParameterServerStrategy workers take steps of their own: each has "
            "the entropies of its own batch, and Keras 3 has no `fit` for it. Use a "
            "tf.distribute.MultiWorkerMirroredStrategy.",
            stacklevel=3,
        )


@tf.autograph.experimental.do_not_convert
def synchronize(
    entries: Sequence[Entry],
    ce: tf.Tensor,
    samples: tf.Tensor,
    *,
    by_samples: bool = False,
) -> tuple[list[Entry], tf.Tensor]:
    """Merges the moments of all layers over all replicas, in one collective.

    Every replica has to call it, with the same layers in the same order, and not in a
    condition.

    Args:
        entries: of a forward pass on this replica. What has an entropy already stays
            as it is.
        ce: the compiled loss of this replica, which Keras has divided by R; a scalar.
        samples: how many samples it is about, a scalar.
        by_samples: whether it counts by its samples, and not as much as any other's.

    Returns:
        The entries with entropies of the whole batch, and the sum of `ce` over all
        replicas, divided by R.

    Raises:
        ValueError: the shape of a layer's output is not known beforehand.
        tf.errors.OpError: another replica has failed, or was not there in time.
    """
    count = replicas()
    groups = _groups(entry for entry in entries if entry.entropy is None)
    dtypes = [ce.dtype, *(group.dtype for group in groups)]
    dtype = tf.float64 if tf.float64 in dtypes else tf.float32  # both fit exactly
    ce, samples = tf.cast(ce, dtype), tf.cast(samples, dtype)
    numbers = [tf.stop_gradient(ce * samples if by_samples else ce), samples]
    rows = _gather(numbers, groups, dtype)
    weight = tf.ones((), dtype)
    total = tf.reduce_sum(rows[:, 0]) / count
    if by_samples:
        each = tf.math.divide_no_nan(
            tf.constant(count, dtype), tf.reduce_sum(rows[:, 1])
        )
        total, weight = total * each, samples * each
    found: list[tf.Tensor] = []
    column = 2
    for group in groups:
        found.append(tf.cast(group.merge(rows[:, column:]), dtype))
        column += group.columns

    @tf.custom_gradient
    def link(ce: tf.Tensor, *counts: tf.Tensor) -> Any:
        """Values of all replicas, with gradients for what this one has to do with."""

        def gradient(ce_grad: tf.Tensor, *grads: tf.Tensor) -> tuple[tf.Tensor, ...]:
            return weight * ce_grad, *(count * grad for grad in grads)

        return (total, *found), gradient

    total, *found = link(ce, *(tf.cast(group.counts, dtype) for group in groups))
    merged = [
        Entry(entry.regularizer, entry.layer, entropy, valid, entry.moments)
        for group, entropies in zip(groups, found, strict=True)
        for entry, entropy, valid in zip(
            group.entries,
            tf.unstack(entropies),
            tf.unstack(group.valid),
            strict=True,
        )
    ]
    by_moments = {id(entry.moments): entry for entry in merged}
    return [by_moments.get(id(entry.moments), entry) for entry in entries], total


class _Group:
    """Layers whose moments one op merges: of one formula and one dtype."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.moments = [entry.moments for entry in entries]
        self.dtype = self.moments[0].mean.dtype
        # The gradients of the entropies come back through these.
        self.counts = tf.stack([each.count for each in self.moments])
        self.widths = [_width(entry) for entry in entries]
        self.columns = len(entries) + 2 * sum(self.widths)
        self.valid: tf.Tensor | None = None

    def parts(self, dtype: tf.DType) -> list[tf.Tensor]:
        """Counts `[L]`, and mean and M2 of the units of all layers."""
        means = [_flat(each.mean) for each in self.moments]
        m2s = [_flat(each.m2) for each in self.moments]
        parts = self.counts, tf.concat(means, 0), tf.concat(m2s, 0)
        return [tf.cast(tf.stop_gradient(part), dtype) for part in parts]

    def merge(self, rows: tf.Tensor) -> tf.Tensor:
        """The entropies `[L]`, of rows that begin with the parts of each replica."""
        regularizer = self.entries[0].regularizer
        merged = ops.merge_moments(
            tf.cast(rows[:, : self.columns], self.dtype),
            self.widths,
            **regularizer.formula,
            native=regularizer.native,
        )
        self.valid = tf.stop_gradient(merged.valid)
        for each, *of_batch in zip(
            self.moments,
            tf.split(merged.mean, self.widths),
            tf.split(merged.variance, self.widths),
            tf.unstack(merged.count),
            strict=True,
        ):
            each.of_batch = tuple(of_batch)
        return merged.entropy


def _groups(entries: Iterable[Entry]) -> list[_Group]:
    groups: dict[Any, list[Entry]] = {}
    for entry in entries:
        regularizer = entry.regularizer
        dtype = entry.moments.mean.dtype
        key = *regularizer.formula.values(), regularizer.native, dtype
        groups.setdefault(key, []).append(entry)
    return [_Group(group) for group in groups.values()]


def _flat(x: tf.Tensor) -> tf.Tensor:
    """All elements in a row; of hundreds of dense layers that is what there is."""
    return x if x.shape.rank == 1 else tf.reshape(x, [-1])


def _width(entry: Entry) -> int:
    """The number of units of a layer, which must be the same on all replicas."""
    width = entry.moments.mean.shape.num_elements()
    if width is None:
        raise ValueError(
            f"The output of the layer '{entry.layer}' has a shape that "
            "is not known before it is computed, and replicas may differ in it: their "
            "statistics cannot be merged. Give the model inputs of a fixed shape, or "
            "make it with synchronized=False: every replica then has the entropies of "
            f"its own samples. Received: units of shape {entry.moments.mean.shape}"
        )
    return width


def _gather(
    numbers: list[tf.Tensor], groups: list[_Group], dtype: tf.DType
) -> tf.Tensor:
    """What each replica has, or one row with what they have together.

    Args:
        numbers: two scalars, of which sums are needed only.
        groups: the layers.
        dtype: of the result.

    Returns:
        `[R or 1, 2 + columns of all groups]`.
    """
    parts = [group.parts(dtype) for group in groups]
    columns = 2 + sum(group.columns for group in groups)
    if replicas() * columns * dtype.size <= SLOT_BYTES:
        row = tf.concat([tf.stack(numbers), *sum(parts, [])], 0)
        slot = tf.distribute.get_replica_context().replica_id_in_sync_group
        return _sum(tf.scatter_nd([[slot]], [row], [replicas(), columns]))
    of_units = [
        tf.repeat(counts, group.widths)
        for group, (counts, *_) in zip(groups, parts, strict=True)
    ]
    first = [tf.stack(numbers)]
    for n, (counts, mean, _) in zip(of_units, parts, strict=True):
        first += [counts, n * mean]
    numbers, *sums = _sum_parts(first)
    second, rows = [], [numbers]
    for group, n, (_, mean, m2) in zip(groups, of_units, parts, strict=True):
        total, sum_of_units = sums[:2]
        del sums[:2]
        means = tf.math.divide_no_nan(sum_of_units, tf.repeat(total, group.widths))
        second.append(m2 + n * tf.square(mean - means))
        rows += [total, means]
    for i, m2 in enumerate(_sum_parts(second)):
        rows.insert(3 * i + 3, m2)
    return tf.concat(rows, 0)[tf.newaxis]


def _sum_parts(parts: list[tf.Tensor]) -> Sequence[tf.Tensor]:
    return tf.split(_sum(tf.concat(parts, 0)), [part.shape[0] for part in parts])


def _sum(x: tf.Tensor) -> tf.Tensor:
    """The sum over all replicas."""
    return tf.distribute.get_replica_context().all_reduce(
        tf.distribute.ReduceOp.SUM,
        x,
        tf.distribute.experimental.CommunicationOptions(
            timeout_seconds=TIMEOUT_SECONDS
        ),
    )
