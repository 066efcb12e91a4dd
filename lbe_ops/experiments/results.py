# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what is in it, written so that no file is ever half there.

- `config.json`: settings, data, versions, command line
- `summary.json`: the final figures of each net
- `*.png`: plots, with and without LBE on the same axes
- `.lock`: there while a process writes to the folder, see `lock.py`
- `with_lbe/`, `without_lbe/`: a folder for each net, with
    - `checkpoint.npz`: weights, optimizer state and history after the last epoch
    - `history.csv`, `history.json`: a row for each epoch
    - `entropy.csv`: batch entropy over depth, before and after training
    - `model.weights.h5`: the trained weights; there once the net is finished
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import pathlib
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from lbe_ops.experiments import lock
from lbe_ops.experiments.errors import ExperimentError
from lbe_ops.experiments.settings import Settings

NETS = {"without_lbe": False, "with_lbe": True}
PLOTS = (
    *("accuracies", "crossentropy", "reconstruction", "loss"),
    *("LBE_loss", "Max_LBE_loss", "entropy"),
)
# By the last one the folder is known.
RUN_FILES = (*(f"{plot}.png" for plot in PLOTS), "summary.json", "config.json")
NET_FILES = (
    "checkpoint.npz",
    "history.csv",
    "history.json",
    "entropy.csv",
    "model.weights.h5",
)
LOCK = ".lock"
TEMPORARY = ".tmp-"


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path, which takes the place of `path` when the block succeeds.

    No two blocks have the same one: where several write one file, the last one wins.

    Args:
        path: the file to write; its folder is made if need be.

    Returns:
        A context manager for the path to write to.

    Raises:
        OSError: the file cannot be written; its name is in the error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        # On the disk before the name is: a crash must not leave an empty file.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)) and error.errno:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value as indented JSON, with null for what JSON has no number for.

    Args:
        path: the file to write.
        value: nested mappings, sequences and plain values.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps(_finite(value), indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with the same keys as CSV.

    Args:
        path: the file to write.
        rows: at least one; the keys of the first are the header.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@dataclasses.dataclass
class Progress:
    """What a net has behind it.

    Attributes:
        rows: one mapping for each finished epoch.
        plateau: the state of the learning rate's reduction.
    """

    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    plateau: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class NetFolder:
    """The results of one net."""

    path: pathlib.Path

    @property
    def checkpoint(self) -> pathlib.Path:
        """The file that a run resumes from."""
        return self.path / "checkpoint.npz"

    @property
    def weights(self) -> pathlib.Path:
        """The trained weights, the last file that a finished net writes."""
        return self.path / "model.weights.h5"

    def history(self) -> list[dict[str, float]]:
        """The rows written so far.

        Returns:
            A mapping for each epoch, NaN standing for what was not finite; empty
            where the net was not trained.

        Raises:
            ExperimentError: the file cannot be read, or is no history.
        """
        path = self.path / "history.json"
        rows = _read_json(path) if path.exists() else []
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ExperimentError(f"{path} is not the history of a run")
        return [
            {key: math.nan if value is None else value for key, value in row.items()}
            for row in rows
        ]

    def finished(self, epochs: int) -> bool:
        """Whether this net was trained for so many epochs and is complete.

        Args:
            epochs: the epochs it is to be trained for.

        Returns:
            True where nothing is left to do.

        Raises:
            ExperimentError: the history cannot be read.
        """
        return self.weights.exists() and len(self.history()) >= epochs

    def state(self, epochs: int) -> str:
        """What a training would begin from, for workers to compare.

        Args:
            epochs: the epochs it is to be trained for.

        Returns:
            Equal texts for equal states only.

        Raises:
            ExperimentError: a file cannot be read.
        """
        try:
            checksum = zlib.crc32(self.checkpoint.read_bytes())
        except FileNotFoundError:
            return "no checkpoint"
        except OSError as error:
            raise ExperimentError(
                f"{self.checkpoint} cannot be read: {error.strerror}"
            ) from error
        return f"checkpoint {checksum:08x}" + ", finished" * self.finished(epochs)

    def entropies(self) -> dict[str, list[float]]:
        """Batch entropy over depth, before and after training.

        Returns:
            `before` and `after`: a value for each hidden layer.

        Raises:
            OSError: the net is not finished.
        """
        with (self.path / "entropy.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {key: [float(row[key]) for row in rows] for key in ("before", "after")}

    def save(self, net: keras.Model, progress: Progress) -> None:
        """Saves everything that the next epoch depends on, then the history.

        Args:
            net: the net after an epoch.
            progress: what it has behind it, that epoch included.

        Raises:
            OSError: the files cannot be written.
        """
        self.weights.unlink(missing_ok=True)
        variables = _variables(net)
        with replacing(self.checkpoint) as temporary:
            np.savez(
                temporary,
                progress=np.array(json.dumps(dataclasses.asdict(progress))),
                **{f"v{i}": v.numpy() for i, v in enumerate(variables)},
            )
        self.write_history(progress.rows)

    def restore(self, net: keras.Model) -> Progress:
        """Puts a net where `save` left it; a fresh start where it did not run.

        Args:
            net: a net made of the same settings; its variables are overwritten.

        Returns:
            What it has behind it.

        Raises:
            ExperimentError: the checkpoint is damaged or that of another net.
        """
        if not self.checkpoint.exists():
            return Progress()
        try:
            with self.checkpoint.open("rb") as file, np.load(file) as saved:
                values = [saved[f"v{i}"] for i in range(len(saved) - 1)]
                progress = Progress(**json.loads(str(saved["progress"])))
            for variable, value in zip(_variables(net), values, strict=True):
                variable.assign(value)
        except Exception as error:  # an archive can be damaged in many ways
            raise ExperimentError(
                f"{self.checkpoint} is damaged or of another version; train anew with "
                "--overwrite"
            ) from error
        return progress

    def write_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Writes the history for readers.

        Args:
            rows: a mapping for each epoch, at least one.

        Raises:
            OSError: the files cannot be written.
        """
        write_csv(self.path / "history.csv", rows)
        write_json(self.path / "history.json", rows)

    def finish(
        self, net: keras.Model, before: Sequence[float], after: Sequence[float]
    ) -> None:
        """Writes the entropies over depth and, last, the weights.

        Args:
            net: the trained net.
            before: batch entropy of each hidden layer before training.
            after: likewise, after training.

        Raises:
            OSError: the files cannot be written.
        """
        numbers = range(1, len(before) + 1)
        rows = [
            {"layer": layer, "before": first, "after": last}
            for layer, first, last in zip(numbers, before, after, strict=True)
        ]
        write_csv(self.path / "entropy.csv", rows)
        weights = _Memory()
        net.save_weights(weights)
        with replacing(self.weights) as temporary:
            temporary.write_bytes(weights.getbuffer())


class _Memory(io.BytesIO):
    """What Keras writes weights to as to a file, whose name it looks at.

    HDF5 would write to a file by itself, and on a full disk it ends the process by a
    segmentation fault, or fills the screen when Python frees what was not written.
    """

    def __str__(self) -> str:
        return ".weights.h5"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The results of one run: its configuration, its nets, its plots."""

    path: pathlib.Path

    def net(self, name: str) -> NetFolder:
        """The folder of `with_lbe` or `without_lbe`."""
        return NetFolder(self.path / name)

    def chance(self) -> float | None:
        """The score by chance; None where no run has come to its end yet.

        Raises:
            ExperimentError: the summary cannot be read.
        """
        path = self.path / "summary.json"
        return _read_json(path)["chance"] if path.exists() else None

    def exclusively(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from writing to the folder, in a `with` block.

        Raises:
            ExperimentError: one does, or the folder cannot be written.
        """
        return lock.exclusive(self.path / LOCK, self.path)

    def config(self) -> dict[str, Any] | None:
        """What `open` wrote.

        Returns:
            The configuration, or None where there is none.

        Raises:
            ExperimentError: it cannot be read, or is not that of a run.
        """
        path = self.path / "config.json"
        if not path.exists():
            return None
        config = _read_json(path)
        parts = {"settings", "data", "nets", "environment"}
        mappings = parts - {"nets"}
        if not (
            isinstance(config, dict)
            and parts <= config.keys()
            and all(isinstance(config[part], dict) for part in mappings)
        ):
            raise ExperimentError(f"{path} is not that of a run; choose another folder")
        return config

    def open(self, config: dict[str, Any]) -> str:
        """Makes the folder, or checks that it holds a run of this configuration.

        What is left of files that a killed process was writing is removed.

        Args:
            config: settings, data, nets and environment of this run.

        Returns:
            What has changed in the environment since; empty where nothing has.

        Raises:
            ExperimentError: it holds something else.
        """
        self.check(config)
        earlier = self.config()
        environment = ""
        if earlier is not None:
            environment = _differences(earlier["environment"], config["environment"])
            nets = {*earlier["nets"], *config["nets"]}
            config = {**config, "nets": [net for net in NETS if net in nets]}
        try:
            for net in NETS:
                _remove_temporary(self.path / net, NET_FILES)
            _remove_temporary(self.path, RUN_FILES)
            write_json(self.path / "config.json", config)
        except OSError as error:
            raise ExperimentError(
                f"{self.path} cannot be written: {error.strerror}"
            ) from error
        return environment

    def check(self, config: dict[str, Any], overwrite: bool = False) -> None:
        """Fails where `open` would (or `clear`, to overwrite), and changes nothing.

        Args:
            config: settings and data of this run.
            overwrite: whether the run that is there may be another one.

        Raises:
            ExperimentError: the folder holds something else.
        """
        self._require_own()
        earlier = self.config()
        if earlier is not None and not overwrite:
            changed = _changes(earlier, config)
            if changed:
                raise ExperimentError(
                    f"{self.path} holds a run with other settings ({changed}); choose "
                    "another --output, or --overwrite it"
                )
            done = max(len(self.net(net).history()) for net in NETS)
            if config["settings"]["epochs"] < done:
                raise ExperimentError(
                    f"{self.path} holds {done} epochs already, more than "
                    f"--epochs {config['settings']['epochs']}; choose another "
                    "--output, or --overwrite it"
                )

    def clear(self) -> None:
        """Removes what a run wrote, and nothing else.

        Raises:
            ExperimentError: the folder is not that of a run, or cannot be cleared.
        """
        self._require_own()
        try:
            for net in NETS:
                _remove(self.path / net, NET_FILES)
            _remove(self.path, RUN_FILES)
        except OSError as error:
            raise ExperimentError(
                f"{self.path} cannot be cleared: {error.strerror}"
            ) from error

    def _require_own(self) -> None:
        """Fails for a folder that is neither empty (or absent) nor that of a run."""
        try:
            names = {p.name for p in self.path.iterdir()} if self.path.exists() else ()
        except OSError as error:
            raise ExperimentError(
                f"{self.path} cannot be read: {error.strerror}"
            ) from error
        foreign = [
            name
            for name in names
            if name != LOCK
            and not (name.startswith(TEMPORARY) and name.endswith("config.json"))
        ]
        if self.config() is None and foreign:
            raise ExperimentError(
                f"{self.path} is neither empty nor the folder of a run; choose another "
                "--output"
            )


def _remove(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Removes these files, what is left of writing them, and an empty folder."""
    if not folder.is_dir():
        return
    _remove_temporary(folder, names)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _remove_temporary(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Removes what is left of writing these files."""
    for name in names:
        for path in folder.glob(f"{TEMPORARY}*{name}"):
            path.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """The value with None for each number in it that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _changes(earlier: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What differs between two configurations and decides the numbers; or ''."""
    # Data are known by their checksum, wherever they are.
    return _differences(
        *(
            {**Settings.from_mapping(c["settings"]).identity(), "data": 0, **c["data"]}
            for c in (earlier, config)
        )
    )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{key}: {before.get(key)} there, {now.get(key)} here"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    )


def _variables(net: keras.Model) -> list[keras.Variable]:
    return [*net.weights, *net.optimizer.variables]


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{path} cannot be read: {error}") from error
