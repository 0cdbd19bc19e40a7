"""Opening a packed checkpoint for a CUDA device: what fits where."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from endor.errors import BackendError, BudgetError
from endor.offload import Unit, WeightSpec, available_bytes
from endor.offload.device import Device
from endor.offload.device_placement import DevicePlacement, HomeTier, spread_on_device
from endor.offload.device_store import DeviceStore
from endor.offload.store import scratch_bytes
from endor.storage import FileLayout, RecordReader, open_reader
from endor.storage.cufile import open_device_reader
from endor.storage.source import ReaderKind

RESERVE_SHARE = 10
"""Without a budget, this part of the device's memory is left for the cache and activations."""


WISHES: dict[str, HomeTier] = {"cuda": "vram", "cpu": "resident", "disk": "disk"}
"""The tier that an entry of a device map asks for."""


def read_device_map(device_map: Mapping[str, Any]) -> tuple[str, dict[str, HomeTier]]:
    """Return the one device of a map, and the tiers that its entries ask for by module name.

    Raises:
        BackendError: Several devices, or one that packed weights do not run on.
    """
    places = {name: _place_of(name, device) for name, device in device_map.items()}
    devices = sorted({place for place in places.values() if place.startswith("cuda")})
    if len(devices) > 1:
        raise BackendError(
            f"device_map: packed weights run on one CUDA device, got {', '.join(devices)}"
        )
    wishes = {
        name: WISHES[place.partition(":")[0]]
        for name, place in places.items()
        if name or place == "disk"
    }
    return devices[0] if devices else "cpu", wishes


def _place_of(name: str, device: Any) -> str:
    """Return `cpu`, `disk` or `cuda:N` for an entry of a device map."""
    text = f"cuda:{device}" if isinstance(device, int) else str(device)
    if text in ("cpu", "disk"):
        return text
    if text.partition(":")[0] == "cuda":
        return text if ":" in text else f"cuda:{torch.cuda.current_device()}"
    raise BackendError(
        f"device_map: {name or 'model'}: packed weights run on the CPU or one CUDA device, got "
        f"{device!r}"
    )


def host_reader(kind: str) -> ReaderKind:
    """Return the reader for what goes to host memory when `kind` was asked for."""
    return "auto" if kind in ("cufile", "kvikio") else kind  # type: ignore[return-value]


def open_reader_for(kind: str, device: str, layouts: Sequence[FileLayout]) -> RecordReader:
    """Return the reader called `kind`; `cufile` and `kvikio` read into the memory of a device.

    Raises:
        BackendError: It cannot run here.
        ConfigError: There is no such reader.
    """
    if kind not in ("cufile", "kvikio"):
        return open_reader(kind)  # type: ignore[arg-type]
    if device == "cpu":
        raise BackendError(
            f"reader {kind!r} reads into device memory, and the model runs on the CPU; use "
            "reader='direct'"
        )
    return open_device_reader(kind, layouts[0].path)  # type: ignore[arg-type, return-value]


def open_device_store(
    layouts: Sequence[FileLayout],
    units: Sequence[Unit],
    specs: Sequence[tuple[WeightSpec, torch.dtype]],
    reader: RecordReader,
    device: Device,
    *,
    vram: int | None,
    ram: int | None,
    parameter_bytes: int,
    wishes: Mapping[str, HomeTier] | None = None,
    placement: DevicePlacement | None = None,
    verify: bool = True,
    threads: int = 2,
    unpacked: Sequence[str] = (),
) -> DeviceStore:
    """Return the packed weights of a model on `device`, filling VRAM first, then RAM.

    Args:
        layouts: The checkpoint's files.
        units: What moves.
        specs: What is multiplied by.
        reader: Reads records; the store closes it.
        device: Where the model computes.
        vram: Device memory for all weights: unpacked parameters, packed weights, slots and scratch.
            None takes nine tenths of what is free.
        ram: Host memory for packed weights and staging; None takes what the machine has.
        parameter_bytes: Unpacked parameters, which are on the device already.
        wishes: Tiers that are fixed beforehand, by unit name.
        placement: A tier per unit, instead of all that.
        verify: Check each record when it is first read.
        threads: Disk reads in flight.
        unpacked: Packed tensors that were expanded when the model was loaded.

    Raises:
        BudgetError: A budget is too small.
    """
    scratch = 2 * scratch_bytes(layouts, specs)
    if placement is None:
        if vram is not None:
            room = vram - parameter_bytes - scratch
        else:
            free, total = torch.cuda.mem_get_info(device.device)
            room = free - total // RESERVE_SHARE - scratch
        try:
            placement = spread_on_device(
                units,
                vram_bytes=room,
                ram_bytes=available_bytes() if ram is None else ram,
                wishes=wishes,
            )
        except BudgetError as error:
            raise BudgetError(
                f"vram: unpacked parameters take {parameter_bytes} bytes and scratch {scratch}; "
                f"{error}"
            ) from None
    return DeviceStore(
        layouts,
        units,
        specs,
        placement,
        reader,
        device=device,
        verify=verify,
        threads=threads,
        unpacked=unpacked,
    )
