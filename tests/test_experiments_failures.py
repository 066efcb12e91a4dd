# SPDX-License-Identifier: Apache-2.0
"""`lbe-ops train` and `lbe-ops map` when the system fails, or two of them meet.

What a system does to a process is done to a real one: it is killed, its disk is full,
its folder is read-only, its memory is limited. It must end with one line and a status,
leave no half file, and go on when the reason is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lbe_ops import __main__ as command_line
from lbe_ops.experiments import ending, lock, results
from lbe_ops.experiments import map as trainability
from lbe_ops.experiments.errors import ExperimentError
from lbe_ops.experiments.trial import Trial

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        sys.platform != "linux", reason="what is done to processes here is Linux'"
    ),
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy keyword"
        ":DeprecationWarning"
    ),
]

TINY = (
    "--depth 2 --width 64 --batch-size 64 --learning-rate 0.01 --schedule constant "
    "--initializer glorot_uniform --lbe"
)
AGAIN = "the same command continues after the last finished epoch"
TIMEOUT = 300.0


@contextlib.contextmanager
def started(*words: object, **options: object) -> Iterator[subprocess.Popen]:
    """A command of `lbe-ops` in a process of its own, gone after the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lbe_ops", *map(str, words)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    timer = threading.Timer(TIMEOUT, process.kill)
    timer.start()
    with process:  # closes its pipes
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


def run(*words: object, **options: object) -> tuple[int, str, str]:
    """Its status and standard output, and its last line on standard error."""
    with started(*words, **options) as process:
        output, error = process.communicate()
    assert "Traceback" not in error and "Exception ignored" not in error, error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == (process.returncode != 0), error
    assert not lines or error.endswith(f"{lines[0]}\n")
    return process.returncode, output or "", "".join(lines)


@pytest.fixture
def run_here(capsys) -> Callable[..., tuple[int, str, str]]:
    """As `run`, in this process, which has imported TensorFlow already."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = command_line.main([*map(str, words)])
        output, error = capsys.readouterr()
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == (status != 0), error
        return status, output, "".join(lines)

    return run


def hear_signals() -> None:
    """Whoever runs the tests may ignore them, as a shell does in the background."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def training(npz: pathlib.Path, folder: pathlib.Path, *more: object) -> list[object]:
    return ["train", "--data", npz, *TINY.split(), "--output", folder, *more]


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} did not come: {process.stderr.read()}")


def temporary(folder: pathlib.Path) -> list[pathlib.Path]:
    """What nothing but a process that writes may leave in a folder."""
    return [path for path in folder.rglob(".*") if path.name != "."]


def epochs(folder: pathlib.Path) -> int:
    return len(json.loads((folder / "with_lbe" / "history.json").read_text()))


# Two at once


def test_second_process_is_told_who_writes(npz, tmp_path):
    folder = tmp_path / "run"
    words = training(npz, folder, "--epochs", 100_000)
    with started(*words, preexec_fn=hear_signals) as first:
        wait_for(first, "accuracy")
        status, _, line = run(*words)
        assert status == 2
        assert f"{folder} is being written by process {first.pid} on " in line
        assert run(*words, "--overwrite")[::2] == (2, line)
        # The first one has noticed nothing, and another folder is free.
        assert run(*training(npz, tmp_path / "other", "--epochs", 1))[0] == 0
        before = epochs(folder)
        first.send_signal(signal.SIGTERM)
        _, error = first.communicate()
    assert first.returncode == 128 + signal.SIGTERM
    assert error.endswith(f"error: ended by SIGTERM; {AGAIN}\n")
    assert epochs(folder) >= before
    assert not temporary(folder)


def test_killed_process_locks_nobody_out(npz, tmp_path, run_here):
    folder = tmp_path / "run"
    with started(*training(npz, folder, "--epochs", 100_000)) as process:
        wait_for(process, "accuracy")
        process.kill()
        process.wait()
    assert (folder / results.LOCK).exists()
    done = epochs(folder)
    # What a process killed while it writes leaves.
    for name in ("with_lbe/.tmp-1-checkpoint.npz", ".tmp-2-config.json"):
        (folder / name).write_text("half")
    status, output, _ = run_here(*training(npz, folder, "--epochs", done + 1))
    assert status == 0 and f"resuming after epoch {done}" in output
    assert epochs(folder) == done + 1
    assert not temporary(folder)


def test_signals_end_in_one_line_and_a_status(npz, tmp_path):
    folder = tmp_path / "run"
    for number, what in (
        (signal.SIGINT, "interrupted"),
        (signal.SIGHUP, "ended by SIGHUP"),
    ):
        words = training(npz, folder, "--epochs", 100_000)
        with started(*words, preexec_fn=hear_signals) as process:
            wait_for(process, "accuracy")
            process.send_signal(number)
            _, error = process.communicate()
        assert process.returncode == 128 + number
        assert error.endswith(f"error: {what}; {AGAIN}\n")
        assert "Traceback" not in error and not temporary(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_that_comes_while_python_frees_an_object_is_not_lost(capsys, number):
    class Freed:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def work() -> None:
        freed = Freed()
        del freed
        time.sleep(30)
        raise AssertionError("the signal is lost")

    usual = signal.SIG_DFL
    if number == signal.SIGINT:
        usual = signal.default_int_handler
    before = signal.signal(number, usual)  # whoever runs the tests may ignore it
    try:
        assert ending.exit_status(work, "once more") == 128 + number
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err.endswith("; once more\n")


def test_ignored_signal_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ending.exit_status(lambda: signal.raise_signal(signal.SIGHUP), "") == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_those_of_before_again(capsys):
    before = [signal.getsignal(number) for number in ending.SIGNALS]

    def work() -> None:
        with ending.default_signals(signal.SIGINT):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)

    assert ending.exit_status(work, "go on") == 143
    assert capsys.readouterr().err == "error: ended by SIGTERM; go on\n"
    assert [signal.getsignal(number) for number in ending.SIGNALS] == before


def test_fault_of_the_package_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        ending.exit_status(lambda: 1 / 0, "")


# The lock itself


def test_lock_is_removed_with_the_folder_that_it_made(tmp_path):
    path = tmp_path / "run" / ".lock"
    with lock.exclusive(path, path.parent):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
        with (
            pytest.raises(ExperimentError, match="is being written by process"),
            lock.exclusive(path, path.parent),
        ):
            raise AssertionError("two at once")
        assert path.exists()  # the loser leaves it
    assert not path.parent.exists()
    path.parent.mkdir()
    with lock.exclusive(path, path.parent):
        pass
    assert [*tmp_path.rglob("*")] == [path.parent]
    with lock.exclusive(path, path.parent):
        (path.parent / "result").touch()
    assert [each.name for each in path.parent.iterdir()] == ["result"]


def test_lock_of_a_file_that_is_gone_is_none(tmp_path, monkeypatch):
    """Its holder may remove it after another process has opened it."""
    path = tmp_path / ".lock"
    flock, calls = lock.fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with lock.exclusive(path, tmp_path):
        assert len(calls) == 2
        with (
            pytest.raises(ExperimentError, match="is being written"),
            lock.exclusive(path, tmp_path),
        ):
            raise AssertionError("two at once")


def test_lock_of_another_process_is_not_removed(tmp_path):
    path = tmp_path / ".lock"
    # By hand, say; and the first one ends before the second one.
    with contextlib.ExitStack() as second:
        with lock.exclusive(path, tmp_path):
            path.unlink()
            second.enter_context(lock.exclusive(path, tmp_path))
            other = path.stat()
        assert os.path.samestat(path.stat(), other)


@pytest.mark.parametrize("number", sorted(lock.WITHOUT_LOCKS))
def test_file_system_without_locks_is_a_note(tmp_path, monkeypatch, capsys, number):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    path = tmp_path / ".lock"
    for _ in range(2):
        with lock.exclusive(path, tmp_path):
            assert "note: no lock keeps others from writing" in capsys.readouterr().out
    assert not path.exists()


def test_system_without_locks_is_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.exclusive(tmp_path / ".lock", tmp_path):
        assert "(this system has none)" in capsys.readouterr().out


def test_lock_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with (
        pytest.raises(ExperimentError, match="cannot be written: Input/output error"),
        lock.exclusive(tmp_path / ".lock", tmp_path),
    ):
        raise AssertionError("entered")


# The disk, permissions, memory, the terminal


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], pathlib.Path]]:
    """Makes a disk of so many KiB, or makes that one larger; where that is allowed."""
    folder = tmp_path / "disk"

    def size(kibibytes: int) -> pathlib.Path:
        mounted = folder.is_mount()
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o"]
            + [f"size={kibibytes}k" + ",remount" * mounted, "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
        return folder

    yield size
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# In KiB. The weights are 30, the checkpoint is three times as large; while a file is
# written, the one before it is there as well.
FULL = {"checkpoint.npz": (1, 60), "of the second epoch": (2, 150), "weights": (1, 120)}


@pytest.mark.parametrize("case", FULL)
def test_full_disk_is_one_line_and_leaves_nothing_half(npz, small_disk, case, run_here):
    number, size = FULL[case]
    folder = small_disk(size) / "run"
    words = training(npz, folder, "--epochs", number)
    status, _, line = run(*words)
    name = "model.weights.h5" if case == "weights" else "checkpoint.npz"
    path = folder / "with_lbe" / name
    assert (status, line) == (2, f"error: {path}: No space left on device")
    assert not temporary(folder) and not path.exists() or case == "of the second epoch"
    if case == "of the second epoch":
        assert epochs(folder) == 1
    small_disk(4096)
    status, output, _ = run_here(*words)
    assert status == 0 and epochs(folder) == number
    assert ("resuming after epoch 1" in output) == (case != "checkpoint.npz")
    assert (folder / "with_lbe" / "model.weights.h5").exists()
    assert (folder / "summary.json").exists() and not temporary(folder)


def limit_files() -> None:
    """Every file has room for so many bytes, on every file system."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def test_files_that_may_not_grow_are_one_line(npz, tmp_path):
    folder = tmp_path / "run"
    status, _, line = run(*training(npz, folder, "--epochs", 1), preexec_fn=limit_files)
    assert status == 2 and line.endswith("checkpoint.npz: File too large")
    assert not temporary(folder) and not [*(folder / "with_lbe").iterdir()]


def without_root() -> None:
    """Takes from root, for the program to come, that permissions do not bind it."""
    libc, drop_from_bounding_set = ctypes.CDLL(None), 24
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(drop_from_bounding_set, capability, 0, 0, 0)


@pytest.mark.parametrize("what", ["new", "run"])
def test_read_only_folder_is_one_line(npz, tmp_path, what, run_here):
    folder = tmp_path / "parent" / "run"
    words = training(npz, folder, "--epochs", 1)
    if what == "run":
        assert run_here(*words)[0] == 0
        words[-1], closed = 2, folder
    else:
        folder.parent.mkdir()
        closed = folder.parent
    closed.chmod(0o555)
    before = sorted(tmp_path.rglob("*"))
    try:
        status, _, line = run(*words, preexec_fn=without_root)
    finally:
        closed.chmod(0o755)
    assert status == 2
    assert line == f"error: {folder} cannot be written: Permission denied"
    assert sorted(tmp_path.rglob("*")) == before


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (40 << 30, 40 << 30))


@pytest.mark.parametrize("initializer", ["glorot_uniform", "critical_orthogonal"])
def test_too_little_memory_is_one_line(npz, tmp_path, initializer):
    """Of TensorFlow, and of NumPy: a kernel of 360 GB."""
    folder = tmp_path / "run"
    words = training(npz, folder, "--width", 300_000, "--initializer", initializer)
    status, _, line = run(*words, preexec_fn=limit_memory)
    assert status == 2 and line.startswith("error: out of memory")
    assert not folder.exists()


def test_output_that_nobody_can_write_is_one_line(npz, tmp_path):
    words = training(npz, tmp_path / "run", "--epochs", 1)
    with open("/dev/full", "w") as full:
        assert run(*words, stdout=full)[::2] == (2, "error: No space left on device")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert run(*words, stdout=writing)[::2] == (2, "error: Broken pipe")
    finally:
        os.close(writing)
    assert not temporary(tmp_path)


# The map


SMALL = Trial("relu", "he_normal", 1, 1e-3, "none", 1, width=8, steps=2)


def test_two_maps_of_one_block_exclude_each_other(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(trainability.BLOCKS, "smoke", lambda: [SMALL])
    words = ["map", "smoke", "--output", str(tmp_path), "--processes", "1"]
    with lock.exclusive(tmp_path / ".lock-smoke", tmp_path):
        assert command_line.main(words) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'smoke.csv'} is being written by process" in error
        assert not (tmp_path / "smoke.csv").exists()
        assert command_line.main([*words, "--dry-run"]) == 0
    with lock.exclusive(tmp_path / ".lock-m0", tmp_path):  # another block
        assert command_line.main(words) == 0
    assert len(trainability.read(tmp_path / "smoke.csv")) == 1
    assert not temporary(tmp_path)


def test_map_that_is_ended_goes_on(tmp_path, run_here):
    words = ["map", "smoke", "--output", tmp_path, "--processes", 1]
    path = tmp_path / "smoke.csv"
    with started(*words, preexec_fn=hear_signals) as process:
        wait_for(process, "smoke: 16 trials, 16 to run")
        while not path.exists() or not trainability.read(path):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate()
    assert process.returncode == 143
    assert error.endswith(
        "error: ended by SIGTERM; the same command goes on from here\n"
    )
    assert "Traceback" not in error
    assert not temporary(tmp_path)
    done = len(trainability.read(path))
    assert path.read_text().endswith("\n") and 1 <= done < 16
    output = run_here(*words, "--minutes", 0)[1]
    assert f"smoke: 16 trials, {16 - done} to run" in output


def test_line_of_a_map_is_there_whole_or_not_at_all(small_disk):
    path = small_disk(8) / "map.csv"
    outcome = {f"value_{number}": 0.123456 for number in range(60)}
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        for seed in range(100):
            trainability._append(path, dataclasses.replace(SMALL, seed=seed), outcome)
    rows = trainability.read(path)
    assert len(rows) == seed > 3
    assert path.read_text().endswith("\n")
    small_disk(64)
    trainability._append(path, dataclasses.replace(SMALL, seed=seed), outcome)
    assert [trial.seed for trial, _ in trainability.read(path)] == [*range(seed + 1)]


def test_a_process_of_the_map_without_memory_is_one_line(tmp_path, monkeypatch, capfd):
    """The trial is named: the others of its block may have enough."""
    large = dataclasses.replace(SMALL, depth=2, width=300_000)
    monkeypatch.setitem(trainability.BLOCKS, "smoke", lambda: [large])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (40 << 30, limits[1]))
    try:
        status = command_line.main(["map", "smoke", "--output", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert status == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert "width=300000" in error and "out of memory" in error


# The surroundings


@pytest.mark.parametrize("home", [None, "below a file"])
def test_a_home_is_not_needed(npz, tmp_path, monkeypatch, home):
    """Keras and Matplotlib want one for their settings, and do without."""
    if home is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", str(npz / home))
    status, _, _ = run(
        *("train", "--data", npz, *TINY.split(), "--epochs", 1),
        *("--output", tmp_path / "run"),
    )
    assert status == 0


def test_clocks_that_jump_change_nothing(npz, tmp_path, monkeypatch):
    """By days, back and forth, also within a run that goes on."""
    folders = [tmp_path / "steady", tmp_path / "jumping"]
    for folder in folders:
        for epochs in (2, 4):
            command = ["train", "--data", npz, *TINY.split(), "--epochs", epochs]
            assert command_line.main([*map(str, command), "--output", str(folder)]) == 0
        now, jumps = time.time(), itertools.cycle((0, -86_400, 200_000))
        monkeypatch.setattr(time, "time", lambda: now + next(jumps))  # noqa: B023
    steady, jumping = (
        json.loads((folder / "with_lbe" / "history.json").read_text())
        for folder in folders
    )
    assert len(steady) == 4
    for one, other in zip(steady, jumping, strict=True):
        assert one.pop("seconds") > 0 and other.pop("seconds") > 0
        assert one == other
