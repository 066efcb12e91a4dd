# SPDX-License-Identifier: Apache-2.0
"""setup.py: which TensorFlow it builds for, and what it does where it cannot build."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import site
import subprocess
import sys
import sysconfig

import pytest
from helpers import ROOT

VARIABLES = "LBE_NATIVE", "LBE_TENSORFLOW", "LBE_PYTHONS", "CXX"


@pytest.fixture
def load_setup(monkeypatch):
    """setup.py as a module, in an environment of some variables; nothing is set up."""
    # Imported before `places` hides the folder that they are in.
    for name in ("command.bdist_wheel", "command.build_ext", "config.pyprojecttoml"):
        pytest.importorskip(f"setuptools.{name}")
    given = {}

    def load(**env):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("setuptools.setup", lambda **options: given.update(options))
        spec = importlib.util.spec_from_file_location("lbe_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.given = given
        return module

    return load


@pytest.fixture
def places(monkeypatch, tmp_path):
    """Folders in place of all where a TensorFlow may be; none has one yet."""
    found = {}
    for name in ("purelib", "platlib", "user", "path"):
        found[name] = tmp_path / name
        found[name].mkdir()
    real = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name, *a: str(found.get(name, real(name)))
    )
    monkeypatch.setattr(site, "ENABLE_USER_SITE", True)
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(found["user"]))
    monkeypatch.setattr(
        sys, "path", [p for p in sys.path if not pathlib.Path(p, "tensorflow").exists()]
    )
    monkeypatch.setenv("PATH", str(found["path"]))
    (found["path"] / "c++").touch(0o755)
    return found


def put_tensorflow(place, headers=True, name="tensorflow_cpu", version="2.20.0"):
    info = place / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    if headers:
        (place / "tensorflow" / "include").mkdir(parents=True)


@pytest.mark.parametrize("place", ["purelib", "platlib", "user"])
def test_a_tensorflow_that_is_there_is_used_and_not_downloaded(
    load_setup, places, place
):
    setup = load_setup()
    put_tensorflow(places[place])
    folder, why = setup.find_tensorflow()
    assert folder == places[place] / "tensorflow"
    assert why == f"in {places[place]}"
    assert setup.build_requirement() == []


@pytest.mark.parametrize("name", ["tensorflow", "tensorflow_rocm", "tf_nightly"])
@pytest.mark.parametrize("place", ["purelib", "platlib", "user"])
def test_one_without_headers_tells_the_minor_that_is_downloaded(
    load_setup, places, place, name
):
    setup = load_setup()
    put_tensorflow(places[place], headers=False, name=name)
    assert setup.find_tensorflow()[0] is None
    assert setup.build_requirement() == [f"{name.replace('_', '-')}==2.20.*"]


def fake_python(path, packages):
    """An interpreter that finds a TensorFlow in a folder."""
    path.write_text(f"#!/bin/sh\necho {packages / 'tensorflow' / '__init__.py'}\n")
    path.chmod(0o755)


def test_that_of_the_active_environment_is_found_in_an_isolated_build(
    load_setup, places
):
    """As uv and `python -m build` isolate: PATH leads to the environment."""
    setup = load_setup()
    assert setup.find_tensorflow() == (None, "none was found")
    put_tensorflow(places["path"])
    fake_python(places["path"] / "python3", places["path"])
    folder, why = setup.find_tensorflow()
    assert folder == places["path"] / "tensorflow"
    assert why == f"that of {places['path'] / 'python3'}"
    assert setup.build_requirement() == []


@pytest.mark.parametrize(
    "argument", ["{0}/bin/python", "--python={0}/bin/python", "{0}"]
)
def test_that_of_the_interpreter_in_the_command_is_found(tmp_path, argument):
    """`uv pip install --python env .`, `env/bin/python -m build`, not activated."""
    put_tensorflow(tmp_path)
    (tmp_path / "env" / "bin").mkdir(parents=True)
    fake_python(tmp_path / "env" / "bin" / "python", tmp_path)
    script = (
        "import setuptools, runpy, sysconfig\n"
        "setuptools.setup = lambda **_: None\n"
        "sysconfig.get_path = lambda *_: '/nowhere'\n"
        f"found = runpy.run_path({str(ROOT / 'setup.py')!r})\n"
        "print(*found['find_tensorflow']())\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} script.py; exit $?", argument.format("env")],
        cwd=tmp_path,
        env={**os.environ, "PATH": "/usr/bin:/bin", "LBE_NATIVE": "AUTO"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    python = tmp_path / "env" / "bin" / "python"
    assert done.stdout.strip() == f"{tmp_path / 'tensorflow'} that of {python}"


def test_without_any_the_newest_that_is_tested_is_downloaded(load_setup, places):
    requirements = load_setup().build_requirement()
    # tensorflow-cpu is there for Linux on x86-64 alone.
    assert [each.split(">=")[0] for each in requirements] == [
        "tensorflow-cpu",
        "tensorflow",
    ]
    for each in requirements:
        assert f'"{each}"' in (ROOT / "pyproject.toml").read_text()


def test_folders_and_versions_may_be_named(load_setup, places, monkeypatch, tmp_path):
    put_tensorflow(places["user"])
    put_tensorflow(places["purelib"])
    folder = places["user"] / "tensorflow"
    setup = load_setup(LBE_TENSORFLOW=f"{folder} 2.19")
    monkeypatch.setattr(setup, "download_tensorflow", lambda version, cache: version)
    folders, why = setup.tensorflow_folders(tmp_path)
    assert folders == [folder, "2.19"]
    assert why == f"LBE_TENSORFLOW={folder} 2.19"
    assert setup.build_requirement() == ["pip"]


@pytest.mark.parametrize("value", ["2", "newest", "/no/such/folder"])
def test_what_is_neither_is_an_error(load_setup, tmp_path, value):
    setup = load_setup(LBE_TENSORFLOW=value)
    with pytest.raises(SystemExit, match=f"LBE_TENSORFLOW must.*{value}"):
        setup.tensorflow_folders(tmp_path)


@pytest.mark.parametrize(
    ("system", "machine", "words"),
    [
        ("darwin", "arm64", "Linux on x86-64 and aarch64, not .* on arm64"),
        ("win32", "AMD64", "Linux on x86-64 and aarch64"),
        ("linux", "riscv64", "not .* on riscv64"),
    ],
)
def test_other_systems_get_the_pure_package(
    load_setup, monkeypatch, system, machine, words
):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    setup = load_setup()
    assert setup.given["ext_modules"] == []
    assert setup.given["setup_requires"] == []
    with pytest.raises(SystemExit, match=f"LBE_NATIVE=ON, but .*{words}"):
        load_setup(LBE_NATIVE="ON")


def test_without_a_compiler_or_headers_the_package_is_pure(load_setup, places):
    assert load_setup().given["ext_modules"] != []
    setup = load_setup(CXX="no-such-compiler -O2")
    assert "no C++ compiler no-such-compiler" in setup.reason_against_native()
    assert setup.given["ext_modules"] == []
    places["include"] = places["path"]
    assert "Python's headers are missing" in load_setup().reason_against_native()


def test_an_unknown_mode_is_an_error(load_setup):
    with pytest.raises(SystemExit, match="LBE_NATIVE must be AUTO, ON or OFF.*'yes'"):
        load_setup(LBE_NATIVE="yes")


def install(folder, stale=None, **env):
    """`pip install .` into a folder, with the build requirements of this Python.

    `stale` is a library that an earlier build has left.
    """
    source = folder / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=lambda path, names: (
            {"build", "dist", "results", "benchmarks", ".venv", ".git"} & set(names)
            if path == str(ROOT)
            else {name for name in names if name.endswith(".so")}
        ),
    )
    if stale is not None:
        (source / stale).parent.mkdir(parents=True)
        (source / stale).touch()
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation"]
    command += ["-v", "--no-deps", "--target", folder / "site", source]
    return subprocess.run(
        command,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def info(site_packages):
    done = subprocess.run(
        [sys.executable, "-m", "lbe_ops", "info"],
        cwd=site_packages,
        env={**os.environ, "PYTHONPATH": str(site_packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def require_build_tools():
    # Not imported, and not looked for by Python: setuptools then changes distutils.
    for name in ("pip", "setuptools"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"there is no {name}")


@pytest.mark.long
@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"LBE_NATIVE": "OFF"}, "without native libraries: LBE_NATIVE=OFF was set."),
        ({"CXX": "no-such"}, "there is no C++ compiler no-such: sudo apt-get install"),
    ],
)
def test_a_pure_package_installs_and_says_why(tmp_path, env, words):
    require_build_tools()
    done = install(tmp_path, **env)
    assert done.returncode == 0, done.stdout
    assert words in done.stdout
    said = info(tmp_path / "site")
    assert words in said
    wheels = list((tmp_path / "site").glob("lbe_ops-*.dist-info/WHEEL"))
    assert "Tag: py3-none-any" in wheels[0].read_text()


@pytest.mark.long
def test_a_build_that_fails_installs_the_pure_package(tmp_path):
    """A compiler that is there and does not work."""
    require_build_tools()
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    compiler.chmod(0o755)
    python = "cpython-{}{}".format(*sys.version_info)
    stale = f"build/lib.linux-{platform.machine()}-{python}/lbe_ops/tensorflow2.1/x.so"
    done = install(tmp_path, stale, CXX=str(compiler))
    assert done.returncode == 0, done.stdout
    words = "without native libraries, since building them failed"
    assert not list((tmp_path / "site").rglob("*.so"))
    assert words in done.stdout
    assert words in info(tmp_path / "site")
    shutil.rmtree(tmp_path / "source")
    done = install(tmp_path, CXX=str(compiler), LBE_NATIVE="ON")
    assert done.returncode != 0
