# SPDX-License-Identifier: Apache-2.0
"""Builds the native library with CMake, for the TensorFlow that is installed.

Everything else about the package stands in pyproject.toml.
"""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.config.pyprojecttoml import read_configuration

ROOT = pathlib.Path(__file__).resolve().parent
TENSORFLOW_NAMES = ("tensorflow", "tensorflow-cpu", "tensorflow-intel")


def tensorflow_requirement() -> list[str]:
    """TensorFlow as a requirement of the build.

    A library serves one TensorFlow minor only, so it must be that of the environment
    which pip installs into. pip isolates builds, but `purelib` still names that
    environment. Without a TensorFlow there, the one that the package is tested with.
    """
    target = sysconfig.get_path("purelib")
    for name in TENSORFLOW_NAMES:
        for found in importlib.metadata.distributions(name=name, path=[target]):
            return [f"{name}=={'.'.join(found.version.split('.')[:2])}.*"]
    project = read_configuration(ROOT / "pyproject.toml")["project"]
    return project["optional-dependencies"]["cpu"]


class CMakeBuild(build_ext):
    """Puts `lbe_ops/lib*_ops.so` and the module `lbe_ops_numpy` into the wheel.

    The environment variables LBE_CUDA and LBE_XLA (AUTO, ON or OFF) are CMake's options
    of that name.
    """

    def build_extension(self, ext: Extension) -> None:
        output = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = pathlib.Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # A cache of an earlier build names the tools of an environment that is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        # The tools of a virtual environment that is not activated.
        path = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            raise SystemExit("lbe_ops needs CMake to build: pip install cmake ninja")
        env = {**os.environ, "PATH": path}
        configure = [
            *(cmake, "-S", ROOT, "-B", build, "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DLBE_OUTPUT_DIR={output}",
            f"-DLBE_VERSION={self.distribution.get_version()}",
        ]
        for option in ("LBE_CUDA", "LBE_XLA"):
            if option in os.environ:
                configure.append(f"-D{option}={os.environ[option]}")
        subprocess.run(configure, env=env, check=True)
        subprocess.run([cmake, "--build", build], env=env, check=True)


setup(
    cmdclass={"build_ext": CMakeBuild},
    ext_modules=[Extension("lbe_ops_numpy", sources=[])],
    setup_requires=tensorflow_requirement(),
)
