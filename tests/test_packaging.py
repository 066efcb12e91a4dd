# SPDX-License-Identifier: Apache-2.0
"""The installed package: what it says about itself, and what it asks for."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

import keras
import pytest
import tensorflow as tf

import lbe_ops
from lbe_ops import __main__, info, native

ROOT = pathlib.Path(__file__).resolve().parent.parent
INSTALLATION = ROOT / "docs" / "installation.md"
STUB = ROOT / "lbe_ops_numpy-stubs" / "__init__.pyi"

needs_installation = pytest.mark.skipif(
    os.environ.get("LBE_TEST_INSTALLED") != "1",
    reason="a source folder on sys.path; `make test` tests the installed wheel",
)


def run_python(*arguments, cwd, **env):
    """Runs another interpreter, outside the source folder."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def read(name):
    return (ROOT / name).read_text()


@needs_installation
def test_the_tests_import_the_installed_package():
    assert not pathlib.Path(lbe_ops.__file__).is_relative_to(ROOT / "lbe_ops")
    assert lbe_ops.__version__ == importlib.metadata.version("lbe_ops")


@needs_installation
def test_version_stands_in_pyproject_alone():
    line = f'version = "{lbe_ops.__version__}"'
    assert line in (ROOT / "pyproject.toml").read_text().splitlines()
    assert info.collect()["build"]["version"] == lbe_ops.__version__


@needs_installation
def test_tensorflow_is_asked_for_by_extras_only():
    for requirement in importlib.metadata.requires("lbe_ops"):
        if requirement.startswith("tensorflow"):
            assert "extra ==" in requirement


@needs_installation
def test_the_source_distribution_holds_what_a_build_with_cuda_needs(tmp_path):
    """What MANIFEST.in lists: also the tests' emulation of CUDA."""
    script = (
        "import sys, setuptools, setuptools.command.egg_info as e\n"
        "files = e.FileList()\n"
        "lines = open('MANIFEST.in').read().splitlines()\n"
        "[files.process_template_line(line) for line in lines]\n"
        "print('\\n'.join(files.files))\n"
    )
    done = run_python("-c", script, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    listed = set(done.stdout.split())
    for folder in ("cc", "cuda", "tests", "benchmarks"):
        for path in (ROOT / folder).iterdir():
            if path.suffix in {".h", ".cc", ".cu", ".cmake", ".py"}:
                assert str(path.relative_to(ROOT)) in listed


def test_wheel_holds_the_libraries_and_the_licence():
    files = importlib.metadata.files("lbe_ops")
    names = {file.name for file in files}
    assert {"liblbe_kernels.so", "libtf_ops.so", "LICENSE", "build.txt"} <= names
    if os.environ.get("LBE_REQUIRE_XLA") == "1":
        assert native.XLA_LIBRARY_NAME in names
    assert any(name.startswith("lbe_ops_numpy.") for name in names)
    paths = {str(file) for file in files}
    assert {"lbe_ops/py.typed", "lbe_ops_numpy-stubs/__init__.pyi"} <= paths
    # None for a TensorFlow of its own: the kernels are there once.
    assert len([f for f in files if f.name == "liblbe_kernels.so"]) == 1


def test_types_are_built_into_the_wheel(tmp_path):
    """With and without native libraries: the stub says what those have."""
    pytest.importorskip("setuptools.command.bdist_wheel", reason="an old setuptools")
    command = ["setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    done = run_python(*command, cwd=ROOT, LBE_NATIVE="OFF")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lbe_ops" / "py.typed").exists()
    stub = (tmp_path / "lbe_ops_numpy-stubs" / "__init__.pyi").read_text()
    assert stub == STUB.read_text()


def test_version_has_an_entry_in_the_changelog_and_the_citation():
    """All three name the version, and a date: the tag can be made."""
    version = re.search(r'^version = "(.*)"$', read("pyproject.toml"), re.M)[1]
    newest = re.search(r"^## (.*)$", read("CHANGELOG.md"), re.M)[1]
    if newest == "Unreleased":  # changes since the tag
        newest = re.findall(r"^## (.*)$", read("CHANGELOG.md"), re.M)[1]
    cited = dict(re.findall(r"^([a-z-]+): (.+)$", read("CITATION.cff"), re.M))
    assert newest == f"{version} ({cited['date-released']})"
    assert datetime.date.fromisoformat(cited["date-released"])
    assert (cited["version"], cited["title"]) == (version, "lbe_ops")
    licence = re.search(r'^license = "(.*)"$', read("pyproject.toml"), re.M)[1]
    assert cited["license"] == licence


def test_citation_is_of_the_paper_that_the_readme_names():
    citation = read("CITATION.cff")
    paper = citation[citation.index("preferred-citation:") :]
    title = " ".join(re.search(r"title: >-\n((?: {4}.*\n)+)", paper)[1].split())
    url = re.search(r"url: (\S+)", paper)[1]
    readme = " ".join(read("README.md").split())
    assert title in readme and url in readme
    assert re.findall(r"family-names: (.*)", paper)[0] == "Peer"
    assert "of Peer et al." in readme


def test_hooks_and_lint_are_the_same_commands():
    hooks = re.findall(
        r"^        entry: make (\S+)$", read(".pre-commit-config.yaml"), re.M
    )
    lint = re.search(r"^lint: (.*?) ##", read("Makefile"), re.M)[1]
    assert hooks == lint.split()
    for target in hooks:
        assert re.search(rf"^{target}: .*\n\t\$\(BIN\)/", read("Makefile"), re.M)


def test_ci_runs_on_every_python():
    workflow = read(".github/workflows/ci.yml")
    pythons = re.search(r"python: \[(.*)\]", workflow)[1]
    first, end = re.search(
        r'python = ">=3\.(\d+),<3\.(\d+)"', read("pyproject.toml")
    ).groups()
    assert re.findall(r'"(.*?)"', pythons) == [
        f"3.{i}" for i in range(int(first), int(end))
    ]
    assert "run: .ci/run\n" in workflow and os.access(ROOT / ".ci" / "run", os.X_OK)


def test_issues_ask_for_what_info_prints():
    form = read(".github/ISSUE_TEMPLATE/bug.yml")
    asked = form[form.index("id: info") :]
    assert "`lbe-ops info`" in asked and "required: true" in asked


def supported():
    """The table of installation.md: minor, Pythons, whether XLA has native ops."""
    page = INSTALLATION.read_text()
    rows = re.findall(
        r"^\| (2\.\d+) \| 3\.(\d+) to 3\.(\d+) \| yes \| (.*?) \|$", page, re.M
    )
    return {
        minor: (range(int(first), int(last) + 1), xla == "yes")
        for minor, first, last, xla in rows
    }


def test_the_table_of_versions_is_that_of_pyproject():
    config = (ROOT / "pyproject.toml").read_text()
    for extra in ("tensorflow-cpu", "tensorflow", r"tensorflow\[and-cuda\]"):
        first, end = re.search(rf'"{extra}>=2\.(\d+),<2\.(\d+)', config).groups()
        assert list(supported()) == [f"2.{i}" for i in range(int(first), int(end))]
    first, end = re.search(r'"keras>=3\.(\d+),<3\.(\d+)"', config).groups()
    keras_versions = f"Keras 3.{first} to 3.{int(end) - 1} with each"
    assert keras_versions in INSTALLATION.read_text()
    first, end = re.search(r'python = ">=3\.(\d+),<3\.(\d+)"', config).groups()
    pythons = [minor for minors, _ in supported().values() for minor in minors]
    assert (min(pythons), max(pythons) + 1) == (int(first), int(end))


def test_the_table_of_versions_is_that_of_what_is_installed():
    minors = native.minors()
    assert native.LIBRARY_PATH.parent.name.removeprefix("tensorflow") in minors
    for minor in minors:
        folder = native.FOLDER / f"tensorflow{minor}"
        has_xla = (folder / native.XLA_LIBRARY_NAME).exists()
        assert has_xla <= supported()[minor][1]
        if os.environ.get("LBE_REQUIRE_XLA") == "1":
            assert has_xla == supported()[minor][1]
        assert native.built_for(folder / native.LIBRARY_PATH.name) == minor
    running = ".".join(tf.__version__.split(".")[:2])
    assert sys.version_info[1] in supported()[running][0]
    wheel = importlib.metadata.distribution("lbe_ops").read_text("WHEEL")
    if "Tag: py3-none-manylinux" in wheel:  # all of its modules
        names = {file.name for file in importlib.metadata.files("lbe_ops")}
        pythons = {re.search(r"cpython-3(\d+)", n) for n in names if "numpy" in n}
        found = {int(match[1]) for match in pythons if match}
        assert sys.version_info[1] in found


def test_info_lists_versions(capsys):
    __main__.main(["info"])
    lines = capsys.readouterr().out.splitlines()
    values = dict(line.split(maxsplit=1) for line in lines if "built:" not in line)
    assert values["lbe_ops"] == lbe_ops.__version__
    assert values["tensorflow"] == tf.__version__
    assert values["keras"] == keras.__version__


def test_info_as_json(capsys):
    __main__.main(["info", "--json"])
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_info_says_whether_the_library_loads(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: native.Native(None, "it is not there."))
    assert info.collect()["native"] == "no: it is not there."
    monkeypatch.setattr(native, "load", lambda: native.Native(object(), ""))
    assert info.collect()["native"] == "yes"


@pytest.mark.parametrize(
    ("value", "mode"), [("", "auto"), ("1", "require"), ("0", "never")]
)
def test_info_says_what_is_asked_for(monkeypatch, value, mode):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, value)
    assert info.collect()["native_mode"] == mode


def test_info_survives_a_bad_environment(monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "yes")
    assert "must be 1" in info.collect()["native_mode"]


def test_info_says_what_the_library_was_built_with():
    values = info.collect()
    if os.environ.get("LBE_REQUIRE_NATIVE") == "1":
        assert values["native"] == values["numpy"] == "yes"
    if values["numpy"] == "yes":
        assert all(isinstance(value, str) for value in values["build"].values())
        for key in values["build"]:
            assert f"built: {key}" in info.render(values)


@pytest.mark.parametrize(
    "system, text",
    [
        ({"problem": ""}, "NVIDIA H200, sm_90, driver for CUDA 13.0"),
        ({"problem": "too old"}, "no: too old (driver for CUDA 13.0)"),
        ({"problem": "none here", "driver": "none"}, "no: none here"),
        ({"problem": "built without CUDA", "driver": ""}, "no: built without CUDA"),
    ],
)
def test_info_describes_the_gpu(monkeypatch, system, text):
    module = pytest.importorskip("lbe_ops_numpy")
    there = {"device": "NVIDIA H200", "compute_capability": "90", "driver": "13.0"}
    monkeypatch.setattr(module, "cuda_system", lambda: there | system)
    assert info.collect()["gpu"] == text


def test_info_says_what_cuda_there_is():
    values = info.collect()
    if values["numpy"] == "yes":
        assert values["cuda"] == "no" or "sm_" in values["cuda"]
        assert values["gpu"]


def test_command_line_names_its_commands(capsys):
    with pytest.raises(SystemExit) as error:
        __main__.main(["no-such-command"])
    assert error.value.code == 2
    assert "info" in capsys.readouterr().err


def test_module_is_a_command(tmp_path):
    done = run_python("-m", "lbe_ops", "info", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lbe_ops"] == lbe_ops.__version__


def test_import_without_tensorflow_says_what_to_install(tmp_path):
    (tmp_path / "without_tensorflow.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = (\n"
        "    lambda name, package=None:\n"
        "    None if name == 'tensorflow' else find(name, package)\n"
        ")\n"
        "import lbe_ops\n"
    )
    done = run_python("without_tensorflow.py", cwd=tmp_path)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: lbe_ops needs TensorFlow")
    assert "pip install tensorflow-cpu" in last
    assert "tensorflow[and-cuda]" in last
