"""Builds the kernels of `cuda/` for the CPU and lays tensors out as a record does."""

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from endor import codecs
from endor.codecs import Encoded
from endor.kernels.gpu_build import SOURCES, options
from endor.kernels.gpu_launch import Kernel, Launch, Part
from endor.kernels.gpu_plan import plan_expansion
from endor.kernels.gpu_product import plan_product, segment_nnz

from ..support.device_arrays import Output, Record

HERE = Path(__file__).parent
ARGUMENTS = {"product": "Product", "product_exp": "Product", "expand_int": "IntBatch"}
SANITIZE = ["-fsanitize=alignment,bounds,shift", "-fno-sanitize-recover=all"]

ENTRY = """
#include "emulator.h"
#include "{name}.cu"
extern "C" void emulate(const void* args, unsigned grid, unsigned block, unsigned shared_bytes,
                        const unsigned long long* ranges, unsigned n_ranges) {{
  emulator::readable.clear();
  for (unsigned i = 0; i < n_ranges; i++)
    emulator::readable.push_back({{ranges[2 * i], ranges[2 * i + 1]}});
  {argument} value;
  memcpy(&value, args, sizeof(value));
  emulator::launch(grid, block, shared_bytes, [&] {{ {name}(value); }});
}}
"""


class Emulator:
    """Compiles each kernel once per test session and launches it on the CPU."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._built: dict[tuple[Kernel, bool], ctypes.CDLL] = {}

    def launch(
        self,
        launch: Launch,
        ranges: Sequence[tuple[int, int]],
        *,
        tensor_cores: bool = True,
        exact: bool = False,
    ) -> None:
        """Run `launch`; `ranges` are the (begin, end) addresses that it may read.

        `exact` compiles the very kernel; otherwise one for every number of planes stands in.
        """
        library = self._library(launch.kernel if exact else general(launch.kernel), tensor_cores)
        flat = (ctypes.c_uint64 * (2 * len(ranges)))(*(at for pair in ranges for at in pair))
        library.emulate(
            launch.args.ctypes.data_as(ctypes.c_void_p),
            launch.grid,
            launch.block,
            launch.shared_bytes,
            flat,
            len(ranges),
        )

    def _library(self, kernel: Kernel, tensor_cores: bool) -> ctypes.CDLL:
        key = (kernel, tensor_cores)
        if key not in self._built:
            digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
            argument = ARGUMENTS.get(kernel.name, "Batch")
            entry = self._folder / f"{digest}.cpp"
            entry.write_text(ENTRY.format(name=kernel.name, argument=argument))
            library = self._folder / f"{digest}.so"
            command = ["g++", "-O1", "-w", "-shared", "-fPIC", *SANITIZE, *options(kernel)]
            command += [f"-DENDOR_TENSOR_CORES={int(tensor_cores)}", f"-I{HERE}", f"-I{SOURCES}"]
            subprocess.run([*command, str(entry), "-o", str(library)], check=True)
            self._built[key] = ctypes.CDLL(str(library))
        return self._built[key]


def general(kernel: Kernel) -> Kernel:
    """The kernel for any number of bit planes that the element type allows."""
    defines = dict(kernel.defines)
    if "ENDOR_PLANES" in defines:
        rest = (defines["ENDOR_MANTISSA_BITS"] + defines["ENDOR_SIGNED"]) % 8
        counts = range(rest + 1, rest + defines["ENDOR_EXPONENT_BITS"] + 1)
        defines["ENDOR_PLANES"] = sum(1 << count for count in counts)
    return Kernel(kernel.name, tuple(defines.items()))


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels with")
    return Emulator(tmp_path_factory.mktemp("emulator"))


Expand = Callable[..., None]


@pytest.fixture
def expand(emulator: Emulator) -> Expand:
    """A function that expands tensors in one record and compares them with the reference."""

    def run(
        *tensors: Encoded,
        launches: int | None = None,
        warps: int = 2,
        compare: bool = True,
        exact: bool = False,
    ) -> None:
        record = Record(tensors)
        outputs = [Output(item.spec.numel, item.spec.dtype.uint) for item in tensors]
        parts = [
            Part(item.spec, addresses, output.address)
            for item, addresses, output in zip(tensors, record.addresses, outputs, strict=True)
        ]
        plan = plan_expansion(parts, warps=warps)
        assert launches is None or len(plan) == launches
        for launch in plan:
            emulator.launch(launch, [(record.begin, record.end)], exact=exact)
        for item, output in zip(tensors, outputs, strict=True):
            if compare:
                output.check(codecs.decode(item))
            else:
                output.check_canaries()

    return run


@pytest.fixture
def multiply(emulator: Emulator) -> Callable[..., np.ndarray]:
    """A function that multiplies a packed weight with x, `(batch, cols)`; y is fp32 or 16 bits."""

    def run(
        packed: Encoded,
        x: np.ndarray,
        *,
        float_out: bool = True,
        rows: int | None = None,
        warps: int | None = None,
        tensor_cores: bool = True,
    ) -> np.ndarray:
        n_rows = packed.spec.shape[0]
        record = Record([packed])
        uint = np.dtype(np.uint32 if float_out else np.uint16)
        output = Output(len(x) * n_rows, uint)
        columns = Output(x.size, np.dtype(np.uint16))
        columns.array[:] = x.reshape(-1)
        launch = plan_product(
            packed.spec,
            record.addresses[0],
            x=columns.address,
            y=output.address,
            batch=len(x),
            float_out=float_out,
            segment_nnz=segment_nnz(packed.spec, packed.arrays.get("bitmap")),
            rows=rows,
            warps=warps,
            shared_limit=100 << 10,
        )
        inputs = (columns.address, columns.address + x.nbytes)
        emulator.launch(launch, [(record.begin, record.end), inputs], tensor_cores=tensor_cores)
        output.check_canaries()
        y = output.array.view(np.float32) if float_out else output.array
        return y.reshape(len(x), n_rows).copy()

    return run
