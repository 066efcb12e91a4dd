# SPDX-License-Identifier: Apache-2.0
"""One net on several replicas, in one process or more; see bench_distributed.py."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection

from training_worker import (
    ALPHA,
    ALPHA_MIN,
    CLASSES,
    LEARNING_RATE,
    STRENGTH,
    Net,
    Turns,
    cross_entropy,
    nodes,
    peak_memory,
)

VARIANTS = ("no LBE", "LBE per replica", "LBE synchronised", "BatchNormalization")
FEATURES = 784
COLLECTIVES = "CollectiveReduce", "CollectiveGather", "CollectiveBcast", "NcclAll"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the replicas are.

    Attributes:
        processes: how many; more than one are a `MultiWorkerMirroredStrategy`.
        replicas: of each process, on logical devices of its CPU.
    """

    processes: int
    replicas: int

    @property
    def total(self) -> int:
        return self.processes * self.replicas

    @property
    def name(self) -> str:
        many = "processes" if self.processes > 1 else "process"
        return f"{self.processes} {many} x {self.replicas}"

    def clusters(self) -> list[str | None]:
        """`TF_CONFIG` of each process: ports that are free now, on this machine."""
        if self.processes == 1:
            return [None]
        sockets = [
            socket.create_server(("127.0.0.1", 0)) for _ in range(self.processes)
        ]
        workers = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        for each in sockets:
            each.close()
        return [
            json.dumps(
                {
                    "cluster": {"worker": workers},
                    "task": {"type": "worker", "index": index},
                }
            )
            for index in range(self.processes)
        ]


def work(
    connection: Connection,
    net: Net,
    layout: Layout,
    variant: str,
    threads: int,
    cluster: str | None,
) -> None:
    """The process: the seconds of every turn, at the end a few figures.

    Args:
        connection: as that of `training_worker.work`.
        net: what to train.
        layout: on which replicas, of which some are here.
        variant: one of `VARIANTS`.
        threads: for the work within an operation, of all processes together.
        cluster: its `TF_CONFIG`.
    """
    try:
        if cluster is not None:
            os.environ["TF_CONFIG"] = cluster
        figures = _train(connection, net, layout, variant, threads)
        figures["peak_memory_bytes"] = peak_memory()
    except Exception as error:
        traceback.print_exc()
        figures = {"error": (str(error).splitlines() or [type(error).__name__])[0]}
    connection.send(figures)
    connection.close()


def _train(
    connection: Connection, net: Net, layout: Layout, variant: str, threads: int
) -> dict[str, object]:
    import keras
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(
        max(1, threads // layout.processes)
    )
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * layout.replicas,
    )
    if layout.processes > 1:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        strategy = tf.distribute.MirroredStrategy(
            [f"CPU:{index}" for index in range(layout.replicas)]
        )
    # The same weights in every process; noise of each replica's own.
    keras.utils.set_random_seed(0)
    samples = net.batch // layout.total
    x = tf.random.normal([samples, FEATURES])
    labels = tf.random.uniform([samples], maxval=CLASSES, dtype=tf.int32)

    turns = Turns(connection)
    with strategy.scope():
        model = _model(net, variant)
        model.compile("adam", cross_entropy(), jit_compile=False)
        model.optimizer.learning_rate = LEARNING_RATE

    class Wait(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            self.model.stop_training = not turns.done()

    graph, operations, train_step = None, 0, model.train_step

    def noting_the_graph(data: object) -> object:
        nonlocal graph, operations
        logs = train_step(data)  # once for each replica here, in one graph
        graph = tf.compat.v1.get_default_graph()
        operations = len(graph.get_operations())
        return logs

    model.train_step = noting_the_graph
    data = strategy.distribute_datasets_from_function(
        lambda context: tf.data.Dataset.from_tensors((x, labels)).repeat()
    )
    history = model.fit(
        data, steps_per_epoch=10**9, verbose=0, callbacks=[Wait()], shuffle=False
    ).history
    return {
        "nodes": nodes(graph),
        "loss": history["loss"][-1],
        "collectives": _collectives(graph, operations, layout.replicas),
    }


def _model(net: Net, variant: str) -> object:
    import keras

    from lbe_ops import Dense_LBE, LBEModel
    from lbe_ops.keras_internals import MultiWorkerTraining

    class Model(MultiWorkerTraining, keras.Model):
        """A Keras model that trains in several processes, too."""

    he = {"kernel_initializer": "he_uniform"}
    x = inputs = keras.Input((FEATURES,))
    for _ in range(net.depth):
        if variant == "BatchNormalization":
            x = keras.layers.Dense(net.width, use_bias=False, **he)(x)
            x = keras.layers.BatchNormalization(synchronized=True)(x)
            x = keras.layers.Activation("relu")(x)
        elif variant == "no LBE":
            x = keras.layers.Dense(net.width, activation="relu", **he)(x)
        else:
            x = Dense_LBE(
                net.width,
                activation="relu",
                LBE_alpha=ALPHA,
                LBE_alpha_min=ALPHA_MIN,
                **he,
            )(x)
    outputs = keras.layers.Dense(CLASSES)(x)
    if not variant.startswith("LBE"):
        return Model(inputs, outputs)
    return LBEModel(
        inputs,
        outputs,
        LBE_strength=STRENGTH,
        synchronized=variant == "LBE synchronised",
    )


def _collectives(graph: object, operations: int, replicas: int) -> dict[str, list[int]]:
    """The bytes that each collective takes from a replica, in a step.

    Args:
        graph: in which `train_step` ran, for all replicas of this process.
        operations: how many it had then; what follows is Keras' mean of the logs.
        replicas: of this process.

    Returns:
        Those of the `gradients`, made by the optimizer, of the `statistics`, made by
        the model, forward and backward, and of the `logs`.
    """
    found: dict[str, list[int]] = {"gradients": [], "statistics": [], "logs": []}
    for index, operation in enumerate(graph.get_operations()):
        if not operation.type.startswith(COLLECTIVES):
            continue
        kind = "statistics" if index < operations else "logs"
        if operation.name.startswith("adam/"):
            kind = "gradients"
        value = operation.inputs[0]
        found[kind].append(value.shape.num_elements() * value.dtype.size)
    # What functions within a graph do has no shapes, and would be missed.
    functions = graph.as_graph_def().library.function
    inside = sum(n.op.startswith(COLLECTIVES) for f in functions for n in f.node_def)
    if inside:
        raise RuntimeError(f"{inside} collectives are in functions of the step's graph")
    return {kind: _of_one(sizes, replicas) for kind, sizes in found.items()}


def _of_one(sizes: Sequence[int], replicas: int) -> list[int]:
    """What one of the replicas does, which all do the same."""
    kept = [sizes.count(size) // replicas * [size] for size in dict.fromkeys(sizes)]
    if replicas * sum(map(len, kept)) != len(sizes):
        raise RuntimeError(f"{replicas} replicas differ in collectives: {sizes}")
    return sum(kept, [])
