# SPDX-License-Identifier: Apache-2.0
"""The command: trains a deep plain net with and without LBE, and compares."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
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
from lbe_ops.experiments import distribution, report
from lbe_ops.experiments import settings as settings_module
from lbe_ops.experiments.ending import exit_status
from lbe_ops.experiments.errors import ExperimentError, require_installed
from lbe_ops.experiments.results import NETS, RunFolder
from lbe_ops.experiments.settings import PRESETS, Settings, stem
from lbe_ops.experiments.tasks import task_of

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
    place = run_group.add_mutually_exclusive_group()
    place.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the results (default: results/NAME)",
    )
    place.add_argument(
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
        "--dry-run",
        action="store_true",
        help="train and write nothing: print all settings, and by a few steps on one "
        "device how many parameters, how much memory and how much time it takes",
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
        options["type"] = {"int": int, "float": float, "str": str}[str(field.type)]
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
    if arguments.dry_run:
        _dry_run(_prepare(arguments, cluster, held)[0])
        return
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
            _described(plan)
            + f"replicas: {replicas}; " * bool(replicas)
            + f"results in {folder.path}"
            + f", written by {cluster.names[0]}" * cluster.several,
            flush=True,
        )
        for net in plan.nets:
            title = report.title(net)
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
                functools.partial(_say, title),
                strategy=strategy,
                write=cluster.chief,
                resume=not arguments.overwrite,
            )
            print(f"{title}: {time.perf_counter() - started:.0f} s", flush=True)
        if cluster.chief:
            task = task_of(settings)
            chance = task.chance(data)
            plots.draw(folder, chance, task)
            report.summarize(folder, chance, task)
            print(f"results, weights and plots: {folder.path}")
        distribution.wait_for_all(strategy, cluster)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is to be trained, and where.

    Attributes:
        finished: those of the nets that are trained already.
        done: the epochs that each net has behind it.
        config: settings, data and nets, for the folder.
        op: which op serves.
    """

    settings: Settings
    data: data_module.Data
    folder: RunFolder
    nets: list[str]
    finished: list[str]
    done: dict[str, int]
    config: dict[str, Any]
    op: str


def _described(plan: _Plan) -> str:
    settings, data = plan.settings, plan.data
    return (
        f"{stem(settings.data)}: {len(data.x_train)} training and "
        f"{len(data.x_test)} validation samples, {data.classes} classes, values in "
        f"[{data.x_train.min():g}, {data.x_train.max():g}]; "
        f"{settings.depth} {settings.model} layers x {settings.width}, "
        f"{settings.activation}, {settings.initializer}; batch entropy: {plan.op}; "
    )


def _dry_run(plan: _Plan) -> None:
    """Prints what the plan is and what it takes; writes nothing."""
    from lbe_ops.experiments import estimate
    from lbe_ops.experiments import nets as nets_module
    from lbe_ops.experiments.train import duration

    settings, data = plan.settings, plan.data
    print(f"{_described(plan)}results would be in {plan.folder.path}")
    for name, value in settings.as_dict().items():
        print(f"  --{name.replace('_', '-'):20} {value}")
    wanted = [net for net in plan.nets if net not in plan.finished]
    for net in plan.finished:
        print(f"{report.title(net)}: finished earlier, nothing to train")
    if not wanted:
        return
    with lbe_ops.use_native(settings_module.NATIVE_MODES[settings.native]):
        nets_module.check(settings, data.x_train[:2], data.classes)
        costs = [estimate.measure(settings, data, NETS[net]) for net in wanted]
    epochs = [settings.epochs - plan.done[net] for net in wanted]
    seconds = [
        cost.start_seconds + left * cost.epoch_seconds
        for cost, left in zip(costs, epochs, strict=True)
    ]
    rows = [
        ("parameters", [f"{cost.parameters:,}" for cost in costs]),
        ("checkpoint", [f"{cost.saved_bytes / 2**20:.1f} MiB" for cost in costs]),
        ("until the first step", [duration(cost.start_seconds) for cost in costs]),
        ("an epoch", [f"{cost.epoch_seconds:.2g} s" for cost in costs]),
        ("epochs to train", [str(left) for left in epochs]),
        ("all together, about", [duration(each) for each in seconds]),
    ]
    report.show([report.title(net) for net in wanted], [rows])
    memory = estimate.memory()
    known = "" if memory is None else f"memory: {memory / 2**30:.1f} GiB, "
    print(f"{known}time: about {duration(sum(seconds))}; nothing was written")


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
    require_installed("matplotlib", "rich", *["sklearn"] * (settings.data == "digits"))
    if folder is None:
        name = given["name"] or settings.default_name()
        folder = RunFolder(pathlib.Path(given["output"] or f"results/{name}"))
    data = data_module.load(settings.data, settings.scaling, settings.context)
    with lbe_ops.use_native(settings_module.NATIVE_MODES[settings.native]):
        try:
            op = "native" if lbe_ops.native.select() else "plain TensorFlow"
        except (ValueError, lbe_ops.NativeUnavailableError) as error:
            raise ExperimentError(str(error)) from error
    config: dict[str, Any] = {
        "settings": settings.as_dict(),
        "data": data.describe(),
        "nets": nets,
    }
    if cluster.chief:
        folder.check(config, arguments.overwrite)
        if not arguments.dry_run:
            held.enter_context(folder.exclusively())
    finished, states = [], dict.fromkeys(nets, "overwritten")
    done = dict.fromkeys(nets, 0)
    if not arguments.overwrite:
        finished = [net for net in nets if folder.net(net).finished(settings.epochs)]
        done = {net: len(folder.net(net).history()) for net in nets}
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
    return _Plan(settings, data, folder, nets, finished, done, config, op), facts


def _say(title: str, line: str) -> None:
    print(f"{title}: {line}", flush=True)


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
