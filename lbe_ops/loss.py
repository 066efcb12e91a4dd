# SPDX-License-Identifier: Apache-2.0
"""`LBELoss`: the LBE of all layers of a model at once, and the weight of their alphas.

Hundreds of scalars cost an optimizer more than the entropies do: under Adam one more
scalar is 46 operations of a step. So the alphas of an `LBEModel` are one weight `[L]`,
and their loss is a few operations on vectors.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lbe_ops.keras_internals import flatten_layers
from lbe_ops.recorder import Entry
from lbe_ops.regularizer import ALPHA_NAME, LBERegularizer, lbe_losses


def find_regularizers(
    model: keras.layers.Layer,
) -> dict[LBERegularizer, list[keras.layers.Layer]]:
    """Every LBE regularizer in a model, nested ones included, with its layers.

    In the order of the layers; each once, with all layers that it regularizes. One
    that a layer of the user's calls by itself has none.
    """
    found: dict[LBERegularizer, list[keras.layers.Layer]] = {}
    for layer in flatten_layers(model):
        if isinstance(layer, LBERegularizer):
            found.setdefault(layer, [])
        regularizer = getattr(layer, "activity_regularizer", None)
        if isinstance(regularizer, LBERegularizer):
            found.setdefault(regularizer, []).append(layer)
    return found


class LBELoss(keras.layers.Layer):
    """The mean and the maximum of LBE over layers; owns the alphas of an `LBEModel`.

    `adopt` makes the weight out of the scalars of the regularizers, which show its
    elements from then on. What cannot move stays where it is, and is shared, as Keras
    shares weights: the elements of another `LBEModel` that has the same layers, and
    the scalars of layers that were added later. The gradient reaches all of them.

    Files hold the alpha of every regularizer by itself, so that it does not matter in
    which weight a model keeps it.

    Args:
        regularizers: returns the regularizers of the model, each with its layers.
        name: of the layer.

    Attributes:
        alphas: the weight `[L]`, float32 (float64 if all layers with LBE are float64);
            None before `adopt`, and where all alphas belong to other models.
    """

    def __init__(
        self, regularizers: Callable[[], dict[LBERegularizer, list[Any]]], name: str
    ) -> None:
        super().__init__(name=name, dtype="float32")
        self._regularizers = regularizers
        self.adopted = False
        self.alphas: keras.Variable | None = None
        self._listed = True  # whether `freeze` has left `alphas` trainable
        self.shared: list[keras.Variable] = []
        self.checkpointed = tf.Module()  # checkpoints do not look into Keras' lists
        self.built = True

    def adopt(self) -> None:
        """Takes the alphas of the model in; once, when its layers are there."""
        if self.adopted:
            return
        self.adopted = True
        found = self._regularizers()
        regularizers = list(found)
        scalars = [each for each in regularizers if each.lbe_alpha.index is None]
        own = [each for each in scalars if not each.lbe_alpha.in_a_graph]
        if len(own) < len(scalars):
            warnings.warn(
                f"The alphas of {len(scalars) - len(own)} of {len(regularizers)} LBE "
                "layers are in the graph of a plain Keras model (or of a tf.function) "
                "already: they stay weights of their layers, which makes training "
                "slower. Make the LBEModel before the plain one is used.",
                stacklevel=2,
            )
        self._share(each for each in regularizers if each.lbe_alpha.index is not None)
        if not own:
            return
        first = [each.lbe_alpha.value_of_scalar() for each in own]
        # TensorFlow's strategies add up gradients of one dtype only.
        dtypes = {layer.variable_dtype for layers in found.values() for layer in layers}
        dtype = "float64" if dtypes == {"float64"} else "float32"
        with tf.init_scope():
            self.alphas = self.add_weight(
                name=ALPHA_NAME,
                shape=(len(own),),
                # Called when the scalars have their values, if they are new as well.
                initializer=lambda shape, dtype: tf.cast(
                    tf.stack([read() for read in first]), dtype
                ),
                dtype=dtype,
                autocast=False,
                # All replicas have the same, and assign it in every step.
                aggregation="only_first_replica",
            )
        for index, regularizer in enumerate(own):
            regularizer.move_alpha(self.alphas, index)
        self.freeze()

    def _share(self, regularizers: Iterable[LBERegularizer]) -> None:
        """Tracks alphas that are kept elsewhere, as weights of this model too."""
        for each in regularizers:
            variable = each.lbe_alpha.variable
            if not any(variable is other for other in [*self.shared, self.alphas]):
                self.shared.append(variable)
        self.checkpointed.shared = list(self.shared)

    def freeze(self) -> None:
        """Lists a weight as trainable if one of its alphas is; as Keras, at `compile`.

        Layers that were built when LBE was put on them are looked for again, since
        Keras does not track their regularizers.
        """
        trainable = self._which_train()
        if self.adopted:
            self._share(each for each in trainable if each.on_built_layer)
        for vector in self._vectors():
            thawed = any(
                value
                for regularizer, value in trainable.items()
                if regularizer.lbe_alpha.variable is vector
            )
            if vector is not self.alphas:
                vector.trainable |= thawed
            elif vector.trainable == self._listed:  # or the user has said otherwise
                vector.trainable = self._listed = self.trainable and thawed

    def _vectors(self) -> list[keras.Variable]:
        """The weights of several alphas: that of this model and those it shares."""
        own = [] if self.alphas is None else [self.alphas]
        return own + [each for each in self.shared if each.shape]

    def mean_and_max(
        self, entries: Sequence[Entry], dtype: Any
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean and maximum of LBE over the entries of a step: two scalars of dtype.

        An entry may occur more than once, and a regularizer not at all. What is not
        trainable gets no gradient.
        """
        if not entries:
            return tf.zeros((), dtype), tf.zeros((), dtype)
        losses = self._each(entries, dtype)
        return tf.reduce_mean(losses), tf.reduce_max(losses)

    def total(self, entries: Sequence[Entry]) -> tf.Tensor:
        """The sum of LBE over the entries, as a model that is no `LBEModel` adds it."""
        return tf.reduce_sum(self._each(entries, entries[0].entropy.dtype))

    def _each(self, entries: Sequence[Entry], dtype: Any) -> tf.Tensor:
        regularizers = [entry.regularizer for entry in entries]
        alphas = self._alphas_of(regularizers, dtype)
        if any(each.on_units for each in regularizers):
            losses = tf.stack(
                [
                    entry.regularizer.lbe(entry.entropy, entry.variance, alpha)
                    for entry, alpha in zip(entries, tf.unstack(alphas), strict=True)
                ]
            )
        else:
            losses = lbe_losses(
                tf.stack([tf.cast(entry.entropy, dtype) for entry in entries]),
                alphas,
                [each.lbe_alpha_min for each in regularizers],
                [each.lbe_beta for each in regularizers],
                [each.variant == "one_sided" for each in regularizers],
            )
        if any(entry.valid is not None for entry in entries):
            losses *= tf.stack(
                [
                    tf.ones((), dtype) if e.valid is None else tf.cast(e.valid, dtype)
                    for e in entries
                ]
            )
        return losses

    def _alphas_of(
        self, regularizers: list[LBERegularizer], dtype: tf.DType
    ) -> tf.Tensor:
        """The present alphas of these regularizers, `[len(regularizers)]`."""
        kept = [each.lbe_alpha for each in regularizers]
        if self.alphas is not None and (
            [each.index for each in kept] == list(range(self.alphas.shape[0]))
            and all(each.variable is self.alphas for each in kept)
        ):
            alphas = tf.cast(self.alphas.value, dtype)
        else:
            # tf.gather would make the gradient sparse, which optimizers treat
            # otherwise.
            vectors = {id(a.variable): a.variable for a in kept if a.index is not None}
            elements = {
                key: tf.unstack(tf.cast(v.value, dtype)) for key, v in vectors.items()
            }
            alphas = tf.stack(
                [
                    tf.cast(each.value, dtype)
                    if each.index is None
                    else elements[id(each.variable)][each.index]
                    for each in kept
                ]
            )
        trainable = self._which_train()
        mask = [trainable.get(each, each.trainable) for each in regularizers]
        return alphas if all(mask) else tf.where(mask, alphas, tf.stop_gradient(alphas))

    def _which_train(self) -> dict[LBERegularizer, bool]:
        """Which alphas are trainable: those of frozen layers are not."""
        return {
            regularizer: regularizer.trainable and all(x.trainable for x in layers)
            for regularizer, layers in self._regularizers().items()
        }

    @contextlib.contextmanager
    def frozen_alphas_kept(self) -> Iterator[None]:
        """Undoes what a step does to alphas that are not trainable.

        Momentum moves what has no gradient, and an optimizer knows the whole weight.
        """
        trainable = self._which_train()
        kept = []
        for vector in self._vectors():
            mask = np.ones(vector.shape, bool)
            for regularizer, value in trainable.items():
                if regularizer.lbe_alpha.variable is vector:
                    mask[regularizer.lbe_alpha.index] = value
            if vector.trainable and not mask.all():
                kept.append((vector, mask, tf.identity(vector.value)))
        yield
        for vector, mask, before in kept:
            vector.assign(tf.where(mask, vector.value, before))

    def save_own_variables(self, store: Any) -> None:
        """Writes nothing: every regularizer writes its own alpha, wherever that is."""

    def load_own_variables(self, store: Any) -> None:
        """Reads nothing, for the same reason."""
