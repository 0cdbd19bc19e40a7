"""Build the CPU kernels as one plain shared library that `endor.kernels.native` loads with ctypes.

The extension is optional: where no C compiler runs, the install goes on without it and the numpy
codecs take over (`endor info` says so).
"""

from pathlib import Path

from setuptools import Extension, setup

CSRC = Path("endor/kernels/csrc")

setup(
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
    ]
)
