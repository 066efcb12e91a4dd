# SPDX-License-Identifier: Apache-2.0
"""Deep networks with and without LBE: data, nets, training, plots, command."""

from lbe_ops.experiments.command import add_arguments, run

__all__ = ["add_arguments", "run"]
