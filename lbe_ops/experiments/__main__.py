# SPDX-License-Identifier: Apache-2.0
"""`python -m lbe_ops.experiments`: deep nets with and without LBE."""

import sys

from lbe_ops.experiments.command import main

if __name__ == "__main__":
    sys.exit(main())
