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

from lbe_ops import native, synchronized
from lbe_ops.experiments import command, distribution, plots
from lbe_ops.experiments.distribution import Cluster
from lbe_ops.experiments.errors import ExperimentError

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
# The last batch has one of the 129 samples, so that only one replica gets any; three of
# them share a whole batch as 22, 22 and 20.
TINY = (
    "--depth 3 --width 8 --epochs 2 --batch-size 64 --learning-rate 0.01 "
    "--schedule constant --initializer glorot_uniform"
)
TIMEOUT = 150.0


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> pathlib.Path:
    """A small data set: noisy images of three patterns, 129 + 41 samples."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (3, 6, 6))
    arrays = {}
    for part, n in (("train", 129), ("test", 41)):
        labels = np.arange(n) % 3
        noise = rng.integers(0, 56, (n, 6, 6))
        arrays[f"x_{part}"] = (patterns[labels] + noise).astype(np.uint8)
        arrays[f"y_{part}"] = labels.astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "patterns.npz"
    np.savez(path, **arrays)
    return path


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
                patch.setattr(plots, "draw", lambda folder, chance: None)
                patch.delenv("TF_CONFIG", raising=False)
                assert command.main(words(npz, folder, *more)) == 0
            made[more] = folder
        return made[more]

    return run


def config(index: int, ports: list[int]) -> str:
    workers = [f"127.0.0.1:{port}" for port in ports]
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": workers}, "task": task})


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("", 0))) for _ in "x" * count
        ]
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def started(arguments: list[str], **environment: str) -> Iterator[subprocess.Popen]:
    """The command in a process of its own, which is gone after the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lbe_ops.experiments", *arguments],
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
        started(arguments, TF_CONFIG=config(0, ports)) as chief,
        started(arguments, TF_CONFIG=config(1, ports)) as other,
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


@pytest.mark.parametrize(
    ("devices", "flag", "net"),
    [(2, "--no-lbe", "without_lbe"), (3, "--lbe", "with_lbe")],
)
def test_devices_give_the_numbers_of_one(npz, alone, tmp_path, devices, flag, net):
    expected = alone()
    folder = tmp_path / "run"
    arguments = words(npz, folder, flag, "--devices", devices)
    with started(arguments) as process:
        output, _ = assert_ends(process, 0)
    assert f"replicas: {devices};" in output
    assert_same_numbers(folder, expected, net)
    written = json.loads((folder / "config.json").read_text())
    assert written["environment"]["replicas"] == str(devices)
    assert "devices" not in written["settings"]


def test_two_processes_of_the_readme_give_the_numbers_of_one(npz, alone, tmp_path):
    """And a run of two workers goes on with one device."""
    expected = alone()
    (example,) = re.findall(r"^```sh\n(.*?)^```$", README.read_text(), re.M | re.S)
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


# The meeting of the workers, in the threads of this process


def meet(
    *prepare: object, indices: tuple[int, ...] = (0, 1), workers: int = 2, ports=()
) -> list[object]:
    """What `agree` returns or raises on each worker."""
    ports = ports or free_ports(workers)
    names = tuple(f"worker {i}" for i in range(workers))
    addresses = tuple(f"127.0.0.1:{port}" for port in ports)
    found: list[object] = [None] * len(indices)

    def worker(place: int, index: int) -> None:
        cluster = Cluster(names, addresses, index)
        try:
            found[place] = distribution.agree(
                cluster, lambda: prepare[place](cluster), lambda line: None
            )
        except ExperimentError as error:
            found[place] = str(error)

    threads = [
        threading.Thread(target=worker, args=each) for each in enumerate(indices)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return found


def test_chief_is_prepared_first():
    order = []

    def prepare(cluster):
        order.append(cluster.index)
        return cluster.name, {"seed": 1, "shape": (6, 6)}

    assert meet(prepare, prepare) == ["worker 0", "worker 1"]
    assert order == [0, 1]


def fails(cluster):
    raise ExperimentError("no data here")


def test_what_fails_or_differs_ends_all_workers():
    one, same = meet(lambda c: (1, {"seed": 1}), lambda c: (1, {"seed": 2}))
    assert one == same
    assert "worker 1 differs from the chief (seed: 2, not 1)" in one
    one, same = meet(lambda c: (1, {}), fails)
    assert one == same == "worker 1: no data here"
    one, same = meet(fails, lambda c: (1, {}))
    assert one == same == "worker 0: no data here"


def test_workers_compare_settings_data_and_the_state_of_the_run(npz, alone, tmp_path):
    def prepare(*more, folder=tmp_path):
        arguments = words(npz, folder, "--lbe", *more)
        parser = command.argparse.ArgumentParser()
        command.add_arguments(parser)
        return lambda cluster: command._prepare(parser.parse_args(arguments), cluster)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, b = tmp_path / "a", tmp_path / "b"  # no run there yet: nothing to differ in
    assert all(
        not isinstance(x, str) for x in meet(prepare(folder=a), prepare(folder=b))
    )
    one, same = meet(prepare(folder=a), prepare("--seed", 5, folder=a))
    assert one == same and "(seed: 5, not 1)" in one
    run = alone()
    one, same = meet(prepare(folder=run), prepare(folder=b))
    assert one == same and re.search("with_lbe: no checkpoint, not checkpoint", one)
    assert "see the chief's folder" in one
    again = prepare("--overwrite", folder=run), prepare("--overwrite", folder=b)
    assert all(not isinstance(x, str) for x in meet(*again))
    one, same = meet(
        prepare("--width", 9, folder=run), prepare("--width", 9, folder=run)
    )
    assert one == same and "width: 8 there, 9 here" in one


def test_missing_workers_and_taken_places_are_named(monkeypatch):
    monkeypatch.setattr(synchronized, "TIMEOUT_SECONDS", 1.0)
    (one,) = meet(lambda c: (1, {}), indices=(0,))
    assert "worker 1 was not there within 1 s" in one
    (one,) = meet(lambda c: (1, {}), indices=(1,))
    assert "worker 0 was not there within 1 s" in one
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        cluster = Cluster(("worker 0", "worker 1"), (address, "127.0.0.1:1"), 0)
        with pytest.raises(ExperimentError, match="is not free"):
            distribution.agree(cluster, lambda: (1, {}), lambda line: None)


def test_taken_port_of_a_worker_ends_all():
    with socket.create_server(("", 0)) as taken:
        places = free_ports(1)[0], taken.getsockname()[1]
        one, same = meet(lambda c: (1, {}), lambda c: (1, {}), ports=places)
    assert one == same and f"port {places[1]}" in one and "is not free" in one


def test_second_process_of_a_worker_ends_all(monkeypatch):
    monkeypatch.setattr(distribution, "PROBLEM_SECONDS", 1.0)
    found = meet(*[lambda c: (1, {})] * 3, indices=(0, 1, 1), workers=3)
    assert len({*found}) == 1 and "a second process calls itself worker 1" in found[0]


def test_strangers_are_not_workers():
    ports = free_ports(2)
    addresses = tuple(f"127.0.0.1:{port}" for port in ports)
    found = []

    def chief():
        cluster = Cluster(("worker 0", "worker 1"), addresses, 0)
        found.append(distribution.agree(cluster, lambda: (1, {}), lambda line: None))

    thread = threading.Thread(target=chief)
    thread.start()
    for text in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\n",
        b"[]\n",
        b"{}\n",
        b"",
    ):
        for _ in range(100):
            with contextlib.suppress(ConnectionRefusedError):
                stranger = socket.create_connection(("127.0.0.1", ports[0]))
                break
            thread.join(0.05)
        stranger.sendall(text)
        stranger.close()
    cluster = Cluster(("worker 0", "worker 1"), addresses, 1)
    assert distribution.agree(cluster, lambda: (2, {}), lambda line: None) == 2
    thread.join(30)
    assert found == [1]


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
    '{"cluster": {"worker": ["a:1", "b:x"]}}': "invalid literal",
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
    assert read() == Cluster(("chief 0", "worker 0"), ("b:2", "a:1"), 1)
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
