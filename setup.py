"""Builds the native CPU kernels where a C++ compiler is there; without one the package installs all the same."""

import importlib.util
import pathlib

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = pathlib.Path("jaxllm/native")


class BuildKernels(build_ext):
    """The kernels are no Python module: jaxllm/native/build.py knows how they are compiled."""

    def get_ext_filename(self, fullname):
        return str(pathlib.Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        spec = importlib.util.spec_from_file_location("build_kernels", NATIVE / "build.py")
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        try:
            kernels.build(pathlib.Path(self.get_ext_fullpath(ext.name)))
        except (RuntimeError, OSError) as error:
            print(f"jaxllm: the native kernels are left out, XLA's own operations serve: {error}")


setup(
    ext_modules=[
        Extension("jaxllm.native._kernels", [str(p) for p in sorted(NATIVE.glob("*.cc"))], optional=True)
    ],
    cmdclass={"build_ext": BuildKernels},
)
