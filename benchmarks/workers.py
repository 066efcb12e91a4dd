# SPDX-License-Identifier: Apache-2.0
"""Variants of a training, in processes of their own that take turns.

Step times and their ratios come from the same seconds of one run: the variants go on
step by step in changing order, so that a disturbance hits all of them. The processes
know `training_worker.Turns`.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import numpy as np

TURN_SECONDS = 0.1  # at least, and after a step that does not count


class WorkerError(Exception):
    """A process that came to its end early; the message says why."""


class Worker:
    """The process that trains one variant, or several together, and its turns.

    Args:
        work: what a process runs: a function of a connection and of arguments.
        arguments: for each of the processes, its arguments.
        limit: how many seconds the first step and each turn may take; None for any.

    Attributes:
        first_step_seconds: of the slowest process.

    Raises:
        WorkerError: a process has failed, or was too slow.
    """

    def __init__(
        self,
        work: Callable[..., None],
        arguments: Sequence[tuple[object, ...]],
        limit: float | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._limit = limit
        self._connections: list[Connection] = []
        self._processes = []
        for each in arguments:
            connection, other = context.Pipe()
            process = context.Process(target=work, args=(other, *each), daemon=True)
            process.start()
            other.close()
            self._connections.append(connection)
            self._processes.append(process)
        self.first_step_seconds = max(seconds[0] for seconds in self._receive())
        self._steps = 2  # of a turn

    def turn(self) -> float:
        """Lets it train for one turn; the mean seconds of a step."""
        self._send(1 + self._steps)
        seconds = max(float(np.mean(each[1:])) for each in self._receive())
        self._steps = max(2, math.ceil(TURN_SECONDS / seconds))
        return seconds

    def finish(self) -> dict[str, object]:
        """Ends it; what the first process found, and the peak memory of all."""
        self._send(0)
        figures = self._receive()
        self.stop()
        if not np.isfinite(figures[0]["loss"]):
            raise WorkerError(f"its loss is {figures[0]['loss']}")
        memory = sum(each["peak_memory_bytes"] for each in figures)
        return {**figures[0], "peak_memory_bytes": memory}

    def stop(self) -> None:
        """Ends it whatever it does."""
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.kill()
            process.join()
            connection.close()

    def _send(self, steps: int) -> None:
        for connection in self._connections:
            connection.send(steps)

    def _receive(self) -> list[object]:
        """What each process sends next."""
        try:
            received = [self._received(each) for each in self._connections]
        except WorkerError:
            self.stop()
            raise
        return received

    def _received(self, connection: Connection) -> object:
        try:
            if not connection.poll(self._limit):
                raise WorkerError(f"it takes longer than {self._limit:g} seconds")
            received = connection.recv()
        except EOFError:
            raise WorkerError("the process died, perhaps out of memory") from None
        if isinstance(received, dict) and "error" in received:
            raise WorkerError(str(received["error"]))
        return received


def measure(
    rows: list[dict[str, object]],
    start: Callable[[str], Worker],
    rounds: int,
    starts: int,
) -> None:
    """Adds to the rows what their variants take, or why they were `skipped`.

    Processes of the same work differ by some hundredths, by where their memory lies:
    a ratio that is to be trusted to that needs several of each variant.

    Args:
        rows: each with its `variant`; the first is what others compare to.
        start: makes a worker of a variant.
        rounds: turns of each worker. `step_seconds` has, of each round, the mean over
            the workers; `process_seconds`, of each worker, the median over the rounds.
        starts: workers of each variant, started one at a time and in changing order,
            for `first_step_seconds`. All of them take turns then.

    Raises:
        WorkerError: the first variant cannot be trained.
    """
    workers: dict[str, list[Worker]] = {row["variant"]: [] for row in rows}

    def skip(variant: str, error: WorkerError) -> None:
        if variant == rows[0]["variant"]:
            raise error
        next(row for row in rows if row["variant"] == variant)["skipped"] = str(error)
        for worker in workers.pop(variant):
            worker.stop()

    order = np.random.default_rng(0)
    try:
        for _ in range(starts):
            for variant in order.permutation(list(workers)):
                try:
                    workers[variant].append(start(variant))
                except WorkerError as error:
                    skip(variant, error)
        seconds = {variant: np.zeros((rounds, starts)) for variant in workers}
        for number in range(-1, rounds):  # the first says how long a step takes
            for turn in order.permutation(len(rows) * starts):
                row, index = divmod(turn, starts)
                variant = rows[row]["variant"]
                if variant not in workers:
                    continue
                try:
                    taken = workers[variant][index].turn()
                except WorkerError as error:
                    skip(variant, error)
                    continue
                if number >= 0:
                    seconds[variant][number, index] = taken
        for row in rows:
            variant = row["variant"]
            if variant not in workers:
                continue
            first = [worker.first_step_seconds for worker in workers[variant]]
            try:
                figures = [worker.finish() for worker in workers[variant]]
            except WorkerError as error:
                skip(variant, error)
                continue
            row |= figures[0]
            row["first_step_seconds"] = first
            row["step_seconds"] = seconds[variant].mean(1).tolist()
            row["process_seconds"] = np.median(seconds[variant], 0).tolist()
    finally:
        for worker in sum(workers.values(), []):
            worker.stop()
