# SPDX-License-Identifier: Apache-2.0
"""Several devices of this machine, or several machines, that train one net.

The machines (workers) are those that `TF_CONFIG` names, as TensorFlow documents it.
Each prepares itself; TensorFlow connects them; then each tells all others what it has
found, so that a problem or a mismatch of one ends all of them and hangs none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import tensorflow as tf

from lbe_ops import synchronized
from lbe_ops.experiments import ending
from lbe_ops.experiments.errors import ExperimentError, WorkerLostError

ENVIRONMENT_VARIABLE = "TF_CONFIG"
EXAMPLE = (
    '{"cluster": {"worker": ["host1:23456", "host2:23456"]}, '
    '"task": {"type": "worker", "index": 0}}'
)
# By these TensorFlow says that another worker is gone, or has begun anew.
LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
)
GROUP_KEY = 0x6C6265  # of the collectives here; a strategy counts its own from 1

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers that train together, in TensorFlow's order: the chief is the first.

    Attributes:
        names: such as `worker 1`; a single one where there is no cluster.
        index: which of them this process is.
    """

    names: tuple[str, ...] = ("this process",)
    index: int = 0

    @property
    def several(self) -> bool:
        """Whether there are other workers."""
        return len(self.names) > 1

    @property
    def chief(self) -> bool:
        """Whether this process writes the results."""
        return self.index == 0

    @property
    def name(self) -> str:
        """The name of this worker."""
        return self.names[self.index]


def read_cluster() -> Cluster:
    """The cluster that the environment variable TF_CONFIG describes.

    Raises:
        ExperimentError: it describes none that trains like this.
    """
    text = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if not text:
        return Cluster()
    try:
        config = json.loads(text)
        jobs = config.get("cluster", {})
        workers = [
            (job, number, address)
            for job in ("chief", "worker")
            for number, address in enumerate(jobs.get(job, []))
        ]
        task = config.get("task", {})
        own = task.get("type"), task.get("index")
        for _, _, address in workers:
            if not re.fullmatch(r".+:\d+", address):
                raise ValueError(f"{address!r} is not host:port")
    except (ValueError, AttributeError, TypeError) as error:
        raise _bad(f"{type(error).__name__}: {error}", text) from error
    others = sorted({*jobs} - {"chief", "worker"})
    if others:
        raise _bad(f"no {', '.join(others)} can take part", text)
    if len(jobs.get("chief", [])) > 1:
        raise _bad("there can be one chief", text)
    if len(workers) < 2:
        return Cluster()
    known = [(job, number) for job, number, _ in workers]
    if own not in known:
        raise _bad(f"the task {own[0]} {own[1]} is not in the cluster", text)
    return Cluster(
        tuple(f"{job} {number}" for job, number in known),
        known.index(own),
    )


def check_devices(cluster: Cluster, devices: int) -> None:
    """Fails where there are not that many devices; starts none of them.

    Raises:
        ExperimentError: there are fewer.
    """
    if devices < 1:
        raise ExperimentError(f"--devices must be at least 1. Received: {devices}")
    gpus = len(tf.config.get_visible_devices("GPU"))
    if devices > gpus > 0:
        raise ExperimentError(
            f"--devices must not be more than the GPUs that TensorFlow sees, {gpus}. "
            f"Received: {devices}"
        )
    if cluster.several and devices > 1 and not gpus:
        raise ExperimentError(
            "--devices must be 1 for workers without a GPU, of which TensorFlow makes "
            f"one device each; name more workers in TF_CONFIG. Received: {devices}"
        )


def start(
    cluster: Cluster,
    devices: int,
    prepare: Callable[[], tuple[T, Mapping[str, Any]]],
) -> tuple[tf.distribute.Strategy | None, T]:
    """Prepares this process, starts its devices and connects it to the other workers.

    Args:
        cluster: the workers, each of which has to call this.
        devices: how many of this machine are to be used.
        prepare: makes whatever the training needs, and returns it together with all
            that has to be the same on all workers, as JSON knows it. It is called
            first, and must start no device.

    Returns:
        The strategy, None for a single device, and what `prepare` has made.

    Raises:
        ExperimentError: a worker could not be prepared or differs from the chief, the
            same on all of them; or TensorFlow cannot start.
        WorkerLostError: another worker has failed meanwhile.
    """
    prepared: Any = None
    facts: Mapping[str, Any] = {}
    problem = ""
    try:
        prepared, facts = prepare()
    except ending.FAILURES as error:
        if not cluster.several:
            raise
        problem = ending.reason(error)
    if devices == 1 and not cluster.several:
        return None, prepared
    try:
        if cluster.several:
            strategy = _connect(cluster, devices, problem)
        else:
            strategy = _mirror(devices)
    except (RuntimeError, tf.errors.OpError) as error:
        raise ExperimentError(
            f"TensorFlow cannot start {devices} device(s) of {cluster.name}: "
            f"{str(error).strip().splitlines()[0]}. Start the command in a process of "
            "its own, and every worker once, at a port of TF_CONFIG that is free"
        ) from error
    if cluster.several:
        with together(cluster):
            problems, each = zip(*_gather(cluster, (problem, facts)), strict=True)
        problem = _conflict(cluster, problems, each)
        if problem:
            raise ExperimentError(problem)
    return strategy, prepared


def describe(strategy: tf.distribute.Strategy | None, cluster: Cluster) -> str:
    """How many replicas train on how many workers; empty for a single device."""
    if strategy is None:
        return ""
    replicas = strategy.num_replicas_in_sync
    return f"{replicas}" + f" on {len(cluster.names)} workers" * cluster.several


@contextlib.contextmanager
def together(cluster: Cluster) -> Iterator[None]:
    """Says, where another worker is lost in the block, what to do.

    Raises:
        WorkerLostError: one was lost.
    """
    try:
        yield
    except LOST as error:
        if not cluster.several:
            raise
        found = re.findall(r"/job:(\w+)/(?:replica:\d+/)?task:(\d+)", str(error))
        names = {f"{job} {number}" for job, number in found} - {cluster.name}
        who = ", ".join(sorted(names)) or "another worker"
        raise WorkerLostError(
            f"{cluster.name} has lost {who}, which has failed, was stopped or does not "
            "answer. Run the same command again on all workers: it continues after the "
            "last finished epoch"
        ) from error


def wait_for_all(strategy: tf.distribute.Strategy | None, cluster: Cluster) -> None:
    """Returns when every worker has come here: the results are complete then."""
    if cluster.several:
        strategy.reduce(tf.distribute.ReduceOp.SUM, tf.ones(()), axis=None)


def _bad(reason: str, text: str) -> ExperimentError:
    return ExperimentError(
        f"TF_CONFIG in the environment must be like {EXAMPLE}, or unset: {reason}. "
        f"Received: {text}"
    )


def _mirror(devices: int) -> tf.distribute.MirroredStrategy:
    """The devices of a single process; without a GPU, the CPU is split."""
    gpus = tf.config.get_visible_devices("GPU")
    if not gpus:
        (cpu,) = tf.config.list_physical_devices("CPU")
        made = tf.config.get_logical_device_configuration(cpu) or []
        if len(made) < devices:
            each = tf.config.LogicalDeviceConfiguration()
            tf.config.set_logical_device_configuration(cpu, [each] * devices)
    kind = "GPU" if gpus else "CPU"
    return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(devices)])


def _connect(
    cluster: Cluster, devices: int, problem: str
) -> tf.distribute.MultiWorkerMirroredStrategy:
    """Returns when all workers are there; ends the process if they are not in time."""
    others = ", ".join(name for name in cluster.names if name != cluster.name)
    seconds = synchronized.TIMEOUT_SECONDS
    print(
        f"{problem}; " * bool(problem)
        + f"{cluster.name} waits for {others}: ends after {seconds:.0f} s",
        flush=True,
    )
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        tf.config.set_visible_devices(gpus[:devices], "GPU")
    # TensorFlow would wait for an hour, in a way that neither a thread of Python nor
    # its handlers of signals can end.
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        with ending.default_signals(signal.SIGINT):
            return tf.distribute.MultiWorkerMirroredStrategy()
    finally:
        faulthandler.cancel_dump_traceback_later()


def _gather(cluster: Cluster, value: Any) -> list[Any]:
    """What each of the workers has, as JSON knows it; all of them have to call this.

    It is on their CPUs, since workers may differ in GPUs, which a strategy cannot.
    """

    def gather(x: tf.Tensor, instance: int) -> tf.Tensor:
        return tf.raw_ops.CollectiveGatherV2(
            input=x,
            group_size=len(cluster.names),
            group_key=GROUP_KEY,
            instance_key=instance,
            ordering_token=[],
            timeout_seconds=synchronized.TIMEOUT_SECONDS,
        )

    with tf.device("CPU:0"):
        text = tf.constant([*json.dumps((cluster.index, value)).encode()], tf.int32)
        length = tf.reduce_max(gather(tf.shape(text), 1))
        text = tf.pad(text, [[0, length - len(text)]], constant_values=ord(" "))
        rows = gather(text[tf.newaxis], 2).numpy().tolist()
    return [value for _, value in sorted(json.loads(bytes(row)) for row in rows)]


def _conflict(
    cluster: Cluster, problems: Sequence[str], facts: Sequence[Mapping[str, Any]]
) -> str:
    """What a worker has in the way, this one if it has; empty if none has."""
    order = cluster.index, *range(len(problems))
    for index in order:
        if problems[index]:
            return f"{cluster.names[index]}: {problems[index]}"
    chief = facts[0]
    for index in order:
        differences = "; ".join(
            f"{key}: {facts[index].get(key)}, not {chief.get(key)}"
            for key in {**chief, **facts[index]}
            if facts[index].get(key) != chief.get(key)
        )
        if differences:
            return (
                f"{cluster.names[index]} differs from the chief ({differences}). Start "
                "the same command with the same data on all workers; to continue a "
                "run, all of them have to see the chief's folder, or a copy of it"
            )
    return ""
