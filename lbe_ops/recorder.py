# SPDX-License-Identifier: Apache-2.0
"""What the LBE layers of a training step report, for the loss of their model.

`recording()` holds a list while a step runs; every LBE layer that is called then
appends an `Entry` to it, and `LBEModel.compute_loss` makes the loss out of them. The
steps of an `LBEModel` open one by themselves.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import tensorflow as tf

from lbe_ops import keras_internals

if TYPE_CHECKING:
    from lbe_ops.ops import Moments
    from lbe_ops.regularizer import LBERegularizer


class Entry(NamedTuple):
    """One output of one LBE layer: the scalars of `ops.batch_entropy_or_zero`.

    `valid` is None where the shape says already that it is 1. Where the batch is spread
    over replicas, there are `moments`, and no entropy before `synchronize` has made it.
    A variant of LBE that is about units has their `variance` as well.
    """

    regularizer: LBERegularizer
    layer: str
    entropy: tf.Tensor | None = None
    valid: tf.Tensor | None = None
    moments: Moments | None = None
    variance: tf.Tensor | None = None


class Recording:
    """The entries of a step, or of one forward pass of a model in it.

    Args:
        always: LBE layers report whatever `training` is, and not in training only.
        model: the model whose forward pass this is, or None.
        parent: the recording of the step around it, which gets the entries as well.
        synchronized: whether layers report moments, whose entropies are made of those
            of all replicas.
    """

    def __init__(
        self,
        always: bool,
        model: keras.Model | None = None,
        parent: Recording | None = None,
        synchronized: bool = False,
    ) -> None:
        self.always = always
        self.synchronized = synchronized
        self.entries: list[Entry] = []
        # Layers that were called in another graph, where their entropies stay.
        self.elsewhere: dict[int, str] = {}
        self._model = weakref.ref(model) if model is not None else None
        self._parent = parent
        self._graph = _current_graph()
        self._differentiated = keras_internals.gradients_are_recorded()
        self._reported: dict[tuple[int, int], Any] = {}  # with what has these ids
        self._zero: tf.Tensor | None = None

    @property
    def is_forward_pass(self) -> bool:
        """Whether this is about one call of a model."""
        return self._model is not None

    def made_by(self, model: keras.Model) -> bool:
        """Whether this is about a forward pass of that very model."""
        return self._model is not None and self._model() is model

    def report(
        self,
        regularizer: LBERegularizer,
        y: tf.Tensor,
        layer: str,
        *,
        entropy: tf.Tensor | None = None,
        valid: tf.Tensor | None = None,
        moments: Moments | None = None,
        variance: tf.Tensor | None = None,
    ) -> None:
        """Appends the entropy of a layer's output.

        Args:
            regularizer: what the layer's entropy is pulled towards.
            y: the output.
            layer: the layer's name, for errors.
            entropy, valid: as `ops.batch_entropy_or_zero` returns them.
            moments: in place of both where this is `synchronized`.
            variance: of every unit, for variants that are about units.

        Raises:
            RuntimeError: the layer is inside of a block that runs again in the
                backward pass: its entropy would be without a gradient.
        """
        self._reported[id(regularizer), id(y)] = (regularizer, y)
        if _current_graph() is not self._graph:
            # Keras builds subclassed models in a scratch graph, in the middle of a
            # step; whether these entropies are missed shows when the loss is made.
            self.elsewhere[id(regularizer)] = layer
            return
        if self._differentiated and not keras_internals.gradients_are_recorded():
            raise RuntimeError(rematerialised(layer))
        if (y.shape[0] or 0) >= 2 and y.shape[1:].num_elements():
            valid = None
        entry = Entry(regularizer, layer, entropy, valid, moments, variance)
        self.entries.append(entry)

    def has_reported(self, regularizer: LBERegularizer, y: tf.Tensor) -> bool:
        """Whether there was a report about this output."""
        return (id(regularizer), id(y)) in self._reported

    def zero(self) -> tf.Tensor:
        """A loss for Keras to add to those of a layer that has reported."""
        if _current_graph() is not self._graph:
            return tf.zeros(())
        if self._zero is None:
            self._zero = tf.zeros(())
        return self._zero

    def close(self, inputs: Any, outputs: Any, kept: KeptRecordings) -> None:
        """Hands the entries to the step, and lets the outputs of the model find them.

        An entry lives as long as the outputs that it belongs to, so that it can be
        neither stale nor that of another thread.

        Args:
            inputs, outputs: of the model.
            kept: the model's, for outputs in a graph.
        """
        self._reported.clear()
        if self._parent is not None:
            if self._parent._graph is self._graph:
                self._parent.entries += self.entries
            self._parent.elsewhere.update(self.elsewhere)
        # TensorFlow does not free every graph that Keras has made: no tensor of a graph
        # may keep layers alive.
        found = self if self._graph is None else weakref.ref(self)
        kept.add(self)
        input_ids = {id(tensor) for tensor in tf.nest.flatten(inputs)}
        for output in tf.nest.flatten(outputs):
            if tf.is_tensor(output) and id(output) not in input_ids:
                output._lbe_recording = found


class KeptRecordings:
    """The forward passes of a model in the graphs that are being traced."""

    def __init__(self) -> None:
        self._recordings: list[Recording] = []

    def add(self, recording: Recording) -> None:
        """Keeps one more, and those of its graph and of the graphs around that."""
        around = list(keras_internals.with_outer_graphs(recording._graph))
        if around:
            kept = [
                each
                for each in self._recordings
                if any(each._graph is graph for graph in around)
            ]
            self._recordings = [*kept, recording]


_current: contextvars.ContextVar[Recording | None] = contextvars.ContextVar(
    "lbe_ops_recording", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Lets every LBE layer that is called in the `with` block report its entropy.

    For training loops of your own. `model.compute_loss` finds the entropies of outputs
    of `model(x, training=True)` without it; it is needed for outputs that you change
    before, and for models that you call without `training=True`. Open one for each
    loss: it has all that was reported. In it no LBE layer adds a loss of its own, in a
    plain Keras model either. It holds in this thread: open it inside of what
    `strategy.run` runs.

    Example:

    >>> with tf.GradientTape() as tape, lbe_ops.recording():
    ...     y_pred = tf.nn.softmax(model(x))
    ...     loss = model.compute_loss(x, y, y_pred)
    """
    with set_to(_current, Recording(always=True)) as opened:
        yield opened


@contextlib.contextmanager
def forward_pass(
    model: keras.Model, training: bool, synchronized: bool
) -> Iterator[Recording]:
    """Records one call of a model; all of its LBE layers where that is training."""
    step = _current.get()
    always = training or (step is not None and step.always)
    with set_to(_current, Recording(always, model, step, synchronized)) as opened:
        yield opened


@contextlib.contextmanager
def set_to(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[Any]:
    """Gives a context variable a value in the `with` block, in this thread."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def current() -> Recording | None:
    """The innermost recording that is open in this thread."""
    return _current.get()


def active(training: Any) -> Recording | None:
    """The recording that a layer which is called with this `training` reports to."""
    opened = _current.get()
    return opened if opened is not None and (opened.always or training) else None


def of_outputs(outputs: Any) -> Recording | None:
    """The forward pass that outputs of a model come from, or None."""
    for output in tf.nest.flatten(outputs):
        found = getattr(output, "_lbe_recording", None)
        if isinstance(found, weakref.ref):
            found = found()
        if found is not None:
            return found
    return None


def rematerialised(layer: str) -> str:
    """What an error says of a layer whose entropy would be without a gradient."""
    return (
        f"The LBE layer '{layer}' is called where gradients are not recorded, as "
        "inside a rematerialised block (keras.RematScope, tf.recompute_grad): its LBE "
        "would be without a gradient. Take the layer out of the block, or put LBE "
        "behind the whole block: lbe_ops.LBE()(block(x))."
    )


def _current_graph() -> tf.Graph | None:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
