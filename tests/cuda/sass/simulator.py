"""Launches of Endor's kernels on the simulated machine."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from endor import codecs
from endor.codecs import DTYPES, Encoded
from endor.kernels import gpu_build
from endor.kernels.gpu_launch import Kernel, Launch, Part
from endor.kernels.gpu_plan import plan_expansion
from endor.kernels.gpu_product import plan_product, segment_nnz

from ...support.device_arrays import Output, Record
from . import accesses, floats, integers  # noqa: F401, they register what they execute
from .machine import Machine
from .memory import Costs, Global
from .program import Program, disassembler, load

ARCHITECTURES = ("sm_86", "sm_90")
"""Ampere and Hopper: the two kinds of code that the compiler writes."""

TOGETHER = 64
"""Warps that run in step: more are no faster."""

Region = tuple[int, np.ndarray]


def missing() -> str | None:
    """Return what is not installed, with the command; None when nothing is missing."""
    if gpu_build.nvrtc_version() is None:
        return "no NVRTC: pip install nvidia-cuda-nvrtc"
    if disassembler() is None:
        return "no disassembler: pip install nvidia-cuda-nvdisasm"
    return None


class Simulator:
    """Compiles each kernel once."""

    def __init__(self) -> None:
        self._programs: dict[tuple[Kernel, str], Program] = {}

    def program(self, kernel: Kernel, architecture: str) -> Program:
        key = kernel, architecture
        if key not in self._programs:
            cubin = gpu_build.compile_cubin(kernel, architecture)
            with tempfile.TemporaryDirectory() as folder:
                self._programs[key] = load(cubin, Path(folder))
        return self._programs[key]

    def launch(
        self,
        launch: Launch,
        architecture: str,
        inputs: Iterable[Region],
        outputs: Iterable[Region],
        *,
        blocks: Iterable[int] | None = None,
        unwritten: bool = False,
    ) -> Costs:
        """Run `launch`, or some of its blocks, and return what it cost.

        Args:
            inputs: Addresses and bytes that it may read.
            outputs: Addresses and bytes that it may write; they change.
            unwritten: It may read shared memory that nobody wrote.
        """
        memory, costs = Global(launch.block // 32), Costs()
        for base, array in inputs:
            memory.add(base, array)
        for base, array in outputs:
            memory.add(base, array, writable=True)
        chosen = list(range(launch.grid) if blocks is None else blocks)
        at_once = max(TOGETHER // (launch.block // 32), 1)
        for begin in range(0, len(chosen), at_once):
            Machine(
                self.program(launch.kernel, architecture),
                launch.args.tobytes(),
                memory,
                costs,
                grid=launch.grid,
                block=launch.block,
                shared_bytes=launch.shared_bytes,
                blocks=chosen[begin : begin + at_once],
                # a product loads three words where the last weights of a row may need one
                unwritten=unwritten or launch.kernel.name.startswith("product"),
            ).run()
        return costs

    def expand(self, tensors: list[Encoded], architecture: str, *, warps: int = 8) -> Costs:
        """Expand `tensors` of one record, compare the bits with the reference, return the costs."""
        record = Record(tensors)
        outputs = [Output(item.spec.numel, item.spec.dtype.uint, align=256) for item in tensors]
        parts = [
            Part(item.spec, addresses, output.address)
            for item, addresses, output in zip(tensors, record.addresses, outputs, strict=True)
        ]
        costs = Costs()
        for launch in plan_expansion(parts, warps=warps):
            written = [output.region for output in outputs]
            costs.update(self.launch(launch, architecture, [record.region], written))
        for item, output in zip(tensors, outputs, strict=True):
            output.check(codecs.decode(item))
        return costs

    def multiply(
        self,
        packed: Encoded,
        x: np.ndarray,
        architecture: str,
        *,
        warp_rows: int | None = None,
        warps: int | None = None,
        shared_limit: int = 100 << 10,
        blocks: Iterable[int] | None = None,
    ) -> tuple[np.ndarray, Costs]:
        """Return y of the rows of `blocks`, `(batch, rows)` in float32, and the costs."""
        rows = packed.spec.shape[0]
        record = Record([packed])
        output = Output(len(x) * rows, np.dtype(np.uint32))
        columns = Output(x.size, np.dtype(np.uint16), align=256)
        columns.array[:] = x.reshape(-1)
        launch = plan_product(
            packed.spec,
            record.addresses[0],
            x=columns.address,
            y=output.address,
            batch=len(x),
            float_out=True,
            segment_nnz=segment_nnz(packed.spec, packed.arrays.get("bitmap")),
            rows=warp_rows,
            warps=warps,
            shared_limit=shared_limit,
        )
        inputs = [record.region, columns.region]
        costs = self.launch(launch, architecture, inputs, [output.region], blocks=blocks)
        output.check_canaries()
        return output.array.view(np.float32).reshape(len(x), rows).copy(), costs


def weights(rng: np.random.Generator, shape: tuple[int, ...], density: float = 1.0) -> np.ndarray:
    """Bits of BF16 weights as a layer has them: normal, `density` of them not zero."""
    values = rng.standard_normal(shape).astype(np.float32) * np.float32(0.02)
    bits = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    bits[bits == 0] = 1
    bits[rng.random(shape) >= density] = 0
    return bits


BF16 = DTYPES["BF16"]
