# SPDX-License-Identifier: Apache-2.0
"""README.md: its code runs, and what it names is there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: f"block{BLOCKS.index(code)}")
def test_code_block_runs(code, tmp_path, monkeypatch):
    if "import lbe_ops_numpy" in code:
        pytest.importorskip("lbe_ops_numpy")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_readme_has_code():
    assert len(BLOCKS) >= 5


def test_linked_files_exist():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_are_listed(document):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):.*##", makefile, re.MULTILINE)) - {"help"}
    listed = set(
        re.findall(r"^\| `make ([a-z0-9-]+)`", (ROOT / document).read_text(), re.M)
    )
    assert listed == targets
