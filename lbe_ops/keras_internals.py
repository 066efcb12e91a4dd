# SPDX-License-Identifier: Apache-2.0
"""Every private name of Keras and TensorFlow that this package uses, and why.

No other file may use one; `tests/test_keras_internals.py` looks for them. Each function
says what the name buys, and what happens with a Keras or TensorFlow that lacks it.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf


def flatten_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Every layer inside of `layer`, whatever their nesting, without `layer`; in order.

    `Layer._flatten_layers`: there is no public way into a layer that is no model.
    Without it, layers inside of such layers are not found: they count as untracked.
    """
    found: dict[int, keras.layers.Layer] = {}

    def visit(layer: keras.layers.Layer) -> None:
        if hasattr(layer, "_flatten_layers"):
            inside = layer._flatten_layers(include_self=False, recursive=False)
        else:
            inside = getattr(layer, "layers", [])
        for each in inside:
            if id(each) not in found:
                found[id(each)] = each
                visit(each)

    visit(layer)
    return list(found.values())


def described_by_constructor(get_config: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a `get_config` that keeps Keras' own description of a constructor.

    `Layer.get_config` describes a subclass by the arguments that it was made with,
    unless a class in between has a `get_config` without the mark `_is_default`.
    Without the mark, subclasses that take arguments need a `get_config` of their own.
    """
    get_config._is_default = True
    return get_config


def exclude_from_weight_decay(optimizer: Any, name: str) -> None:
    """Adds a name to what the weight decay of an optimizer leaves alone already.

    The public `exclude_from_weight_decay` replaces what was excluded before, and is not
    for optimizers that are built. What they exclude stands in
    `_exclude_from_weight_decay`, `_exclude_from_weight_decay_pattern` and a cache of
    both, `_exclude_from_weight_decay_cache`. Without these names, what the user has
    excluded before `compile` is replaced, and an optimizer that is built decays alphas.
    """
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    if pattern is not None and pattern.search(name):
        return
    names = [name, *([] if pattern is None else [pattern.pattern])]
    if not optimizer.built:
        variables: set[Any] = getattr(optimizer, "_exclude_from_weight_decay", set())
        optimizer.exclude_from_weight_decay(var_names=names)
        optimizer._exclude_from_weight_decay = variables
    else:
        optimizer._exclude_from_weight_decay_pattern = re.compile("|".join(names))
        optimizer._exclude_from_weight_decay_cache = {}


def in_scratch_graph() -> bool:
    """Whether Keras only infers shapes here, in a graph that it throws away.

    It names such a graph `scratch_graph`. Where it does not, alphas that are read in
    one stay weights of their layers, which makes training slower.
    """
    return any(
        str(getattr(graph, "name", "")).startswith("scratch_graph")
        for graph in with_outer_graphs(tf.compat.v1.get_default_graph())
    )


def with_outer_graphs(graph: tf.Graph | None) -> Iterator[tf.Graph]:
    """A graph and those that it is being traced in, from the inside out."""
    while graph is not None:
        yield graph
        graph = getattr(graph, "outer_graph", None)


def compiled_by_xla() -> bool:
    """Whether the function that is being traced will be compiled by XLA.

    `control_flow_util.GraphOrParentsInXlaContext` finds that out before the op, which
    XLA cannot compile where `libxla_ops.so` is missing, is in the graph. Without it,
    such a function fails when it runs, and says that there is no kernel for the op.
    """
    module = _module("tensorflow.python.ops.control_flow_util")
    if module is None or tf.executing_eagerly():
        return False
    return module.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def gradients_are_recorded() -> bool:
    """Whether a gradient tape watches what runs now; True where nobody knows.

    `record.could_possibly_record` is False without a tape, and inside of blocks that
    run again in the backward pass. Without it, LBE inside of such a block has no
    gradient, and nobody says so.
    """
    record = _module("tensorflow.python.eager.record")
    return record is None or record.could_possibly_record()


def call_with_gradient(
    call: Callable[[], Any],
    inputs: list[tf.Tensor],
    differentiable: tuple[str, ...],
    gradient: Callable[..., list[tf.Tensor]],
    *,
    registered: bool = True,
) -> Any:
    """The outputs of an op; gradient tapes know those that have a gradient only.

    For every other output of an op that a tape sees itself, TensorFlow makes a
    gradient of zeros in every step: three more nodes for each of hundreds of layers
    (a `Dense_LBE` in a step of Adam: 90 for 87). `tensorflow.python.eager.record` tells
    the tape what to do instead. Without it, in functions that are differentiated as a
    whole, and in forward mode (`forwardprop_util`), TensorFlow takes the op and its
    registered gradient, which are the same but for these zeros; or
    `tf.custom_gradient`, with two more nodes, where there is no registered one.

    Args:
        call: calls the op, and returns its outputs as a named tuple.
        inputs: what the gradient is with respect to.
        differentiable: the names of the outputs that have a gradient.
        gradient: of (the outputs, the gradients of these), for each of the inputs.
        registered: whether the op has that gradient by itself as well.
    """
    record = _module("tensorflow.python.eager.record")
    forwardprop = _module("tensorflow.python.eager.forwardprop_util")
    private = not (
        record is None
        or forwardprop is None
        or forwardprop.pack_tangents(inputs).tangents
    )
    if registered and not private:
        return call()
    if not registered and not (private and record.could_possibly_record()):
        return _with_custom_gradient(call, inputs, differentiable, gradient)
    with record.stop_recording():
        outputs = call()
    record.record_operation(
        "LBE",
        [getattr(outputs, name) for name in differentiable],
        inputs,
        functools.partial(gradient, outputs),
    )
    return outputs


def _with_custom_gradient(
    call: Callable[[], Any],
    inputs: list[tf.Tensor],
    differentiable: tuple[str, ...],
    gradient: Callable[..., list[tf.Tensor]],
) -> Any:
    outputs = None

    @tf.custom_gradient
    def function(*_: tf.Tensor) -> Any:
        nonlocal outputs
        outputs = call()
        values = tuple(getattr(outputs, name) for name in differentiable)
        return values, functools.partial(gradient, outputs)

    values = function(*inputs)
    return outputs._replace(**dict(zip(differentiable, values, strict=True)))


class MultiWorkerTraining:
    """Before `keras.Model` in a class: `fit` and `evaluate` on several devices.

    Under a `MultiWorkerMirroredStrategy` of more than one worker Keras (3.15 and its
    head of August 2026) takes the mean of a tuple, to find out the shape of a batch
    (`_maybe_symbolic_build`), and then that of scalars over an axis that these do not
    have, to reduce what a step returns (in `_make_function`). Here these are one
    vector, since the mean of each would be two collectives. Under any strategy Keras
    takes the mean of the shares of a first batch that differ in size as well, where the
    replicas do not divide the batch. Without these names training of either kind fails
    as it does with a plain Keras model.
    """

    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        if iterator is None or self.distribute_strategy.num_replicas_in_sync == 1:
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
            return
        for _, _, batches in iterator:
            data_batch = keras.tree.map_structure(
                lambda x: self.distribute_strategy.experimental_local_results(x)[0],
                next(batches),
            )
            break
        super()._maybe_symbolic_build(data_batch=data_batch)

    def _make_function(self, step_function: Callable[[Any], Any]) -> Any:
        if not has_several_workers(self.distribute_strategy):
            return super()._make_function(step_function)
        structure: Any = None
        values: list[tf.TensorSpec] = []

        def step(data: Any) -> tf.Tensor:
            nonlocal structure, values
            logs = step_function(data)
            structure = keras.tree.map_structure(lambda _: 0, logs)
            tensors = [tf.convert_to_tensor(x) for x in keras.tree.flatten(logs)]
            values = [tf.TensorSpec(x.shape, x.dtype) for x in tensors]
            wide = any(x.dtype == tf.float64 for x in tensors)
            dtype = tf.float64 if wide else tf.float32
            flat = [tf.reshape(tf.cast(x, dtype), [-1]) for x in tensors]
            return tf.concat(flat, 0)[tf.newaxis]

        function = super()._make_function(step)

        def unpacked(iterator: Any) -> Any:
            means = function(iterator)
            sizes = [value.shape.num_elements() for value in values]
            parts = [
                tf.cast(tf.reshape(part, value.shape), value.dtype)
                for part, value in zip(tf.split(means, sizes), values, strict=True)
            ]
            return keras.tree.pack_sequence_as(structure, parts)

        return unpacked


def has_several_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy trains in several processes."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return False
    cluster = strategy.cluster_resolver.cluster_spec()
    return sum(cluster.num_tasks(job) for job in cluster.jobs) > 1


@functools.cache
def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
