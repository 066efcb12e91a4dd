# SPDX-License-Identifier: Apache-2.0
"""One net in one training loop, in a process of its own; see bench_training.py."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
import traceback
from multiprocessing.connection import Connection

import formulas

IMAGE = (28, 28, 1)
CLASSES = 10
LOOPS = ("graph", "fit", "XLA", "PyTorch")
VARIANTS = ("no LBE", "pure LBE", "fused LBE")
ALPHA, ALPHA_MIN, STRENGTH = 3.0, 0.3, 0.003
# Small, since the net is to stay as it is while the clock runs.
LEARNING_RATE = 1e-6


@dataclasses.dataclass(frozen=True)
class Net:
    """A plain net, He-initialised: equal hidden layers, then 10 logits.

    Attributes:
        kind: "dense", or "conv" with 3x3 filters on images of 28 x 28.
        depth: hidden layers.
        width: units or filters of each.
        batch: samples of a step.
        activation: of the hidden layers.
    """

    kind: str
    depth: int
    width: int
    batch: int
    activation: str = "relu"

    @property
    def name(self) -> str:
        kind = (
            self.kind if self.activation == "relu" else f"{self.kind} {self.activation}"
        )
        return f"{kind} {self.depth} x {self.width}, batch {self.batch}"


class Turns:
    """Times the steps of a loop, and makes it wait for its turn.

    The loop calls `done` after each step. Sent are the seconds of the steps of every
    turn; the first turn is the first step, with all that must be built before it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._seconds: list[float] = []
        self._granted = 1
        self._started = time.perf_counter()

    def done(self) -> bool:
        """Notes the end of a step; whether another one is wanted."""
        now = time.perf_counter()
        self._seconds.append(now - self._started)
        self._started = now
        if len(self._seconds) == self._granted:
            self._connection.send(self._seconds)
            self._granted = self._connection.recv()
            self._seconds = []
            self._started = time.perf_counter()
        return self._granted > 0


def work(
    connection: Connection, net: Net, loop: str, variant: str, threads: int
) -> None:
    """The process: the seconds of every turn, at the end a few figures.

    Args:
        connection: sends lists of seconds and takes numbers of steps; 0 is the end.
            Then, or after an error, sends a dict and is closed.
        net: what to train.
        loop: one of `LOOPS`.
        variant: one of `VARIANTS`.
        threads: for the work within an operation.
    """
    try:
        train = _torch if loop == "PyTorch" else _tensorflow
        figures = train(connection, net, loop, variant, threads)
        figures["peak_memory_bytes"] = peak_memory()
    except ImportError as error:
        figures = {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        figures = {"error": (str(error).splitlines() or [type(error).__name__])[0]}
    connection.send(figures)
    connection.close()


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


def _tensorflow(
    connection: Connection, net: Net, loop: str, variant: str, threads: int
) -> dict[str, object]:
    import keras
    import tensorflow as tf

    from lbe_ops import native

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    if variant == "fused LBE" and loop == "XLA" and native.load().xla_reason:
        raise ImportError(native.load().xla_reason)
    keras.utils.set_random_seed(0)
    x = tf.random.normal([net.batch, *IMAGE])
    labels = tf.random.uniform([net.batch], maxval=CLASSES, dtype=tf.int32)

    turns = Turns(connection)
    model = _model(net, variant)
    if loop == "fit":
        model.compile("adam", cross_entropy(), jit_compile=False)
        model.optimizer.learning_rate = LEARNING_RATE

        class Wait(keras.callbacks.Callback):
            def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
                self.model.stop_training = not turns.done()

        graphs, train_step = [], model.train_step

        def noting_the_graph(data: object) -> object:
            graphs.append(tf.compat.v1.get_default_graph())
            return train_step(data)

        model.train_step = noting_the_graph
        data = tf.data.Dataset.from_tensors((x, labels)).repeat()
        history = model.fit(
            data, steps_per_epoch=10**9, verbose=0, callbacks=[Wait()], shuffle=False
        ).history
        return {"nodes": nodes(graphs[-1]), "loss": history["loss"][-1]}

    model.compile(keras.optimizers.SGD(LEARNING_RATE), cross_entropy())

    @tf.function(jit_compile=loop == "XLA", autograph=False)
    def step(x: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            predicted = model(x, training=True)
            loss = model.compute_loss(x, labels, predicted)
        variables = model.trainable_variables
        model.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    model.optimizer.build(model.trainable_variables)
    while True:
        loss = float(step(x, labels))
        if not turns.done():
            break
    graph = step.get_concrete_function(x, labels).graph
    return {"nodes": nodes(graph), "loss": loss}


def cross_entropy() -> object:
    import keras

    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def nodes(graph: object) -> int:
    """Nodes of a graph and of all functions that it calls."""
    found = graph.as_graph_def()
    return len(found.node) + sum(len(f.node_def) for f in found.library.function)


def _model(net: Net, variant: str) -> object:
    import keras

    from lbe_ops import Conv2D_LBE, Dense_LBE, LBEModel

    x = inputs = keras.Input(IMAGE)
    if net.kind == "dense":
        x = keras.layers.Flatten()(x)
    for _ in range(net.depth):
        dense, conv, arguments = keras.layers.Dense, keras.layers.Conv2D, {}
        if variant == "fused LBE":
            dense, conv = Dense_LBE, Conv2D_LBE
            arguments = {"LBE_alpha": ALPHA, "LBE_alpha_min": ALPHA_MIN}
        elif variant == "pure LBE":
            arguments = {"activity_regularizer": _port_regularizer()}
        arguments |= {"activation": net.activation, "kernel_initializer": "he_uniform"}
        if net.kind == "dense":
            x = dense(net.width, **arguments)(x)
        else:
            x = conv(net.width, 3, padding="same", **arguments)(x)
    if net.kind == "conv":
        x = keras.layers.GlobalMaxPooling2D()(x)
    outputs = keras.layers.Dense(CLASSES)(x)
    if variant == "fused LBE":
        return LBEModel(inputs, outputs, LBE_strength=STRENGTH)
    if variant == "pure LBE":
        return _port_model(inputs, outputs)
    return keras.Model(inputs, outputs)


def _port_regularizer() -> object:
    """LBE of one layer in plain TensorFlow, with a scalar alpha, as in the port."""
    import keras
    import tensorflow as tf

    batch_entropy = formulas.tensorflow_port()

    class PortRegularizer(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = self.add_weight(
                shape=(), initializer=keras.initializers.Constant(ALPHA)
            )
            self.built = True

        def __call__(self, x: tf.Tensor) -> tf.Tensor:
            return (
                super().__call__(x)
                if isinstance(x, keras.KerasTensor)
                else (self.call(x))
            )

        def call(self, x: tf.Tensor) -> tf.Tensor:
            entropy = batch_entropy(x)
            target = tf.maximum(ALPHA_MIN, tf.abs(self.alpha.value))
            # Keras divides activity losses by the batch size.
            return (entropy - target) ** 2 * tf.cast(tf.shape(x)[0], x.dtype)

        def compute_output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
            return ()

    return PortRegularizer()


def _port_model(inputs: object, outputs: object) -> object:
    import keras
    import tensorflow as tf

    class PortModel(keras.Model):
        def compute_loss(
            self,
            x: object = None,
            y: object = None,
            y_pred: object = None,
            sample_weight: object = None,
            training: bool = True,
        ) -> tf.Tensor:
            ce = self._compile_loss(y, y_pred, sample_weight)
            return ce + STRENGTH * tf.reduce_mean(tf.stack(self.losses)) * ce

    return PortModel(inputs, outputs)


def _torch(
    connection: Connection, net: Net, loop: str, variant: str, threads: int
) -> dict[str, object]:
    """The loop of the PyTorch original: no compilation, LBE layer by layer."""
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # as TensorFlow does
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    channels_first = IMAGE[-1:] + IMAGE[:-1]
    x = torch.randn(net.batch, *channels_first, device=device)
    labels = torch.randint(CLASSES, (net.batch,), device=device)

    turns = Turns(connection)
    layers, size = [], math.prod(IMAGE) if net.kind == "dense" else IMAGE[-1]
    for _ in range(net.depth):
        if net.kind == "dense":
            layers.append(torch.nn.Linear(size, net.width))
        else:
            layers.append(torch.nn.Conv2d(size, net.width, 3, padding="same"))
        torch.nn.init.kaiming_uniform_(layers[-1].weight, nonlinearity="relu")
        torch.nn.init.zeros_(layers[-1].bias)
        size = net.width
    hidden = torch.nn.ModuleList(layers).to(device)
    logits = torch.nn.Linear(size, CLASSES).to(device)
    alphas = [torch.full((), ALPHA, device=device) for _ in hidden]
    parameters = [*hidden.parameters(), *logits.parameters()]
    if variant == "pure LBE":
        parameters += [alpha.requires_grad_() for alpha in alphas]
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE)
    activation = getattr(torch.nn.functional, net.activation)
    batch_entropy = formulas.pytorch_original()
    while True:
        optimizer.zero_grad()
        y, lbe = x.flatten(1) if net.kind == "dense" else x, []
        for layer, alpha in zip(hidden, alphas, strict=True):
            y = activation(layer(y))
            if variant == "pure LBE":
                entropy = batch_entropy(y)
                lbe.append((entropy - alpha.abs().clamp(min=ALPHA_MIN)) ** 2)
        if net.kind == "conv":
            y = y.amax((2, 3))
        loss = torch.nn.functional.cross_entropy(logits(y), labels)
        if lbe:
            loss = loss + STRENGTH * torch.stack(lbe).mean() * loss
        loss.backward()
        optimizer.step()
        value = loss.item()
        if not turns.done():
            return {"loss": value}
