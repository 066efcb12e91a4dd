# SPDX-License-Identifier: Apache-2.0
"""Block M6 of the map: does LBE keep a net able to learn, task after task?

    python benchmarks/plasticity.py benchmarks/results/map

A net of 6 ReLU layers learns random labels of the same images, then others, and so on;
nets lose their plasticity so (Lyle et al., arXiv 2303.01486). The arms begin with the
same weights, labels and order of samples: without anything, with LBE, with weights that
are drawn to where they began (Kumar et al., arXiv 2308.11958), and with
LayerNormalization. A line per task goes to DIR/m6.csv, and a table to DIR/m6.md. The
file is written after each net; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import functools
import multiprocessing
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lbe_ops.experiments.map_report import markdown, mean_interval, sign_flip
from lbe_ops.experiments.results import replacing

ARMS = ("none", "lbe", "l2_to_init", "layer_norm")
MEASURES = ("accuracy", "effective_rank", "dead_share")
LAYERS, WIDTH, BATCH, CLASSES = 6, 64, 128, 10
L2 = 1e-3
ENDS = 10  # the tasks at the end that count
Rows = list[dict[str, Any]]


def train(arm: str, seed: int, tasks: int, epochs: int) -> Rows:
    """What a net has come to at the end of each task: rows of the CSV file."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    import keras

    import lbe_ops
    from lbe_ops.experiments import data
    from lbe_ops.measure import Probe

    class L2ToInit(keras.regularizers.Regularizer):
        def __init__(self, initializer: keras.Initializer) -> None:
            self._start = functools.cache(
                lambda shape: keras.ops.convert_to_numpy(initializer(shape))
            )

        def __call__(self, weight: Any) -> Any:
            with tf.init_scope():
                start = self._start(tuple(weight.shape))
            return L2 * keras.ops.sum(keras.ops.square(weight - start))

    x = data.load("digits").x_train
    inputs = keras.Input(x.shape[1:])
    y = keras.layers.Flatten()(inputs)
    for number in range(LAYERS):
        initializer = keras.initializers.HeNormal(1000 * seed + number)
        y = keras.layers.Dense(
            WIDTH,
            kernel_initializer=initializer,
            kernel_regularizer=L2ToInit(initializer) if arm == "l2_to_init" else None,
        )(y)
        if arm == "layer_norm":
            y = keras.layers.LayerNormalization()(y)
        y = keras.layers.ReLU()(y)
    head = keras.initializers.GlorotUniform(seed)
    net = keras.Model(inputs, keras.layers.Dense(CLASSES, kernel_initializer=head)(y))
    if arm == "lbe":
        net = lbe_ops.add_lbe(
            net,
            keras.layers.ReLU,
            LBE_strength=0.1,
            lbe_alpha=1.0,
            lbe_alpha_min=0.05,
        )
    net.compile(
        keras.optimizers.Adam(1e-3, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=len(x) // BATCH,
    )
    probe = Probe(
        net, x[:512], keras.layers.ReLU, measures=("effective_rank", "dead_share")
    )
    rows = []
    for task in range(tasks):
        labels = np.random.default_rng((seed, task)).integers(0, CLASSES, len(x))
        keras.utils.set_random_seed(100_000 + 1000 * seed + task)  # of the order
        net.fit(x, labels, batch_size=BATCH, epochs=epochs, verbose=0)
        accuracy = net.evaluate(x, labels, verbose=0, return_dict=True)["accuracy"]
        measured = probe()
        rows.append(
            {"arm": arm, "seed": seed, "task": task, "accuracy": accuracy}
            | {"effective_rank": float(measured["effective_rank"][-1])}
            | {"dead_share": float(measured["dead_share"].mean())}
        )
    return rows


def at_the_end(rows: Rows, arm: str, measure: str = "accuracy") -> np.ndarray:
    """The mean over the last tasks of every seed."""
    last = max(row["task"] for row in rows)
    of_seed: dict[int, list[float]] = {}
    for row in rows:
        if row["arm"] == arm and row["task"] > last - ENDS:
            of_seed.setdefault(row["seed"], []).append(row[measure])
    return np.array([np.mean(of_seed[seed]) for seed in sorted(of_seed)])


def h14(rows: Rows) -> bool:
    """Whether the hypothesis of benchmarks/results/map/README.md holds."""
    lbe = at_the_end(rows, "lbe")
    least = {arm: mean_interval(lbe - at_the_end(rows, arm))[0] for arm in ARMS}
    return least["none"] > 0 >= max(least["l2_to_init"], least["layer_norm"])


def table(rows: Rows) -> str:
    """Of each arm the first task and the mean of the last, with differences."""

    def text(values: Sequence[float], sign: str = "") -> str:
        low, high = mean_interval(values)
        form = f"{sign}.3f"
        return f"{np.mean(values):{form}} [{low:{form}}, {high:{form}}]"

    header = ["arm", "first task", f"last {ENDS} tasks", "minus none", "p"]
    header += ["minus l2_to_init", "minus layer_norm", "effective rank", "dead share"]
    lines = []
    for arm in ARMS:
        found = at_the_end(rows, arm)
        against = []
        for base in ("none", "l2_to_init", "layer_norm"):
            differences = found - at_the_end(rows, base)
            same = base == arm
            against.append("" if same else text(differences, "+"))
            if base == "none":
                against.append("" if same else f"{sign_flip(differences):.3g}")
        first = [r["accuracy"] for r in rows if r["arm"] == arm and r["task"] == 0]
        cells = [arm, text(first), text(found), *against]
        cells += [text(at_the_end(rows, arm, measure)) for measure in MEASURES[1:]]
        lines.append(cells)
    verdict = "holds" if h14(rows) else "is **refuted**"
    return f"{markdown(header, lines)}\nH14 {verdict}.\n"


def read(path: pathlib.Path) -> Rows:
    """The nets that are in the CSV file already, for a run that goes on."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {"arm": row["arm"], "seed": int(row["seed"]), "task": int(row["task"])}
            | {name: float(row[name]) for name in MEASURES}
            for row in csv.DictReader(file)
        ]


def write(path: pathlib.Path, rows: Rows) -> None:
    """The CSV file of all nets so far, whatever order they have ended in."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in sorted(
            rows, key=lambda row: (row["seed"], ARMS.index(row["arm"]), row["task"])
        ):
            writer.writerow(row | {name: f"{row[name]:.6g}" for name in MEASURES})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=40, help="of each task")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "m6.csv"
    rows = read(path)
    if rows and (tasks := 1 + max(row["task"] for row in rows)) != arguments.tasks:
        parser.error(f"{path} has {tasks} tasks of a net, not {arguments.tasks}")
    done = {(row["arm"], row["seed"]) for row in rows}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.processes, spawn) as pool:
        jobs = [
            pool.submit(train, arm, seed, arguments.tasks, arguments.epochs)
            for seed in range(1, arguments.seeds + 1)
            for arm in ARMS
            if (arm, seed) not in done
        ]
        for number, job in enumerate(concurrent.futures.as_completed(jobs), 1):
            rows += job.result()
            write(path, rows)
            print(f"{number} of {len(jobs)} nets", flush=True)
    text = table(read(path))
    with replacing(path.with_suffix(".md")) as temporary:
        temporary.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
