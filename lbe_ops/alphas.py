# SPDX-License-Identifier: Apache-2.0
"""Where the `lbe_alpha` of every regularizer is kept, and what optimizers see of it.

To users, files and other models every `lbe_alpha` is a scalar variable. Hundreds of
them cost a training step more than the entropies do, so that an `LBEModel` keeps those
of its regularizers in one `AlphaVector`, which its loss reads and its optimizer
updates. An `Alpha` still reads and writes as a scalar then, that of its element.

A scalar moves once, into the vector of the first `LBEModel` that trains or evaluates
with it. Some never move: those that a graph has used before, which would not learn of
it, and those of distribution strategies. A vector copies these from and to their
scalars in every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

if TYPE_CHECKING:
    from lbe_ops.regularizer import LBERegularizer

ALPHA_NAME = "lbe_alpha"


class Alpha(keras.Variable):
    """One `lbe_alpha`: a float32 scalar, in mixed precision too.

    Args:
        value: its initial value.
    """

    def __init__(self, value: float) -> None:
        super().__init__(
            lambda shape, dtype: tf.constant(value, dtype, shape),
            shape=(),
            dtype="float32",
            autocast=False,
            name=ALPHA_NAME,
        )

    def _initialize(self, value: Any) -> None:
        super()._initialize(value)
        if type(self._value) is ResourceVariable:  # not of a distribution strategy
            self._value.__class__ = AlphaScalar

    @property
    def vector(self) -> tf.Variable | None:
        """What it has moved into, if it has."""
        return getattr(self._value, "vector", None)


class AlphaScalar(ResourceVariable):
    """The `tf.Variable` inside of an `Alpha`, which can become a view of an element.

    Its own memory is a copy then. `handle` brings it up to date first, and `assign`,
    `assign_add`, `assign_sub` and restoring write the element too; in a graph by
    operations of that graph. What is written in other ways is lost: through the bare
    handle, or by a `tf.function` to a variable that is its argument.
    """

    vector: tf.Variable | None = None
    _index = 0
    _in_a_graph = False  # its handle, if only for a moment

    @property
    def can_move(self) -> bool:
        """Whether nobody relies on its own memory."""
        return self.vector is None and not self._in_a_graph

    def move(self, vector: tf.Variable, index: int) -> None:
        """Lets the vector's element, which has the same value, take its place."""
        self.vector, self._index = vector, index

    @property
    def handle(self) -> tf.Tensor:
        """The resource, up to date."""
        eager = tf.executing_eagerly()
        # A plain graph is that of a SavedModel, which takes no operations.
        if eager or tf.compat.v1.get_default_graph().building_function:
            if self.vector is not None:
                self.update()
            elif not eager:
                self._in_a_graph = True
        return self._handle

    def update(self) -> None:
        """Copies the element into the scalar's own memory."""
        # Without the methods of tf.Variable, which would tell gradient tapes. They also
        # tell the graph, and files of exported functions have what a graph knows of.
        if not tf.executing_eagerly():
            tf.compat.v1.get_default_graph().watch_variable(self.vector)
        vector = tf.raw_ops.ReadVariableOp(
            resource=self.vector.handle, dtype=self.dtype
        )
        tf.raw_ops.AssignVariableOp(resource=self._handle, value=vector[self._index])

    def own_value(self) -> tf.Tensor:
        """What is in its own memory: the element at the last `update`."""
        return tf.raw_ops.ReadVariableOp(resource=self._handle, dtype=self.dtype)

    def _pass_on(self, value: tf.Tensor) -> None:
        if self.vector is not None:
            tf.raw_ops.ResourceStridedSliceAssign(
                ref=self.vector.handle,
                begin=[self._index],
                end=[self._index + 1],
                strides=[1],
                value=tf.reshape(value, [1]),
            )

    def assign(
        self, value: Any, *args: Any, read_value: bool = True, **kwargs: Any
    ) -> Any:
        value = tf.convert_to_tensor(value, self.dtype)
        operation = super().assign(value, *args, read_value=False, **kwargs)
        self._pass_on(value)
        return self if read_value else operation

    def assign_add(self, *args: Any, read_value: bool = True, **kwargs: Any) -> Any:
        operation = super().assign_add(*args, read_value=False, **kwargs)
        self._pass_on(self.own_value())
        return self if read_value else operation

    def assign_sub(self, *args: Any, read_value: bool = True, **kwargs: Any) -> Any:
        operation = super().assign_sub(*args, read_value=False, **kwargs)
        self._pass_on(self.own_value())
        return self if read_value else operation

    def _restore_from_tensors(self, restored_tensors: Any) -> Any:
        operation = super()._restore_from_tensors(restored_tensors)
        self._pass_on(self.own_value())
        return operation


class _KeepFixed(keras.constraints.Constraint):
    """Undoes what an update did to alphas that are not trainable.

    Momentum moves what has no gradient. Optimizers update the `tf.Variable` inside of
    a `keras.Variable`; where there is a constraint, they then assign to the outer one
    what it makes of the new value, so that `AlphaVector.assign` is called, too.
    """

    def __init__(self, vector: AlphaVector) -> None:
        self._vector = vector

    def __call__(self, w: Any) -> Any:
        return _with_elements(w, self._vector.fixed())


class AlphaVector(keras.Variable):
    """The `lbe_alpha` of several regularizers as one variable `[L]`.

    Elements whose `lbe_alpha` is not trainable get no gradient, and no optimizer moves
    them. Those of scalars that did not move here count from the beginning to the end
    of a step only. Checkpoints hold the scalars.

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
        self._settled = False
        self._here: list[int] = []  # those that have moved here
        self._elsewhere = list(range(len(self._scalars)))  # and all others
        self.constraint = _KeepFixed(self)

    def stands_for(self, regularizers: Sequence[LBERegularizer]) -> bool:
        """Whether it has the alphas of all these regularizers."""
        return all(id(each.lbe_alpha) in self._index for each in regularizers)

    def in_place_of_scalars(self, variables: Sequence[Any]) -> list[Any]:
        """The variables with the vector, at the end, for the scalars among them."""
        others = [v for v in variables if id(v) not in self._index]
        if len(others) == len(variables):
            return others
        if not self._settled and tf.executing_eagerly():
            super().assign(self._current())  # for who reads it before the first step
        return [*others, self]

    def for_training(self, regularizers: Sequence[LBERegularizer]) -> tf.Tensor:
        """The alphas of these regularizers, differentiable by the vector.

        A regularizer may occur more than once, or not at all.
        """
        self._settle()
        trainable = [scalar.trainable for scalar in self._scalars]
        for i in self._here:
            if not trainable[i]:
                self._scalars[i]._value.update()
        if self._elsewhere:
            super().assign(self._current())
        alphas = tf.convert_to_tensor(self.value)
        if not all(trainable):
            alphas = tf.where(trainable, alphas, tf.stop_gradient(alphas))
        return self._select(alphas, regularizers)

    def for_evaluation(self, regularizers: Sequence[LBERegularizer]) -> tf.Tensor:
        """The alphas of these regularizers, in a graph that assigns nothing."""
        self._settle()
        return self._select(self._current(), regularizers)

    def fixed(self) -> dict[int, tf.Tensor]:
        """The alphas that are not trainable, as at the beginning of the step."""
        values = {
            i: self._scalars[i]._value.own_value()
            for i in self._here
            if not self._scalars[i].trainable
        }
        for i in self._elsewhere:
            if not self._scalars[i].trainable:
                values[i] = tf.convert_to_tensor(self._scalars[i].value)
        return values

    def assign(self, value: Any) -> Any:
        """Sets the vector, and with it every scalar."""
        value = keras.ops.convert_to_tensor(value, dtype=self.dtype)
        super().assign(value)

        def pass_on(strategy: tf.distribute.Strategy, elements: list[Any]) -> None:
            for i in self._elsewhere:
                variable = self._scalars[i].value
                if tf.distribute.has_strategy():
                    strategy.extended.update(
                        variable, _assign, args=(elements[i],), group=False
                    )
                else:
                    variable.assign(elements[i])

        if self._elsewhere:
            _for_all_replicas(pass_on, tf.unstack(value))
        return value

    def _settle(self) -> None:
        """Lets the scalars that can move here; once, and not before a step needs it."""
        if self._settled:
            return
        self._settled = True
        if isinstance(self._value, tf.distribute.DistributedValues):
            return
        inner = [scalar._value for scalar in self._scalars]
        here = [
            i
            for i, scalar in enumerate(inner)
            if isinstance(scalar, AlphaScalar) and scalar.can_move
        ]
        if not here:
            return
        with tf.init_scope():
            super().assign(tf.stack(inner))
        for i in here:
            inner[i].move(self._value, i)
        self._here, self._elsewhere = here, sorted({*self._elsewhere} - {*here})

    def _current(self) -> tf.Tensor:
        copies = {
            i: tf.convert_to_tensor(self._scalars[i].value) for i in self._elsewhere
        }
        return _with_elements(tf.convert_to_tensor(self.value), copies)

    def _serialize_to_tensors(self) -> dict[str, Any]:
        return {}

    def _restore_from_tensors(self, restored_tensors: Any) -> None:
        pass

    def _select(
        self, alphas: tf.Tensor, regularizers: Sequence[LBERegularizer]
    ) -> tf.Tensor:
        scalars = [each.lbe_alpha for each in regularizers]
        indices = [self._index.get(id(scalar)) for scalar in scalars]
        if indices == list(range(len(self._scalars))):
            return alphas
        # tf.gather would make the gradient sparse, which optimizers treat otherwise.
        elements = tf.unstack(alphas)
        return tf.stack(
            [
                # As other weights of layers that the model does not track: fixed.
                tf.convert_to_tensor(scalar.value) if i is None else elements[i]
                for i, scalar in zip(indices, scalars, strict=True)
            ]
        )


def _with_elements(vector: Any, values: dict[int, tf.Tensor]) -> Any:
    """The vector with other values of some elements."""
    if not values:
        return vector
    elements = tf.unstack(vector)
    for i, value in values.items():
        elements[i] = value
    return tf.stack(elements)


def _assign(variable: tf.Variable, value: tf.Tensor) -> None:
    variable.assign(value)


def _for_all_replicas(function: Callable[..., Any], *args: Any) -> Any:
    """function(strategy, *args) once for all replicas, whichever of them call this."""
    replica = tf.distribute.get_replica_context()
    if replica is None:
        return function(tf.distribute.get_strategy(), *args)
    return replica.merge_call(function, args)
