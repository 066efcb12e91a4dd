# SPDX-License-Identifier: Apache-2.0
"""The short benchmark of `make demo`: what it says, and what it leaves to the whole."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT, require_native

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.long
def test_short_run_explains_its_table_and_judges_nothing(monkeypatch, tmp_path):
    require_native()
    pytest.importorskip("lbe_ops_numpy")
    done = subprocess.run(
        [
            *(sys.executable, BENCHMARKS / "bench_op.py", "--quick"),
            *("--shapes", "16x8", "--rounds", "2", "--output", tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "met  " not in done.stdout and "missed" not in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    (legend,) = [line for line in done.stdout.splitlines() if "fused: the op" in line]
    assert [name for name in results["rows"][0]["seconds"] if name not in legend] == []
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report

    assert report.targets(results)  # which the whole benchmark says
