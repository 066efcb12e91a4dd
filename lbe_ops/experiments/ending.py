# SPDX-License-Identifier: Apache-2.0
"""How a command ends: with one line for people and a status for scripts.

What the user or the system is to blame for is a line. All other exceptions are faults
of this package, and show where they come from.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import tensorflow as tf

from lbe_ops.experiments.errors import ExperimentError, WorkerLostError
from lbe_ops.native import NativeUnavailableError

# Ctrl-C is an exception by itself; these end a process without a word.
SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
]


# What the user or the system is to blame for.
FAILURES = (
    *(ExperimentError, NativeUnavailableError),
    *(OSError, MemoryError, tf.errors.ResourceExhaustedError),
)


class _Stopped(BaseException):
    """A signal; no `Exception`, so that nothing handles it on its way."""


def exit_status(work: Callable[[], None], again: str) -> int:
    """Does the work of a command; tells in one line what ends it early.

    Args:
        work: what there is to do.
        again: what the user can do after an interruption.

    Returns:
        0: done; 2: a bad argument, unreadable data, a conflicting result, a full disk,
        a missing permission, too little memory; 3: another worker is gone; 130:
        interrupted; 143 (129): the signal SIGTERM (SIGHUP).

    Raises:
        Exception: what neither the user nor the system is to blame for.
    """
    try:
        with _signals_raised():
            work()
            sys.stdout.flush()
    except WorkerLostError as error:
        return _end(str(error), 3)
    except FAILURES as error:
        return _end(reason(error), 2)
    except KeyboardInterrupt:
        return _end(f"interrupted; {again}", 128 + signal.SIGINT)
    except _Stopped as stopped:
        (number,) = stopped.args
        return _end(f"ended by {signal.Signals(number).name}; {again}", 128 + number)
    return 0


def reason(failure: BaseException) -> str:
    """One line for people.

    Args:
        failure: any of `FAILURES`.
    """
    if isinstance(failure, OSError):
        text = failure.strerror or str(failure) or type(failure).__name__
        name = failure.filename
        return f"{name}: " * bool(name) + _first_line(text)
    if isinstance(failure, (MemoryError, tf.errors.ResourceExhaustedError)):
        text = _first_line(str(failure))
        return "out of memory" + f": {text}" * bool(text)
    return str(failure)


@contextlib.contextmanager
def default_signals(*more: int) -> Iterator[None]:
    """Lets signals end the process at once, for calls that no exception can leave.

    Args:
        more: signals beside those that `exit_status` handles.
    """
    with _handlers(dict.fromkeys((*more, *SIGNALS), signal.SIG_DFL)):
        yield


@contextlib.contextmanager
def _signals_raised() -> Iterator[None]:
    # One that is ignored (as by nohup) stays so.
    usual = [each for each in SIGNALS if signal.getsignal(each) is signal.SIG_DFL]
    before = sys.unraisablehook

    def raise_again(lost: Any) -> None:
        """Python drops what is raised while it frees an object (in `__del__`, say)."""
        if isinstance(lost.exc_value, _Stopped):
            (number,) = lost.exc_value.args
            signal.signal(number, _stop)
        elif isinstance(lost.exc_value, KeyboardInterrupt):
            number = signal.SIGINT
        else:
            return before(lost)
        threading.Timer(0.01, _interrupt, [number, threading.get_ident()]).start()

    sys.unraisablehook = raise_again
    try:
        with _handlers(dict.fromkeys(usual, _stop)):
            yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def _handlers(handlers: dict[int, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change them, and gets them
        return
    before = {number: signal.signal(number, each) for number, each in handlers.items()}
    try:
        yield
    finally:
        for number, each in before.items():
            signal.signal(number, each)


def _interrupt(number: int, main_thread: int) -> None:
    """Sends the main thread a signal, also where it waits for something."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(main_thread, number)
    else:  # Windows: once it has done waiting
        _thread.interrupt_main(signal.Signals(number))


def _stop(number: int, frame: Any) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second one ends at once
    raise _Stopped(number)


def _end(line: str, status: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        # What nobody can read any more would be an error once more, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with contextlib.suppress(OSError):
        print(f"error: {line}", file=sys.stderr)
    return status


def _first_line(text: str) -> str:
    return [*text.strip().splitlines(), ""][0]
