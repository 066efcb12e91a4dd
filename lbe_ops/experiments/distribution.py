# SPDX-License-Identifier: Apache-2.0
"""Several devices of this machine, or several machines, that train one net.

The machines (workers) are those that `TF_CONFIG` names, as TensorFlow documents it.
Before TensorFlow connects them they meet here: TensorFlow would wait for a missing
worker for an hour, and neither Ctrl-C nor a timer ends that. They meet at the address
of the chief, which TensorFlow takes over afterwards. What could be different on one
worker is compared there, so that a mismatch ends all of them and hangs none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import tensorflow as tf

from lbe_ops import synchronized
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
PROBLEM_SECONDS = 30.0  # for which the chief stays to tell the others of a problem
HELLO_SECONDS = 10.0  # for a worker to say who it is; whoever does not is no worker

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers that train together, in TensorFlow's order: the chief is the first.

    Attributes:
        names: such as `worker 1`; a single one where there is no cluster.
        addresses: `host:port` of each.
        index: which of them this process is.
    """

    names: tuple[str, ...] = ("this process",)
    addresses: tuple[str, ...] = ("",)
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
            _host_and_port(address)
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
        tuple(address for _, _, address in workers),
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


def start(cluster: Cluster, devices: int) -> tf.distribute.Strategy | None:
    """Starts the devices and connects the workers; None for a single device.

    Raises:
        ExperimentError: TensorFlow has started in another way already, or cannot.
    """
    if devices == 1 and not cluster.several:
        return None
    gpus = tf.config.get_visible_devices("GPU")
    try:
        if cluster.several:
            if gpus:
                tf.config.set_visible_devices(gpus[:devices], "GPU")
            # TensorFlow waits in a way that no thread of Python can end.
            faulthandler.dump_traceback_later(synchronized.TIMEOUT_SECONDS, exit=True)
            try:
                return tf.distribute.MultiWorkerMirroredStrategy()
            finally:
                faulthandler.cancel_dump_traceback_later()
        kind = "GPU" if gpus else "CPU"
        if not gpus:
            _make_cpus(devices)
        return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(devices)])
    except (RuntimeError, tf.errors.OpError) as error:
        raise ExperimentError(
            f"TensorFlow cannot start {devices} device(s) on {len(cluster.names)} "
            "worker(s) in this process; start the command in a process of its own. "
            f"Reason: {str(error).strip().splitlines()[0]}"
        ) from error


def describe(strategy: tf.distribute.Strategy | None, cluster: Cluster) -> str:
    """How many replicas train on how many workers; empty for a single device."""
    if strategy is None:
        return ""
    replicas = strategy.num_replicas_in_sync
    return f"{replicas}" + f" on {len(cluster.names)} workers" * cluster.several


def agree(
    cluster: Cluster,
    prepare: Callable[[], tuple[T, Mapping[str, Any]]],
    say: Callable[[str], None],
) -> T:
    """Prepares all workers, the chief first, and ends all of them where one differs.

    Args:
        cluster: the workers; a single one only prepares itself.
        prepare: makes whatever the training needs, and returns it together with all
            that has to be the same on all workers, as JSON knows it.
        say: called with a line before a wait.

    Returns:
        What `prepare` has made.

    Raises:
        ExperimentError: a worker could not be prepared, differs, or is not there in
            time; the same on all that are.
    """
    if not cluster.several:
        return prepare()[0]
    deadline = time.monotonic() + synchronized.TIMEOUT_SECONDS
    try:
        meet = _receive if cluster.chief else _join
        prepared, problem = meet(cluster, prepare, say, deadline)
    except (OSError, ValueError) as error:
        raise ExperimentError(
            f"{cluster.name} has lost the other workers before the training began "
            f"({error}); start the same command on all workers"
        ) from error
    if problem:
        raise ExperimentError(problem)
    return prepared


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


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host:
        raise ValueError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def _make_cpus(count: int) -> None:
    """Splits the CPU into logical devices, before TensorFlow starts them."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    made = tf.config.get_logical_device_configuration(cpu) or []
    if len(made) < count:
        each = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [each] * count)


def _try(
    cluster: Cluster, prepare: Callable[[], tuple[T, Mapping[str, Any]]]
) -> tuple[T | None, dict[str, Any], str]:
    """What `prepare` returns, or why it failed."""
    try:
        prepared, facts = prepare()
    except ExperimentError as error:
        return None, {}, f"{cluster.name}: {error}"
    return prepared, json.loads(json.dumps(facts)), ""


def _listen(cluster: Cluster) -> socket.socket:
    port = _host_and_port(cluster.addresses[cluster.index])[1]
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise ExperimentError(
            f"port {port}, which TF_CONFIG gives {cluster.name}, is not free "
            f"({error.strerror}): is the run before still ending? Wait, or name another"
        ) from error


def _receive(
    cluster: Cluster, prepare: Any, say: Any, deadline: float
) -> tuple[Any, str]:
    """The chief's part of the meeting: what it has prepared, and the first problem."""
    others = cluster.names[1:]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(cluster))
        prepared, facts, problem = _try(cluster, prepare)
        say(
            (f"{problem}; " if problem else "")
            + f"the chief, {cluster.name}, waits for {', '.join(others)}"
        )
        found: dict[str, _Line] = {}
        while len(found) < len(others):
            if problem:
                deadline = min(deadline, time.monotonic() + PROBLEM_SECONDS)
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(name for name in others if name not in found)
                problem = problem or _missing(missing)
                break
            line = _Line(stack.enter_context(connection))
            try:
                hello = line.receive(time.monotonic() + HELLO_SECONDS)
                name = str(hello["worker"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if name in found or name not in others:
                problem = problem or (
                    f"a second process calls itself {name}: give each worker its own "
                    "task in TF_CONFIG, and the same cluster"
                )
                with contextlib.suppress(OSError):
                    line.send({"problem": problem})
                continue
            found[name] = line
            line.send({"facts": facts, "problem": problem})
        for name, line in found.items():
            try:
                answer = line.receive(deadline)["problem"]
            except (OSError, ValueError):
                answer = f"{name} has ended before the training began"
            problem = problem or answer
        for line in found.values():
            with contextlib.suppress(OSError):
                line.send({"problem": problem})
    return prepared, problem


def _join(cluster: Cluster, prepare: Any, say: Any, deadline: float) -> tuple[Any, str]:
    """The part of every other worker, which prepares itself when the chief has."""

    def checked() -> tuple[Any, Mapping[str, Any]]:
        _listen(cluster).close()  # TensorFlow will need the port
        return prepare()

    say(f"{cluster.name} waits for the chief at {cluster.addresses[0]}")
    with contextlib.ExitStack() as stack:
        while True:
            try:
                address = _host_and_port(cluster.addresses[0])
                connection = socket.create_connection(address, HELLO_SECONDS)
                line = _Line(stack.enter_context(connection))
                line.send({"worker": cluster.name})
                chief = line.receive(deadline)
                break
            except OSError as error:  # it is not there, or that of a run that ends
                if time.monotonic() > deadline:
                    raise ExperimentError(_missing(cluster.names[0])) from error
                time.sleep(0.2)
        problem = chief["problem"]
        if "facts" not in chief:
            return None, problem
        prepared = None
        if not problem:
            prepared, facts, problem = _try(cluster, checked)
            problem = problem or _mismatch(cluster, chief["facts"], facts)
        line.send({"problem": problem})
        return prepared, line.receive(deadline)["problem"]


def _missing(names: str) -> str:
    return (
        f"{names} was not there within {synchronized.TIMEOUT_SECONDS:.0f} s; start the "
        "same command on all workers that TF_CONFIG names"
    )


def _mismatch(
    cluster: Cluster, chief: Mapping[str, Any], own: Mapping[str, Any]
) -> str:
    changed = [key for key in {**chief, **own} if chief.get(key) != own.get(key)]
    if not changed:
        return ""
    text = "; ".join(f"{key}: {own.get(key)}, not {chief.get(key)}" for key in changed)
    return (
        f"{cluster.name} differs from the chief ({text}). Start the same command with "
        "the same data on all workers; to continue a run, all of them have to see the "
        "chief's folder, or a copy of it"
    )


class _Line:
    """Messages over a connection, a line of JSON each."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""

    def send(self, message: Mapping[str, Any]) -> None:
        self._connection.sendall((json.dumps(message) + "\n").encode())

    def receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._connection.settimeout(max(deadline - time.monotonic(), 0.01))
            part = self._connection.recv(1 << 16)
            if not part:
                raise ConnectionError("the other end has closed the connection")
            self._received += part
        text, _, self._received = self._received.partition(b"\n")
        return json.loads(text)
