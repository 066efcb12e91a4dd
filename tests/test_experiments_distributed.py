# SPDX-License-Identifier: Apache-2.0
"""`lbe-ops train` on several devices and workers: the numbers are those of one device.

Every training of several is a process of its own (or two), since TensorFlow starts its
devices once. Ports are free when a test asks for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from helpers import free_ports, save_patterns, worker_config

from lbe_ops import native
from lbe_ops.experiments import command, data, distribution, plots, results
from lbe_ops.experiments.distribution import Cluster
from lbe_ops.experiments.errors import ExperimentError

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

DEVICES = pathlib.Path(__file__).resolve().parent.parent / "docs" / "devices.md"
# The last batch has one of the 129 samples, so that only one replica gets any; three of
# them share a whole batch as 22, 22 and 20.
TINY = (
    "--depth 3 --width 8 --epochs 2 --batch-size 64 --learning-rate 0.01 "
    "--schedule constant --initializer glorot_uniform"
)
TIMEOUT = 300.0
SOURCES = data.SOURCES[:2]  # of text, to be quick


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> pathlib.Path:
    """A small data set: noisy images of three patterns, 129 + 41 samples."""
    return save_patterns(tmp_path_factory.mktemp("data"), train=129, test=41)


def words(npz: pathlib.Path, output: pathlib.Path, *more: object) -> list[str]:
    return [
        "--data",
        str(npz),
        *TINY.split(),
        "--output",
        str(output),
        *map(str, more),
    ]


@pytest.fixture(scope="module")
def alone(npz, tmp_path_factory):
    """The folder of a run on one device, in this process, with these arguments."""
    made: dict[tuple, pathlib.Path] = {}

    def run(*more: object) -> pathlib.Path:
        if more not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plots, "draw", lambda *arguments: None)
                patch.setattr(data, "SOURCES", SOURCES)
                patch.delenv("TF_CONFIG", raising=False)
                assert command.main(words(npz, folder, *more)) == 0
            made[more] = folder
        return made[more]

    return run


@contextlib.contextmanager
def started(
    arguments: list[str], seconds: float = 600.0, **environment: str
) -> Iterator[subprocess.Popen]:
    """The command in a process of its own, which is gone after the block."""
    program = (
        "import sys; from lbe_ops import synchronized; "
        "from lbe_ops.experiments import command, data; "
        f"data.SOURCES = {SOURCES!r}; "
        f"synchronized.TIMEOUT_SECONDS = {seconds}; sys.exit(command.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    timer = threading.Timer(TIMEOUT, process.kill)
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.kill()
        process.communicate()


@contextlib.contextmanager
def two_workers(arguments: list[str]) -> Iterator[list[subprocess.Popen]]:
    ports = free_ports(2)
    with (
        started(arguments, TF_CONFIG=worker_config(0, ports)) as chief,
        started(arguments, TF_CONFIG=worker_config(1, ports)) as other,
    ):
        yield [chief, other]


def assert_ends(process: subprocess.Popen, status: int) -> tuple[str, str]:
    output, error = process.communicate()
    assert process.returncode == status, output + error
    return output, error


def assert_same_numbers(a: pathlib.Path, b: pathlib.Path, net: str) -> None:
    """The same history, weights, optimizer state and entropies, to rounding."""
    first, second = (
        json.loads((folder / net / "history.json").read_text()) for folder in (a, b)
    )
    assert [list(row) for row in first] == [list(row) for row in second]
    for one, other in zip(first, second, strict=True):
        del one["seconds"], other["seconds"]
        assert one == pytest.approx(other, rel=2e-6)
    with (
        np.load(a / net / "checkpoint.npz") as one,
        np.load(b / net / "checkpoint.npz") as other,
    ):
        assert one.keys() == other.keys()
        for key in set(one) - {"progress"}:
            np.testing.assert_allclose(one[key], other[key], rtol=2e-5, atol=2e-6)
    one, other = (
        np.loadtxt(folder / net / "entropy.csv", delimiter=",", skiprows=1)
        for folder in (a, b)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_devices_give_the_numbers_of_one(npz, alone, tmp_path):
    folder = tmp_path / "run"
    with started(words(npz, folder, "--lbe", "--devices", 3)) as process:
        output, _ = assert_ends(process, 0)
    assert "replicas: 3;" in output
    assert_same_numbers(folder, alone(), "with_lbe")
    written = json.loads((folder / "config.json").read_text())
    assert written["environment"]["replicas"] == "3"
    assert "devices" not in written["settings"]


# Keras clips what each replica has of a gradient, and not their sum.
UNCLIPPED = "--global-clipnorm 0 --dtype float64"
KINDS = {
    "residual": "--model residual --norm batch",
    "vae": "--model vae --latent 3",
    # Adam would divide what a bias of the keys gets, rounding alone, by its own size.
    "transformer": "--model transformer --data text --context 90 --depth 1 "
    "--optimizer sgd",
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_nets_have_the_numbers_of_one_device(npz, alone, tmp_path, kind):
    folder, more = tmp_path / "run", ("--lbe", *UNCLIPPED.split(), *KINDS[kind].split())
    with started(words(npz, folder, *more, "--devices", 2)) as process:
        assert_ends(process, 0)
    assert_same_numbers(folder, alone(*more), "with_lbe")


@pytest.mark.long
def test_two_processes_of_the_docs_give_the_numbers_of_one(
    npz, alone, tmp_path, monkeypatch
):
    """And a run of two workers goes on with one device."""
    expected = alone()
    (example,) = re.findall(r"^```sh\n(.*?)^```$", DEVICES.read_text(), re.M | re.S)
    for port, free in zip(("23456", "23457"), free_ports(2), strict=True):
        assert example.count(port) == 1
        example = example.replace(port, str(free))
    folder = tmp_path / "run"
    ours = [sys.executable, "-m", "lbe_ops.experiments", *words(npz, folder)]
    assert example.count("lbe-ops train --preset demo") == 1
    example = example.replace("lbe-ops train --preset demo", shlex.join(ours))
    result = subprocess.run(
        ["sh", "-ec", example],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    # The shell waits for both, and both say where they are.
    assert result.stdout.count("replicas: 2 on 2 workers; ") == 2
    assert result.stdout.count("with LBE: epoch 2/2") == 2
    assert result.stdout.count("results, weights and plots") == 1
    for net in ("with_lbe", "without_lbe"):
        assert_same_numbers(folder, expected, net)
    monkeypatch.setattr(plots, "draw", lambda *arguments: None)
    assert command.main(words(npz, folder, "--lbe", "--epochs", 3)) == 0
    assert_same_numbers(folder, alone("--lbe", "--epochs", 3), "with_lbe")


@pytest.mark.long
def test_run_whose_worker_is_killed_goes_on(npz, alone, tmp_path):
    folder = tmp_path / "run"
    arguments = words(npz, folder, "--lbe")
    with two_workers([*arguments, "--epochs", "200"]) as (chief, other):
        for line in other.stdout:
            if "epoch   2/200" in line:
                break
        other.send_signal(signal.SIGKILL)
        _, error = assert_ends(chief, 3)
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "worker 0 has lost worker 1" in line
    assert "Run the same command again on all workers" in line
    done = len(json.loads((folder / "with_lbe" / "history.json").read_text()))
    assert 2 <= done < 200
    epochs = str(done + 1)
    with two_workers([*arguments, "--epochs", epochs]) as workers:
        for worker in workers:
            output, _ = assert_ends(worker, 0)
            assert f"resuming after epoch {done}" in output
    assert_same_numbers(folder, alone("--lbe", "--epochs", epochs), "with_lbe")


# The meeting of the workers


def test_what_differs_ends_all_workers(npz, tmp_path):
    arguments = words(npz, tmp_path / "run")
    ports = free_ports(2)
    with (
        started(arguments, TF_CONFIG=worker_config(0, ports)) as chief,
        started(
            [*arguments, "--seed", "5"], TF_CONFIG=worker_config(1, ports)
        ) as other,
    ):
        for index, worker in enumerate((chief, other)):
            output, error = assert_ends(worker, 2)
            assert output == (
                f"worker {index} waits for worker {1 - index}: ends after 600 s\n"
            )
            assert "error: worker 1 differs from the chief (seed: 5, not 1). " in error
    assert not (tmp_path / "run").exists()


def test_missing_worker_ends_the_others_in_time(npz, tmp_path):
    arguments = words(npz, tmp_path / "run", "--data", "none.npz")
    with started(arguments, 3.0, TF_CONFIG=worker_config(0, free_ports(2))) as chief:
        output, error = assert_ends(chief, 1)
    assert "none.npz cannot be read: " in output
    assert "; worker 0 waits for worker 1: ends after 3 s" in output
    assert "Timeout" in error


def test_interrupt_ends_a_worker_that_waits(npz, tmp_path):
    arguments = words(npz, tmp_path / "run")
    with started(arguments, TF_CONFIG=worker_config(0, free_ports(2))) as chief:
        assert "waits for worker 1" in chief.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            chief.wait(2)
        chief.send_signal(signal.SIGINT)
        assert_ends(chief, -signal.SIGINT)


def test_taken_port_is_one_line(npz, tmp_path):
    with socket.create_server(("", 0)) as taken:
        ports = [taken.getsockname()[1], *free_ports(1)]
        arguments = words(npz, tmp_path / "run")
        with started(arguments, TF_CONFIG=worker_config(0, ports)) as chief:
            _, error = assert_ends(chief, 2)
    assert "at a port of TF_CONFIG that is free" in error


def meet(monkeypatch, *prepare) -> list[object]:
    """What `start` returns or raises on each worker, connected by threads alone."""
    names = tuple(f"worker {index}" for index in range(len(prepare)))
    values, found = [None] * len(names), [None] * len(names)
    everyone = threading.Barrier(len(names))

    def gather(cluster, value):
        values[cluster.index] = json.loads(json.dumps(value))
        everyone.wait(30)
        return values

    monkeypatch.setattr(distribution, "_gather", gather)
    monkeypatch.setattr(distribution, "_connect", lambda *arguments: "connected")

    def work(index: int) -> None:
        cluster = Cluster(names, index)
        try:
            found[index] = distribution.start(
                cluster, 1, lambda: prepare[index](cluster)
            )
        except ExperimentError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=work, args=[i]) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return found


def test_a_problem_ends_all_workers(monkeypatch):
    def fails(cluster):
        raise ExperimentError(f"none at {cluster.index}")

    def works(cluster):
        return 1, {"seed": 1}

    for workers, expected in (
        ((works, works), [("connected", 1)] * 2),
        ((works, fails), ["worker 1: none at 1"] * 2),
        ((fails, works), ["worker 0: none at 0"] * 2),
        ((fails, fails, works), [f"worker {i}: none at {i}" for i in (0, 1, 0)]),
    ):
        assert meet(monkeypatch, *workers) == expected


def test_workers_compare_settings_data_and_the_state_of_the_run(
    npz, alone, tmp_path, monkeypatch
):
    def prepare(*more, folder=tmp_path):
        arguments = words(npz, folder, "--lbe", *more)
        parser = command.argparse.ArgumentParser()
        command.add_arguments(parser)

        def prepared(cluster):
            with contextlib.ExitStack() as held:
                return command._prepare(parser.parse_args(arguments), cluster, held)

        return prepared

    def agree(first, second):
        one, same = meet(monkeypatch, first, second)
        if isinstance(one, str):
            assert one == same
            return one
        assert one[1].settings == same[1].settings
        return ""

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, b = tmp_path / "a", tmp_path / "b"  # no run there yet: nothing to differ in
    assert not agree(prepare(folder=a), prepare(folder=b))
    assert "(seed: 5, not 1)" in agree(prepare(folder=a), prepare("--seed", 5))
    run = alone()
    line = agree(prepare(folder=run), prepare(folder=b))
    assert re.search("with_lbe: no checkpoint, not checkpoint", line)
    assert "see the chief's folder" in line
    assert not agree(
        prepare("--overwrite", folder=run), prepare("--overwrite", folder=b)
    )
    # The chief alone writes; whom another process keeps from it, tells all of them.
    with results.RunFolder(run).exclusively():
        line = agree(prepare(folder=run), prepare(folder=run))
    assert f"worker 0: {run} is being written by process {os.getpid()}" in line
    again = prepare("--width", 9, folder=run)
    assert "width: 8 there, 9 here" in agree(again, again)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--devices 0", "--devices must be at least 1. Received: 0"),
        ("--devices -1", "--devices must be at least 1. Received: -1"),
        ("--devices 2 --steps-per-execution 2", "--steps-per-execution must be 1"),
    ],
)
def test_bad_arguments_are_one_line(npz, tmp_path, capsys, arguments, message):
    assert command.main(words(npz, tmp_path / "run", *arguments.split())) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


CLUSTER = '"cluster": {"worker": ["a:1", "b:2"]}'
BAD_CONFIGS = {
    "{": "JSONDecodeError",
    "[]": "AttributeError",
    '{"cluster": []}': "AttributeError",
    '{"cluster": {"worker": ["a", "b:2"]}}': "'a' is not host:port",
    '{"cluster": {"worker": ["a:1", "b:x"]}}': "'b:x' is not host:port",
    "{" + CLUSTER + "}": "the task None None is not in the cluster",
    "{" + CLUSTER + ', "task": {"type": "worker", "index": 2}}': "the task worker 2",
    "{" + CLUSTER + ', "task": {"type": "chief", "index": 0}}': "the task chief 0",
    '{"cluster": {"worker": ["a:1"], "ps": ["b:2"]}}': "no ps can take part",
    '{"cluster": {"chief": ["a:1", "b:2"]}}': "there can be one chief",
}


@pytest.mark.parametrize("text", BAD_CONFIGS)
def test_broken_tf_config_is_one_line(npz, tmp_path, capsys, monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    assert command.main(words(npz, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert BAD_CONFIGS[text] in error and "TF_CONFIG" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_tf_config_of_one_worker_is_none(monkeypatch):
    for text in ("", "{}", '{"cluster": {"worker": ["a:1"]}}'):
        monkeypatch.setenv("TF_CONFIG", text)
        assert read() == Cluster() and not read().several
    jobs, task = {"worker": ["a:1"], "chief": ["b:2"]}, {"type": "worker", "index": 0}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": jobs, "task": task}))
    assert read() == Cluster(("chief 0", "worker 0"), 1)
    assert not read().chief and read().name == "worker 0"
    with pytest.raises(ExperimentError, match="must be 1 for workers without a GPU"):
        distribution.check_devices(read(), 2)


read = distribution.read_cluster


@pytest.mark.parametrize("mode", [True, False])
def test_native_mode_reaches_the_threads_of_replicas(monkeypatch, mode):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, str(int(not mode)))
    found = []
    with command._native_in_threads(mode):
        thread = threading.Thread(target=lambda: found.append(native.requested_mode()))
        thread.start()
        thread.join()
    assert found == [mode]
    assert native.requested_mode() is (not mode)
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE)
    with command._native_in_threads(mode):
        assert native.requested_mode() is mode
    assert native.requested_mode() is None
