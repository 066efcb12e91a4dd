# SPDX-License-Identifier: Apache-2.0
"""Builds the native libraries with CMake, for the TensorFlow that they will run with.

Everything else about the package stands in pyproject.toml. Environment variables:

LBE_NATIVE      AUTO: where no native library can be built, the package is installed
                without, and one line says why. ON: that is an error. OFF: without.
LBE_TENSORFLOW  What to build for: folders of installed TensorFlows, or versions such as
                2.20, which are downloaded for the build; several are separated by
                spaces. By default the TensorFlow that is found, see `find_tensorflow`.
LBE_PYTHONS     The Pythons to build `lbe_ops_numpy` for, separated by spaces; the wheel
                is for all of them. By default the one that runs.
LBE_CUDA, LBE_XLA  CMake's options of that name: AUTO, ON or OFF.
"""

import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.config.pyprojecttoml import read_configuration

ROOT = pathlib.Path(__file__).resolve().parent
TENSORFLOW_NAMES = (
    *("tensorflow", "tensorflow-cpu", "tensorflow-intel", "tensorflow-rocm"),
    *("tf-nightly", "tf-nightly-cpu"),
)
NATIVE = os.environ.get("LBE_NATIVE") or "AUTO"
if NATIVE not in ("AUTO", "ON", "OFF"):
    raise SystemExit(f"LBE_NATIVE must be AUTO, ON or OFF. Received: {NATIVE!r}")
PROCESSORS = "x86_64", "AMD64", "aarch64"


@functools.cache
def reason_against_native() -> str:
    """Why no library can be built here, and what would change that; or ''."""
    if NATIVE == "OFF":
        return "LBE_NATIVE=OFF was set"
    if sys.platform != "linux" or platform.machine() not in PROCESSORS:
        here = f"{platform.system()} on {platform.machine()}"
        return f"there are native libraries for Linux on x86-64 and aarch64, not {here}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler}: sudo apt-get install -y g++"
    if not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists():
        version = "{}.{}".format(*sys.version_info)
        return f"Python's headers are missing: apt-get install -y python{version}-dev"
    return ""


def tensorflow_requirement() -> list[str]:
    """TensorFlow as a requirement of the build, where none with headers is found.

    A library serves one minor only: that of the environment which is installed into,
    where that tells one; else the newest that the package is tested with.
    """
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE or sys.prefix == sys.base_prefix:
        paths.append(site.getusersitepackages())
    for name in TENSORFLOW_NAMES:
        for found in importlib.metadata.distributions(name=name, path=paths):
            return [f"{name}=={'.'.join(found.version.split('.')[:2])}.*"]
    project = read_configuration(ROOT / "pyproject.toml")["project"]
    return project["optional-dependencies"]["cpu"]


def find_tensorflow() -> tuple[pathlib.Path | None, str]:
    """The folder of the TensorFlow that the package will run with, and where that is.

    pip isolates a build, and still names the environment that it installs into. uv and
    `python -m build` do not: the interpreters that PATH and the command name are asked.
    """
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    # pip hides these from an isolated build; a virtual environment lacks them.
    if site.ENABLE_USER_SITE or sys.prefix == sys.base_prefix:
        places.append(site.getusersitepackages())
    for place in places:
        folder = pathlib.Path(place, "tensorflow")
        if (folder / "include").is_dir():
            return folder, f"in {place}"
    code = "import importlib.util as u; print(u.find_spec('tensorflow').origin)"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    for python in dict.fromkeys(interpreters()):
        done = subprocess.run(
            [python, "-c", code],
            cwd="/",  # which Python looks into as well
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        folder = pathlib.Path(done.stdout.strip()).parent
        if folder.is_absolute() and (folder / "include").is_dir():
            return folder, f"that of {python}"
    for place in sys.path:
        folder = pathlib.Path(place, "tensorflow")
        if (folder / "include").is_dir():
            return folder, "a requirement of the build, since no other was found"
    return None, "none was found"


def interpreters() -> Iterator[pathlib.Path]:
    """Those in the commands that have led here, such as `uv pip install --python
    env/bin/python .` or `env/bin/python -m build`, then those of PATH; not this one.
    """
    process = pathlib.Path("/proc/self")
    while True:
        try:
            status = process.joinpath("status").read_text()
            process = pathlib.Path("/proc", re.search(r"PPid:\s*(\d+)", status)[1])
            words = process.joinpath("cmdline").read_text().split("\0")
            folder = process.joinpath("cwd").resolve(strict=True)
        except OSError:  # no Linux, the first process, or one of somebody else
            break
        for word in filter(None, words):
            path = folder / word.removeprefix("--python=")
            yield from filter(is_other_python, (path, path / "bin" / "python"))
    paths = (pathlib.Path(path, "python3") for path in os.get_exec_path())
    yield from filter(is_other_python, paths)


def is_other_python(path: pathlib.Path) -> bool:
    """Whether a path is that of an interpreter, and not of the one that runs."""
    if path.parent.absolute() == pathlib.Path(sys.executable).parent:
        return False
    return path.name.startswith("python") and shutil.which(path) is not None


def tensorflow_folders(cache: pathlib.Path) -> tuple[list[pathlib.Path], str]:
    """The folders of the TensorFlows to build for, and why these."""
    named = os.environ.get("LBE_TENSORFLOW", "").split()
    if not named:
        folder, where = find_tensorflow()
        return ([] if folder is None else [folder]), where
    folders = []
    for each in named:
        if re.fullmatch(r"\d+\.\d+(\.\w+)*", each):
            folders.append(download_tensorflow(each, cache))
            continue
        folder = pathlib.Path(each).resolve()
        if not (folder / "include").is_dir():
            raise SystemExit(
                "LBE_TENSORFLOW must name versions (2.20) or folders of installed "
                f"TensorFlows (.../site-packages/tensorflow). Received: {each!r}"
            )
        folders.append(folder)
    return folders, f"LBE_TENSORFLOW={' '.join(named)}"


def download_tensorflow(version: str, cache: pathlib.Path) -> pathlib.Path:
    """The folder of a TensorFlow of that version, for any Python: a build runs none."""
    target = cache / f"tensorflow-{version}"
    if not target.is_dir():
        unpacked = cache / "tensorflow-unpacked"
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir(parents=True)
        name = "tensorflow-cpu" if platform.machine() != "aarch64" else "tensorflow"
        exact = version if version.count(".") > 1 else f"{version}.*"
        platforms = [
            f"manylinux{kind}_{platform.machine()}"
            for kind in ("_2_17", "_2_27", "2014")
        ]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            + ["--only-binary=:all:", "--python-version=3.11", "--dest", unpacked]
            + [f"--platform={each}" for each in platforms]
            + [f"{name}=={exact}"],
            check=True,
        )
        (wheel,) = unpacked.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if re.match(
                    r"tensorflow/(include/|libtensorflow_(framework|cc)\.so\.2)"
                    r"|[^/]+\.dist-info/",
                    member,
                ):
                    archive.extract(member, unpacked)
        wheel.unlink()
        unpacked.rename(target)
    return target / "tensorflow"


def say(folder: pathlib.Path, line: str) -> None:
    """Prints what was built, and leaves it to `python -m lbe_ops info` as well."""
    print(f"lbe_ops: {line}", flush=True)
    (folder / "lbe_ops").mkdir(parents=True, exist_ok=True)
    (folder / "lbe_ops" / "build.txt").write_text(f"{line}\n")


class BuildPython(build_py):
    """Also says why there are no native libraries, where that is known beforehand."""

    def run(self) -> None:
        super().run()
        reason = reason_against_native()
        if reason and not self.editable_mode:
            say(pathlib.Path(self.build_lib), f"without native libraries: {reason}.")


class BuildNative(build_ext):
    """Puts the libraries and the module `lbe_ops_numpy` into the wheel, by CMake."""

    def build_extension(self, ext: Extension) -> None:
        output = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = pathlib.Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # Of an earlier build, perhaps for another TensorFlow.
        for path in [*output.glob("lbe_ops_numpy*.so"), *output.glob("lbe_ops/*.so")]:
            path.unlink()
        for path in output.glob("lbe_ops/tensorflow*"):
            shutil.rmtree(path)
        folders, why = tensorflow_folders(build.parent)
        try:
            self._run_cmake(build, output, folders)
        except (OSError, subprocess.CalledProcessError) as error:
            if NATIVE == "ON":
                raise
            say(
                output, f"without native libraries, since building them failed: {error}"
            )
            return
        built = sorted(path.name for path in output.glob("lbe_ops/tensorflow*"))
        versions = ", ".join(name.removeprefix("tensorflow") for name in built)
        say(output, f"built for TensorFlow {versions or 'not at all'} ({why}).")

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: the libraries beside the module as well."""
        super().copy_extensions_to_source()
        for path in pathlib.Path(self.build_lib, "lbe_ops").rglob("*"):
            if path.suffix == ".so" or path.name == "build.txt":
                target = ROOT / path.relative_to(self.build_lib)
                target.parent.mkdir(exist_ok=True)
                shutil.copy(path, target)

    def _run_cmake(
        self, build: pathlib.Path, output: pathlib.Path, folders: list[pathlib.Path]
    ) -> None:
        # A cache of an earlier build names the tools of an environment that is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        # The tools of a virtual environment that is not activated.
        path = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            raise FileNotFoundError("there is no CMake: pip install cmake ninja")
        pythons = [shutil.which(each) or each for each in pythons_asked_for()]
        configure = [
            *(cmake, "-S", ROOT, "-B", build, "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DLBE_OUTPUT_DIR={output}",
            f"-DLBE_VERSION={self.distribution.get_version()}",
            f"-DLBE_TENSORFLOW={';'.join(map(str, folders)) or 'OFF'}",
            f"-DLBE_PYTHONS={';'.join(pythons)}",
            f"-DLBE_OLD_GLIBC={'ON' if pythons else 'OFF'}",
        ]
        for option in ("LBE_CUDA", "LBE_XLA"):
            if option in os.environ:
                configure.append(f"-D{option}={os.environ[option]}")
        env = {**os.environ, "PATH": path}
        subprocess.run(configure, env=env, check=True)
        subprocess.run([cmake, "--build", build], env=env, check=True)


class Wheel(bdist_wheel):
    """A wheel for every Python where modules for several are in it."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if pythons_asked_for() else tag


def pythons_asked_for() -> list[str]:
    return os.environ.get("LBE_PYTHONS", "").split()


def build_requirement() -> list[str]:
    if os.environ.get("LBE_TENSORFLOW"):
        return ["pip"]  # to download it
    if reason_against_native() or find_tensorflow()[0]:
        return []
    return tensorflow_requirement()


if NATIVE == "ON" and reason_against_native():
    raise SystemExit(f"LBE_NATIVE=ON, but {reason_against_native()}.")

setup(
    cmdclass={"bdist_wheel": Wheel, "build_ext": BuildNative, "build_py": BuildPython},
    ext_modules=[]
    if reason_against_native()
    else [Extension("lbe_ops_numpy", sources=[])],
    setup_requires=build_requirement(),
)
