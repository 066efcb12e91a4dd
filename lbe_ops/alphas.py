# SPDX-License-Identifier: Apache-2.0
"""`AlphaVector`: what the optimizer of an `LBEModel` sees in place of its alphas.

Every regularizer keeps its `lbe_alpha`, a scalar variable: that is where the value
is, for files, for the user, for other models and functions that were traced before.
One vector stands for all of them during a step, because hundreds of scalar updates
(and their slots) cost more than the entropies:

    refresh    vector <- scalars         (before the loss is made)
    loss       reads the vector          (one gradient, one update)
    assign     vector and scalars <- new (after the update, which Keras sees to)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from lbe_ops.regularizer import ALPHA_NAME, LBERegularizer


class _Unchanged(keras.constraints.Constraint):
    """Has `AlphaVector.assign` called after every update.

    Optimizers update the `tf.Variable` inside of a `keras.Variable`. Where there is a
    constraint, they then assign to the outer one what it makes of the new value.
    """

    def __call__(self, w: Any) -> Any:
        return w


class AlphaVector(keras.Variable):
    """The `lbe_alpha` of several regularizers as one variable `[L]`.

    Its own value counts from `refresh` to the end of the step only. Elements whose
    `lbe_alpha` is not trainable get no gradient, and no optimizer moves them.

    Args:
        regularizers: whose alphas; each once.
    """

    @classmethod
    def make(
        cls, regularizers: Sequence[LBERegularizer], strategy: tf.distribute.Strategy
    ) -> AlphaVector:
        """A vector for a model of that strategy, whoever asks for it first.

        That may be a function being traced, and each replica in it.
        """

        def create(_: tf.distribute.Strategy) -> AlphaVector:
            with contextlib.ExitStack() as scopes:
                scopes.enter_context(tf.init_scope())
                if not tf.distribute.has_strategy():
                    scopes.enter_context(strategy.scope())
                return cls(regularizers)

        return _for_all_replicas(create)

    def __init__(self, regularizers: Sequence[LBERegularizer]) -> None:
        super().__init__(
            "zeros",
            shape=(len(regularizers),),
            dtype="float32",
            autocast=False,
            aggregation="only_first_replica",  # they all have the same
            name=f"{ALPHA_NAME}s",
        )
        self._scalars = [regularizer.lbe_alpha for regularizer in regularizers]
        self._index = {id(scalar): i for i, scalar in enumerate(self._scalars)}
        self.constraint = _Unchanged()

    def stands_for(self, regularizers: Sequence[LBERegularizer]) -> bool:
        """Whether it has the alphas of all these regularizers."""
        return all(id(each.lbe_alpha) in self._index for each in regularizers)

    def in_place_of_scalars(self, variables: Sequence[Any]) -> list[Any]:
        """The variables with the vector, at the end, for the scalars among them."""
        others = [v for v in variables if id(v) not in self._index]
        return others if len(others) == len(variables) else [*others, self]

    def assign(self, value: Any) -> Any:
        """Sets the vector, and the scalars that are trainable."""
        value = keras.ops.convert_to_tensor(value, dtype=self.dtype)
        super().assign(value)

        def pass_on(strategy: tf.distribute.Strategy, elements: list[Any]) -> None:
            for scalar, element in zip(self._scalars, elements, strict=True):
                if scalar.trainable:
                    strategy.extended.update(
                        scalar.value, _assign, args=(element,), group=False
                    )

        _for_all_replicas(pass_on, tf.unstack(value))
        return value

    def refresh(self) -> None:
        """Sets the vector to what the scalars are now."""
        super().assign(tf.stack([scalar.value for scalar in self._scalars]))

    def select(self, regularizers: Sequence[LBERegularizer]) -> tf.Tensor:
        """The alphas of these regularizers, differentiable by the vector.

        A regularizer may occur more than once, or not at all.
        """
        alphas = tf.convert_to_tensor(self.value)
        trainable = [scalar.trainable for scalar in self._scalars]
        if not all(trainable):
            alphas = tf.where(trainable, alphas, tf.stop_gradient(alphas))
        indices = [self._index[id(each.lbe_alpha)] for each in regularizers]
        if indices == list(range(len(self._scalars))):
            return alphas
        # tf.gather would make the gradient sparse, which optimizers treat otherwise.
        elements = tf.unstack(alphas)
        return tf.stack([elements[i] for i in indices])


def _assign(variable: tf.Variable, value: tf.Tensor) -> None:
    variable.assign(value)


def _for_all_replicas(function: Callable[..., Any], *args: Any) -> Any:
    """function(strategy, *args) once for all replicas, whichever of them call this."""
    replica = tf.distribute.get_replica_context()
    if replica is None:
        return function(tf.distribute.get_strategy(), *args)
    return replica.merge_call(function, args)
