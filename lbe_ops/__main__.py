# SPDX-License-Identifier: Apache-2.0
"""The command line, `python -m lbe_ops` or `lbe-ops`: info, train, report, map."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from lbe_ops import experiments, info
from lbe_ops.experiments import map, report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status."""
    parser = argparse.ArgumentParser(prog="lbe-ops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    show = commands.add_parser("info", help="versions and the state of the library")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=_info)

    train = commands.add_parser("train", help="deep plain nets with and without LBE")
    experiments.add_arguments(train)
    train.set_defaults(run=experiments.run)

    comparison = commands.add_parser("report", help="runs of train side by side")
    report.add_arguments(comparison)
    comparison.set_defaults(run=report.run)

    trainability = commands.add_parser("map", help="which nets train, and with what")
    map.add_arguments(trainability)
    trainability.set_defaults(run=map.run)

    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _info(arguments: argparse.Namespace) -> int:
    values = info.collect()
    print(json.dumps(values, indent=2) if arguments.json else info.render(values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
