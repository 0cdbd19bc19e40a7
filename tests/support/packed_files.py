"""A packed file of small matrices, opened as units and weights."""

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from endor import kernels
from endor.codecs import DTYPES, CodecChoice
from endor.offload import Store
from endor.offload.host_mover import HostMover
from endor.offload.state import Bound
from endor.planning import Part, Placement, Tier, Unit, WeightSpec, collect_units
from endor.storage import FileLayout, FileWriter, header_capacity, largest_spec, open_reader

TIMEOUT_S = 60.0
"""Only a deadlock takes as long."""


class Disk:
    """`preadv` that is slow, short, or fails as it is told."""

    def __init__(self) -> None:
        self.failures = 0
        self.delay_s: Callable[[], float] | None = None
        self.short = False
        self.calls = 0
        self.gate: threading.Event | None = None
        self._lock = threading.Lock()

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        with self._lock:
            self.calls += 1
            fails = self.failures > 0
            self.failures -= fails
        if self.gate is not None:
            assert self.gate.wait(TIMEOUT_S)
        if self.delay_s is not None:
            time.sleep(self.delay_s())
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.short and buffers[0].nbytes > 4096:
            return os.preadv(fd, [buffers[0][:4096]], offset)
        return os.preadv(fd, buffers, offset)


@dataclass
class Packed:
    """A file of matrices `w0`, `w1`, ..., one record each."""

    path: Path
    layout: FileLayout
    dense: dict[str, np.ndarray]
    specs: list[WeightSpec]
    units: tuple[Unit, ...]
    disk: Disk = field(default_factory=Disk)

    @property
    def largest(self) -> int:
        return max(unit.nbytes for unit in self.units)

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)

    def placement(self, staging: int | None = None, resident: Sequence[int] = ()) -> Placement:
        tiers: dict[str, Tier] = {
            unit.name: "resident" if unit.index in resident else "disk" for unit in self.units
        }
        return Placement(tiers, self.largest if staging is None else staging)

    def mover(self, placement: Placement | None = None, **options: Any) -> HostMover:
        reader = open_reader("buffered", preadv=self.disk)
        return HostMover(self.units, placement or self.placement(), reader, **options)

    def store(
        self,
        placement: Placement | None = None,
        dtype: torch.dtype = torch.bfloat16,
        **options: Any,
    ) -> Store:
        reader = open_reader("buffered", preadv=self.disk)
        specs = [(spec, dtype) for spec in self.specs]
        return Store.open(
            [self.layout], self.units, specs, placement or self.placement(), reader, **options
        )

    def check(self, name: str, bound: Bound) -> None:
        """Assert that a unit's tensors decode to the matrix that was packed."""
        expected = self.dense[name]
        out = np.empty(expected.size, dtype=expected.dtype)
        kernels.decode(bound[name], out, threads=1)
        np.testing.assert_array_equal(out, expected.reshape(-1))


def make_packed(
    path: Path,
    shapes: Sequence[tuple[int, int]],
    *,
    routed: Sequence[int] = (),
    dtype: str = "BF16",
    codec: CodecChoice = "auto",
) -> Packed:
    item, rng = DTYPES[dtype], np.random.default_rng(len(shapes))
    dense: dict[str, np.ndarray] = {}
    for at, shape in enumerate(shapes):
        values = rng.normal(size=shape).astype(np.float32)
        values[rng.random(shape) < 0.5] = 0
        bits = values.view(np.uint32)
        dense[f"w{at}"] = (bits >> 16).astype(np.uint16) if dtype == "BF16" else bits
    plan = {name: {name: largest_spec(bits.shape, item)} for name, bits in dense.items()}
    with FileWriter(path, header_capacity=header_capacity(plan)) as writer:
        for name, bits in dense.items():
            with writer.record(name) as record:
                record.add(name, kernels.encode(bits, item, codec=codec, threads=1))
    layout = FileLayout.read(path)
    specs = [
        WeightSpec(
            name, bits.shape, (Part(name, 0, bits.size, 0),), name, routed=int(name[1:]) in routed
        )
        for name, bits in dense.items()
    ]
    return Packed(path, layout, dense, specs, collect_units([layout], specs))


def finishes(*works: Callable[[], None]) -> None:
    """Run works on threads of their own; fail when one hangs, raise what one raised."""
    errors: list[BaseException] = []

    def guard(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guard, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "deadlock"
    if errors:
        raise errors[0]


def loaders() -> set[threading.Thread]:
    """Return the living threads of engines and readers."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("endor-")}


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in itertools.repeat(None, int(TIMEOUT_S / 0.005)):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never happened")
