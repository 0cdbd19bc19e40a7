"""Build the CPU kernels as one plain shared library that `endor.kernels.native` loads with ctypes.

The extension is optional: where no C compiler runs, the install goes on without it and the numpy
codecs take over (`endor info` says so). It uses nothing of Python's, so that one wheel of a machine
serves every Python.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("endor/kernels/csrc")


class PlainLibrary(build_ext):
    """Names the library without the Python that built it."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def run(self) -> None:
        if self.inplace:  # one that an earlier version named after a Python would go on being found
            for stale in CSRC.parent.glob("_native.*.so"):
                stale.unlink()
        super().run()


class AnyPython(bdist_wheel):
    """Tags the wheel with the machine alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython},
    ext_modules=[
        Extension(
            "endor.kernels._native",
            sources=sorted(str(path) for path in CSRC.glob("*.c")),
            depends=sorted(str(path) for path in CSRC.glob("*.h")),
            include_dirs=[str(CSRC)],
            extra_compile_args=["-O3", "-std=gnu11", "-pthread", "-fvisibility=hidden", "-Wall"],
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,
        )
    ],
)
