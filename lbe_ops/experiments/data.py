# SPDX-License-Identifier: Apache-2.0
"""Data sets: images that are bundled, downloaded or a local .npz; and text."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import zlib
from typing import Any

import keras
import numpy as np

from lbe_ops.experiments.errors import ExperimentError
from lbe_ops.experiments.settings import TEXT

DOWNLOADED = ("mnist", "fashion_mnist", "cifar10", "cifar100")
KEYS = ("x_train", "y_train", "x_test", "y_test")
# Modules of Python's library which are one file of more than so many characters from
# 3.10 to 3.13; the last tenth of what is taken of each is for validation.
SOURCES = (
    *("argparse", "ast", "calendar", "configparser", "dataclasses", "difflib"),
    *("doctest", "functools", "imaplib", "inspect", "ipaddress", "mailbox"),
    *("optparse", "pdb", "pickle", "platform", "plistlib", "pydoc", "random"),
    *("shutil", "smtplib", "socket", "statistics", "subprocess", "tarfile"),
    *("tempfile", "threading", "traceback", "typing", "uuid"),
)
SOURCE_LENGTH = 20_000
CHARACTERS = 128  # those of ASCII; all others count as "?"


@dataclasses.dataclass(frozen=True)
class Data:
    """A training and a test (validation) set.

    Attributes:
        x_train, x_test: float32 `[n, height, width, channels]` or `[n, features]`; of
            text, int32 `[n, context]`, characters in `[0, classes)`.
        y_train, y_test: int32 labels in `[0, classes)`, `[n]`; of text `[n, context]`,
            for each character the next one.
        classes: the number of classes.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.x_train.shape[1:]

    @property
    def chance(self) -> float:
        """Test accuracy of always answering the class most frequent there."""
        return float(np.bincount(self.y_test.ravel()).max() / self.y_test.size)

    def describe(self) -> dict[str, Any]:
        """Sizes and a checksum, by which a resumed run knows its data."""
        checksum = 0
        for key in KEYS:
            checksum = zlib.crc32(getattr(self, key), checksum)
        return {
            "train": len(self.x_train),
            "test": len(self.x_test),
            "shape": list(self.shape),
            "classes": self.classes,
            "crc32": f"{checksum:08x}",
        }


def load(name: str, scaling: str = "unit", context: int = 64) -> Data:
    """Loads a data set and scales its values.

    Args:
        name: `digits` (scikit-learn's, offline; a fixed stratified split, 80 % for
            training), `mnist`, `fashion_mnist`, `cifar10` or `cifar100` (downloaded
            by Keras), or the path of an `.npz` with `x_train`, `y_train`, `x_test`,
            `y_test`: uint8 or floating point; or `text`, the beginnings of 30
            modules of the library of the Python that runs (another version of it has
            other text, and another checksum).
        scaling: `unit`: uint8 to [0, 1], floating-point values stay as they are;
            `symmetric`: uint8, and what lies in [0, 1], to [-1, 1]. Text has no values
            to scale.
        context: the length of a sample of text.

    Raises:
        ExperimentError: data that cannot be read or do not fit.
    """
    if name == TEXT:
        return _text(context)
    if name == "digits":
        arrays = _digits()
    elif name in DOWNLOADED:
        arrays = _download(name)
    elif name.endswith(".npz"):
        arrays = _read(pathlib.Path(name))
    else:
        known = ", ".join(("digits", *DOWNLOADED, TEXT))
        raise ExperimentError(
            f"--data must be one of {known} or the path of an .npz. Received: {name}"
        )
    return _checked(name, arrays, scaling)


def _text(context: int) -> Data:
    validation = SOURCE_LENGTH // 10
    if context >= validation:
        raise ExperimentError(
            f"--context must be less than {validation}. Received: {context}"
        )
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for name in SOURCES:
        path = pathlib.Path(os.__file__).with_name(f"{name}.py")
        try:
            source = path.read_text("utf-8")[:SOURCE_LENGTH]
        except (OSError, UnicodeError) as error:
            raise ExperimentError(
                f"--data text needs the sources of Python's library: {error}"
            ) from error
        codes = np.frombuffer(source.encode("ascii", "replace"), np.uint8)
        for part, piece in zip(
            ("train", "test"), np.split(codes, [len(codes) - validation]), strict=True
        ):
            # Each sample begins with what the one before had to tell at last.
            starts = np.arange(0, len(piece) - context, context)
            parts[part].append(piece[starts[:, None] + np.arange(context + 1)])
    arrays = {key: np.concatenate(x).astype(np.int32) for key, x in parts.items()}
    x, y = (
        {
            key: np.ascontiguousarray(rows[:, first : first + context])
            for key, rows in arrays.items()
        }
        for first in (0, 1)
    )
    return Data(x["train"], y["train"], x["test"], y["test"], classes=CHARACTERS)


def _digits() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        (digits.images / 16).astype(np.float32),
        digits.target,
        test_size=0.2,
        stratify=digits.target,
        random_state=0,
    )
    return dict(zip(("x_train", "x_test", "y_train", "y_test"), parts, strict=True))


def _download(name: str) -> dict[str, np.ndarray]:
    try:
        train, test = getattr(keras.datasets, name).load_data()
    except Exception as error:  # Keras raises Exception itself
        reason = str(error).strip().splitlines()[0] if str(error) else repr(error)
        raise ExperimentError(
            f"{name} could not be downloaded ({reason}); give a local copy with "
            f"--data {name}.npz (x_train, y_train, x_test, y_test)"
        ) from error
    return dict(zip(KEYS, (*train, *test), strict=True))


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file) as archive:
            missing = [key for key in KEYS if key not in archive]
            if missing:
                raise ExperimentError(
                    f"{path} lacks {', '.join(missing)}; it must have {', '.join(KEYS)}"
                )
            return {key: archive[key] for key in KEYS}
    except (ExperimentError, MemoryError):
        raise
    except (OSError, EOFError, ValueError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "not an .npz of plain arrays"
        raise ExperimentError(f"{path} cannot be read: {reason}") from error
    except Exception as error:  # zipfile, zlib and NumPy's parser have many
        raise ExperimentError(f"{path} cannot be read: it is damaged") from error


def _checked(name: str, arrays: dict[str, np.ndarray], scaling: str) -> Data:
    images = {
        key: _images(name, key, arrays[key], scaling) for key in ("x_train", "x_test")
    }
    labels = {key: _labels(name, key, arrays[key]) for key in ("y_train", "y_test")}
    for part in ("train", "test"):
        x, y = images[f"x_{part}"], labels[f"y_{part}"]
        if len(x) != len(y) or len(x) < 2:
            raise ExperimentError(
                f"{name}: x_{part} and y_{part} must have the same length, at least "
                f"2. Received: {len(x)} and {len(y)}"
            )
    if images["x_train"].shape[1:] != images["x_test"].shape[1:]:
        raise ExperimentError(
            f"{name}: samples of x_train and x_test differ in shape: "
            f"{images['x_train'].shape[1:]} and {images['x_test'].shape[1:]}"
        )
    classes = int(labels["y_train"].max()) + 1
    highest = max(classes - 1, int(labels["y_test"].max()))
    if highest >= classes or classes > len(labels["y_train"]):
        raise ExperimentError(
            f"{name}: labels must be 0 ... classes - 1, every one of the test labels "
            f"among those for training. Received: a highest label of {highest}"
        )
    if scaling == "symmetric":
        images = {key: 2 * x - 1 for key, x in images.items()}
    return Data(**images, **labels, classes=classes)


def _images(name: str, key: str, x: np.ndarray, scaling: str) -> np.ndarray:
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise ExperimentError(
            f"{name}: {key} must have the shape [n, features], [n, height, width] or "
            f"[n, height, width, channels]. Received: {list(x.shape)}"
        )
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / 255
    elif np.issubdtype(x.dtype, np.floating):
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise ExperimentError(
                f"{name}: {key} contains NaN, infinity, or more than float32 can hold"
            )
        if scaling == "symmetric" and (x.min() < 0 or x.max() > 1):
            raise ExperimentError(
                f"{name}: with --scaling symmetric floating-point values of {key} must "
                "lie in [0, 1]; --scaling unit takes them as they are. "
                f"Received: [{x.min():g}, {x.max():g}]"
            )
    else:
        raise ExperimentError(
            f"{name}: {key} must be uint8 or floating point. Received: {x.dtype}"
        )
    x = x[..., None] if x.ndim == 3 else x
    return np.ascontiguousarray(x)


def _labels(name: str, key: str, y: np.ndarray) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ExperimentError(
            f"{name}: {key} must be integer labels of shape [n]. "
            f"Received: {y.dtype} of shape {list(y.shape)}"
        )
    if len(y) and (y.min() < 0 or y.max() > np.iinfo(np.int32).max):
        raise ExperimentError(
            f"{name}: {key} must not be negative or huge. "
            f"Received: labels from {y.min()} to {y.max()}"
        )
    return np.ascontiguousarray(y, np.int32)
