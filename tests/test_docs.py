# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/: their code runs, and what they name is there."""

import doctest
import importlib
import inspect
import pathlib
import re
import shlex

import keras
import numpy as np
import pytest
import tensorflow as tf

import lbe_ops
from lbe_ops import __main__
from lbe_ops.targets import default_arguments

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = [
    *(*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"),
    *sorted((ROOT / "benchmarks" / "results").rglob("*.md")),
]


def name(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, language):
    """The blocks of code of a document in a language, '' standing for none."""
    text = path.read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


CODE = [
    pytest.param(path, code, id=f"{name(path)}-block{number}")
    for path in PAGES
    for number, code in enumerate(blocks(path, "python"))
]


# Keras' own conversion of variables for .weights.h5, under NumPy 2.
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
@pytest.mark.parametrize(("path", "code"), CODE)
def test_code_block_runs(path, code, tmp_path, monkeypatch):
    if "import lbe_ops_numpy" in code:
        pytest.importorskip("lbe_ops_numpy")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name(path), "exec"), {"__name__": "docs"})


def test_pages_have_code():
    assert len(CODE) >= 15
    assert len(blocks(ROOT / "README.md", "python")) == 1
    for path in PAGES:  # a block in another language is no way around the test above
        languages = re.findall(r"^ *```(\w+)$", path.read_text(), re.MULTILINE)
        assert set(languages) <= {"python", "sh"}, name(path)
        assert languages.count("python") == len(blocks(path, "python")), name(path)


def test_the_guide_names_the_defaults():
    text = (ROOT / "docs" / "guide.md").read_text()
    rows = re.findall(r"^\| `(\w+)`[^|]*\|(.*)\|$", text, re.MULTILINE)
    stated = {name: cells.split("|") for name, cells in rows}

    def defaults(called, *names):
        parameters = inspect.signature(called).parameters
        return [format(parameters[name].default, "") for name in names]

    def told(name):
        return [cell.strip().partition(" ")[0] for cell in stated[name]]

    lower = "lbe_alpha", "lbe_alpha_min", "lbe_beta"
    upper = "LBE_alpha", "LBE_alpha_min", "LBE_beta"
    assert told("LBERegularizer") == [*defaults(lbe_ops.LBERegularizer, *lower), ""]
    assert told("Dense_LBE") == [*defaults(lbe_ops.Dense_LBE, *upper), ""]
    assert told("LBEModel")[3:] == defaults(lbe_ops.LBEModel, "LBE_strength")
    values = default_arguments(keras.layers.Dense(2))
    strength = defaults(lbe_ops.add_lbe, "LBE_strength")
    assert told("add_lbe") == [*(str(values[name]) for name in lower), *strength]


def test_readme_is_a_front_page():
    readme = (ROOT / "README.md").read_text()
    assert 120 <= len(readme.splitlines()) <= 150
    (example,) = blocks(ROOT / "README.md", "python")
    assert len(example.strip().splitlines()) <= 14  # twelve and what parts them
    assert "\nmake demo " in readme and "\nmake test " in readme


def test_tests_that_a_document_names_are_there():
    there = {
        match
        for path in (ROOT / "tests").glob("test_*.py")
        for match in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = {
        (name(path), test)
        for path in DOCUMENTS
        for test in re.findall(r"`(test_\w+)`", path.read_text())
    }
    assert len(named) > 30
    assert [each for each in sorted(named) if each[1] not in there] == []


# Links


def anchors(path):
    """Of its headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()) for title in titles]
    return {re.sub(r"\s", "-", title.strip()) for title in plain}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_to_files_and_headings(path):
    links = re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", path.read_text())
    missing = []
    for target, anchor in links:
        file = (path.parent / target).resolve() if target else path
        if not file.is_file():
            missing.append(target)
        # The others are made of docstrings; `make docs` looks for them.
        elif anchor and "api" not in file.parts and anchor not in anchors(file):
            missing.append(f"{target}#{anchor}")
    assert not missing


def test_every_page_can_be_reached():
    """In the site by its menu, in the repository from README and the home page."""
    menu = re.findall(r"([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = {name(path).removeprefix("docs/") for path in PAGES[1:]}
    assert pages <= set(menu)
    for start in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        seen, left = set(), [start]
        while left:
            path = left.pop()
            if path not in seen and path.suffix == ".md":
                seen.add(path)
                targets = re.findall(r"\]\((?!\w+:)([^)#\s]+)", path.read_text())
                left += [(path.parent / target).resolve() for target in targets]
        assert set(PAGES[1:]) <= seen | {start}


# Commands


def targets():
    makefile = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z0-9-]+):.*##", makefile, re.MULTILINE))


def test_make_targets_are_listed():
    listed = re.findall(
        r"^\| `make ([a-z0-9-]+)`", (ROOT / "CONTRIBUTING.md").read_text(), re.M
    )
    assert set(listed) == targets() - {"help"}
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_make_targets_that_are_named_exist(path):
    text = "".join([*blocks(path, ""), *blocks(path, "sh")])
    command = r"(?:[A-Z_]+=\S+ )*make ([a-z][a-z0-9-]*)"
    named = re.findall(f"^{command}", text, re.MULTILINE)
    named += re.findall(f"`{command}", path.read_text())
    assert set(named) <= targets()


def test_commands_are_understood(monkeypatch, capsys):
    """Those of lbe-ops in all documents: their arguments are known."""
    ran = []

    def run(arguments):
        ran.append(arguments)
        return 0

    monkeypatch.setattr(__main__, "_info", run)
    for module in (__main__.experiments, __main__.map, __main__.report):
        monkeypatch.setattr(module, "run", run)
    commands = {
        command
        for path in DOCUMENTS
        for block in (*blocks(path, ""), *blocks(path, "sh"))
        for command in re.findall(r"^ *(lbe-ops [^&\n]*)", block, re.MULTILINE)
    }
    assert len(commands) >= 8
    for command in sorted(commands):
        _, *words = shlex.split(command, comments=True)
        if "--help" in words:
            with pytest.raises(SystemExit, match="^0$"):
                __main__.main(words)
            assert "usage: lbe-ops" in capsys.readouterr().out
        else:
            assert __main__.main(words) == 0, command
            assert len(ran) > 0 and ran.pop()


# The examples of the docstrings, which the API pages show. Those of the op, of the
# initializers and of lbe_ops_numpy are run by test_ops.py, test_initializers.py and
# test_numpy_module.py.

DOCTESTED = ("callbacks", "diagnose", "layers", "measure", "model", "native")
DOCTESTED += ("recorder", "regularizer", "targets")


@pytest.fixture
def names():
    """What the examples take as given."""
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 20)).astype("float32")
    y = random.integers(0, 10, 64)
    keras.utils.set_random_seed(1)
    dense = keras.layers.Dense
    net = keras.Sequential(
        [
            keras.Input((20,)),
            *(dense(20, "relu", kernel_initializer="he_normal") for _ in range(60)),
            dense(10),
        ]
    )
    net.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True))
    modules = {"keras": keras, "np": np, "tf": tf, "lbe_ops": lbe_ops}
    data = {"x": x, "y": y, "x_train": x, "y_train": y, "x_val": x}
    public = {name: getattr(lbe_ops, name) for name in lbe_ops.__all__}
    return {**public, **modules, **data, "model": net}


class Checker(doctest.OutputChecker):
    """What an example prints counts where it says what that is."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("module", DOCTESTED)
def test_examples_of_docstrings_run(module, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"lbe_ops.{module}")
    runner = doctest.DocTestRunner(Checker(), False, doctest.ELLIPSIS)
    for test in doctest.DocTestFinder().find(module, extraglobs=names):
        runner.run(test)
    assert runner.failures == 0 and runner.tries > 0
