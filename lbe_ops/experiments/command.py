# SPDX-License-Identifier: Apache-2.0
"""The command: trains a deep plain net with and without LBE, and compares."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import math
import os
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import lbe_ops
from lbe_ops.experiments import data as data_module
from lbe_ops.experiments import distribution
from lbe_ops.experiments import settings as settings_module
from lbe_ops.experiments.ending import exit_status
from lbe_ops.experiments.errors import ExperimentError
from lbe_ops.experiments.results import NETS, RunFolder, write_json
from lbe_ops.experiments.settings import PRESETS, Settings, stem
from lbe_ops.experiments.tasks import Classification, Reconstruction, task_of

DESCRIPTION = """\
Trains a deep network (a plain one, without normalization and shortcuts, unless
--model and --norm say otherwise) with and without LBE and compares them:
configuration, history, weights and plots go to a folder. The same command continues
an interrupted run, to the same numbers. Without arguments: the preset `mnist`, 500
layers, some 10 minutes for each net on two cores. The presets `demo`, `vae` and
`transformer` take a few minutes and download nothing. `--devices 2` trains on two
GPUs of this machine (without any, on two devices made of its CPU), and the same
command on every worker that the environment variable TF_CONFIG names on several
machines, both with the numbers of one device, to rounding.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run` to a parser.

    Args:
        parser: gets the arguments, a description and a usage line.
    """
    parser.description = DESCRIPTION
    parser.usage = "%(prog)s [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    run_group = parser.add_argument_group("run")
    run_group.add_argument(
        "--preset",
        choices=PRESETS,
        help="settings to start from; arguments given override them (default: mnist; "
        "the defaults below are mnist's)",
    )
    nets = run_group.add_mutually_exclusive_group()
    for flag, names in (
        ("--lbe", ["with_lbe"]),
        ("--no-lbe", ["without_lbe"]),
        ("--both", list(NETS)),
    ):
        nets.add_argument(
            flag,
            dest="nets",
            action="store_const",
            const=names,
            help=f"train {' and '.join(names)}".replace("_", " ")
            + (" (default)" if flag == "--both" else ""),
        )
    run_group.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the results (default: results/NAME)",
    )
    run_group.add_argument(
        "--name",
        help="name of that folder (default: the preset's, or one made from the "
        "settings)",
    )
    run_group.add_argument(
        "--resume",
        metavar="DIR",
        help="continue the run in DIR with its own settings; arguments must not "
        "differ, except for more --epochs",
    )
    run_group.add_argument(
        "--overwrite", action="store_true", help="remove earlier results of the folder"
    )
    run_group.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="replicas that share each batch: the first N GPUs or, without one, N "
        "devices made of the CPU; with TF_CONFIG, on each worker (default: 1)",
    )

    for field in dataclasses.fields(Settings):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        _add_setting(group, field)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Args:
        arguments: what a parser with `add_arguments` made.

    Returns:
        The exit status, as `ending.exit_status` makes it. Other workers that do not
        come in time end the whole process, with 1.
    """

    def work() -> None:
        with contextlib.ExitStack() as held:
            _run(arguments, held)

    return exit_status(work, "the same command continues after the last finished epoch")


def main(argv: list[str] | None = None) -> int:
    """The command line `python -m lbe_ops.experiments`."""
    parser = argparse.ArgumentParser(prog="python -m lbe_ops.experiments")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _add_setting(group: Any, field: dataclasses.Field) -> None:
    """Adds the argument for a field of `Settings` to a group of a parser."""
    default, choices = field.default, field.metadata["choices"]
    options: dict[str, Any] = {}
    if field.type == "bool":
        options["action"] = argparse.BooleanOptionalAction
        default = "on" if default else "off"
    else:
        options["type"] = {"int": int, "float": float, "str": str}[field.type]
        if choices:
            options["choices"] = choices
        else:
            options["metavar"] = "S" if field.type == "str" else "X"
    text = f"{field.metadata['help']} (default: {default})"
    group.add_argument(
        f"--{field.name.replace('_', '-')}",
        default=argparse.SUPPRESS,  # so that only what is given overrides a preset
        help=text.replace("%", "%%"),
        **options,
    )


def _run(arguments: argparse.Namespace, held: contextlib.ExitStack) -> None:
    cluster = distribution.read_cluster()
    strategy, plan = distribution.start(
        cluster, arguments.devices, lambda: _prepare(arguments, cluster, held)
    )
    settings, data, folder = plan.settings, plan.data, plan.folder
    # Imported here, since they need what was just checked.
    from lbe_ops.experiments import nets as nets_module
    from lbe_ops.experiments import plots
    from lbe_ops.experiments.train import train

    replicas = distribution.describe(strategy, cluster)
    native = settings_module.NATIVE_MODES[settings.native]
    with (
        distribution.together(cluster),
        lbe_ops.use_native(native),
        _native_in_threads(native if replicas else None),
    ):
        nets_module.check(settings, data.x_train[:2], data.classes)
        if cluster.chief:
            config = {
                **plan.config,
                "environment": _environment(plan.op),
                "command": _command_line(arguments),
            }
            if replicas:
                config["environment"]["replicas"] = replicas
            if arguments.overwrite:
                folder.clear()
            changed = folder.open(config)
            if changed:
                print(
                    f"note: the run began elsewhere, last bits may differ ({changed})"
                )
        print(
            f"{stem(settings.data)}: {len(data.x_train)} training and "
            f"{len(data.x_test)} validation samples, {data.classes} classes; "
            f"{settings.depth} {settings.model} layers x {settings.width}, "
            f"{settings.activation}, {settings.initializer}; batch entropy: {plan.op}; "
            + f"replicas: {replicas}; " * bool(replicas)
            + f"results in {folder.path}"
            + f", written by {cluster.names[0]}" * cluster.several,
            flush=True,
        )
        for net in plan.nets:
            title = net.replace("_lbe", " LBE")
            if net in plan.finished:
                print(
                    f"{title}: finished earlier, nothing to train "
                    "(--overwrite trains anew)"
                )
                continue
            started = time.perf_counter()
            train(
                settings,
                data,
                folder.net(net),
                NETS[net],
                lambda line, title=title: print(f"{title}: {line}", flush=True),
                strategy=strategy,
                write=cluster.chief,
                resume=not arguments.overwrite,
            )
            print(f"{title}: {time.perf_counter() - started:.0f} s", flush=True)
        if cluster.chief:
            task = task_of(settings)
            chance = task.chance(data)
            plots.draw(folder, chance, task)
            _summarize(folder, chance, task)
        distribution.wait_for_all(strategy, cluster)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is to be trained, and where.

    Attributes:
        finished: those of the nets that are trained already.
        config: settings, data and nets, for the folder.
        op: which op serves.
    """

    settings: Settings
    data: data_module.Data
    folder: RunFolder
    nets: list[str]
    finished: list[str]
    config: dict[str, Any]
    op: str


def _prepare(
    arguments: argparse.Namespace,
    cluster: distribution.Cluster,
    held: contextlib.ExitStack,
) -> tuple[_Plan, dict[str, Any]]:
    """The plan, and what of it must be the same on all workers; starts no device.

    The chief, which alone writes, keeps others from it as long as `held` is open.
    """
    given = vars(arguments)
    distribution.check_devices(cluster, arguments.devices)
    folder, base, nets = _start(given)
    settings = Settings.from_mapping({**base, **given})
    if settings.steps_per_execution > 1 and (cluster.several or arguments.devices > 1):
        raise ExperimentError(
            "--steps-per-execution must be 1 for several devices: TensorFlow cannot "
            f"add up over them in a loop. Received: {settings.steps_per_execution}"
        )
    _check_installed(settings)
    if folder is None:
        name = given["name"] or settings.default_name()
        folder = RunFolder(pathlib.Path(given["output"] or f"results/{name}"))
    data = data_module.load(settings.data, settings.scaling, settings.context)
    with lbe_ops.use_native(settings_module.NATIVE_MODES[settings.native]):
        try:
            op = "native" if lbe_ops.native.select() else "plain TensorFlow"
        except (ValueError, lbe_ops.NativeUnavailableError) as error:
            raise ExperimentError(str(error)) from error
    config = {"settings": settings.as_dict(), "data": data.describe(), "nets": nets}
    if cluster.chief:
        folder.check(config, arguments.overwrite)
        held.enter_context(folder.exclusively())
    finished, states = [], dict.fromkeys(nets, "overwritten")
    if not arguments.overwrite:
        finished = [net for net in nets if folder.net(net).finished(settings.epochs)]
        if cluster.several:
            states = {net: folder.net(net).state(settings.epochs) for net in nets}
    facts = {
        **config["settings"],
        **config["data"],
        "data": stem(settings.data),
        "devices": arguments.devices,
        "batch entropy": op,
        "lbe_ops": lbe_ops.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        **states,
    }
    return _Plan(settings, data, folder, nets, finished, config, op), facts


@contextlib.contextmanager
def _native_in_threads(native: bool | None) -> Iterator[None]:
    """`use_native` for the threads of replicas, which it does not reach."""
    name = lbe_ops.native.ENVIRONMENT_VARIABLE
    before = os.environ.get(name)
    if native is not None:
        os.environ[name] = str(int(native))
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif native is not None:
            del os.environ[name]


def _start(
    given: Mapping[str, Any],
) -> tuple[RunFolder | None, Mapping[str, Any], list[str]]:
    """The folder to resume, the settings to start from, and the nets to train."""
    if given["resume"] is None:
        return None, PRESETS[given["preset"] or "mnist"], given["nets"] or list(NETS)
    for other in ("preset", "output", "name", "overwrite"):
        if given[other]:
            raise ExperimentError(f"--resume and --{other} exclude each other")
    folder = RunFolder(pathlib.Path(given["resume"]))
    config = folder.config()
    if config is None:
        raise ExperimentError(f"{folder.path} holds no run to resume")
    return folder, config["settings"], given["nets"] or config["nets"]


def _check_installed(settings: Settings) -> None:
    """Fails before hours of training and not after them."""
    needed = ["matplotlib", "rich"] + ["sklearn"] * (settings.data == "digits")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ExperimentError(
            f"{', '.join(missing)} not installed; pip install 'lbe_ops[experiments]'"
        )


def _command_line(arguments: argparse.Namespace) -> str:
    mounted = getattr(arguments, "command", None) == "train"
    program = "lbe-ops" if mounted else "python -m lbe_ops.experiments"
    return f"{program} {shlex.join(sys.argv[1:])}".rstrip()


def _environment(op: str) -> dict[str, Any]:
    return {
        "lbe_ops": lbe_ops.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "devices": [device.device_type for device in tf.config.list_logical_devices()],
        "batch_entropy": op,
    }


def _summarize(
    folder: RunFolder, chance: float, task: Classification | Reconstruction
) -> None:
    """Writes summary.json and prints it as a table."""
    from rich.console import Console
    from rich.table import Table

    figures = {net: _figures(folder.net(net).history(), task) for net in NETS}
    figures = {net: values for net, values in figures.items() if values}
    write_json(folder.path / "summary.json", {"chance": chance, **figures})
    table = Table("", *(net.replace("_lbe", " LBE") for net in figures))
    for key in next(iter(figures.values())) | figures.get("with_lbe", {}):
        cells = [values.get(key) for values in figures.values()]
        table.add_row(
            key.replace("_", " ").replace("val ", "validation "),
            *("" if cell is None else f"{cell:.4g}" for cell in cells),
        )
    table.caption = f"{task.by_chance}: {chance:.3f}"
    Console().print(table)
    print(f"results, weights and plots: {folder.path}")


def _figures(
    rows: list[dict[str, float]], task: Classification | Reconstruction
) -> dict[str, float]:
    """The final figures of a history; empty for a net that was not trained."""
    if not rows:
        return {}
    names = (task.score, "kl", "ce", "lbe", "max_lbe")
    final = {
        key: rows[-1][key]
        for name in names
        for key in (name, f"val_{name}")
        if key in rows[-1]
    }
    score = f"val_{task.score}"
    known = [row for row in rows if not math.isnan(row[score])] or rows
    best = task.best(known, key=lambda row: row[score])
    return {
        "epochs": len(rows),
        **final,
        f"best_{score}": best[score],
        "best_epoch": best["epoch"],
        "seconds": round(sum(row["seconds"] for row in rows), 1),
    }
