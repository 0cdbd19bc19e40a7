"""What a caller's device map and memory limits mean, in Accelerate's words.

A device map names a place per module prefix (`0` or `"cuda:0"`, `"cpu"`, `"disk"`), or is one of
`"auto"`, `"balanced"`, `"balanced_low_0"` and `"sequential"`; `max_memory` limits what each place
may hold. Packed weights follow them without Accelerate's hooks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from endor.errors import BackendError, ConfigError
from endor.kernels import gpu_device
from endor.offload.device import CudaDevice, Device
from endor.planning.tiers import Tier
from endor.storage import FileLayout, RecordReader, open_reader
from endor.storage.cufile import open_device_reader
from endor.storage.source import ReaderKind

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")

RESERVE_SHARE = 10
"""Without a budget, this part of the device's memory is left for other users of it."""


@dataclass(slots=True)
class DeviceMap:
    """A device map and memory limits, as they were given.

    Attributes:
        mode: One of `AUTOMATIC`, or None.
        places: `cpu`, `disk` or `cuda:N` per module prefix; without a mode.
        limits: Bytes per place, from `max_memory`; a place that it leaves out is not used.
    """

    mode: str | None = None
    places: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)

    def limit(self, max_memory: Mapping[Any, Any]) -> None:
        """Take the limits that transformers hands on: the caller's, or what is free.

        Raises:
            ConfigError: A limit makes no sense.
        """
        for key, nbytes in max_memory.items():
            place = f"cuda:{key}" if isinstance(key, int) else str(key)
            if isinstance(nbytes, bool) or not isinstance(nbytes, int | float) or nbytes < 0:
                raise ConfigError(
                    f"max_memory: {key!r} must have bytes or text such as '6GiB', got {nbytes!r}"
                )
            self.limits[place] = int(nbytes)

    def devices(self) -> list[str]:
        """Return the CUDA devices to compute on, in order of layers; none for the processor.

        Raises:
            BackendError: One of them cannot be used.
        """
        if self.mode is None:
            found = [place for place in self.places.values() if place.startswith("cuda")]
        else:
            found = [
                place
                for place, nbytes in self.limits.items()
                if place.startswith("cuda") and nbytes > 0
            ]
        devices = list(dict.fromkeys(found))
        for device in devices:
            refusal = refuse(device)
            if refusal:
                what = "max_memory" if self.mode else "device_map"
                raise BackendError(
                    f"{what}: {device}: {refusal}; leave it out, or pass device_map='cpu'"
                )
        return devices

    @property
    def main(self) -> str:
        """The place of what no prefix names: the first device, as in Accelerate."""
        return next((p for p in self.places.values() if p.startswith("cuda")), "cpu")

    def place_of(self, name: str) -> str | None:
        """Return the place of a module or parameter: that of its longest prefix."""
        while name not in self.places:
            if not name:
                return None
            name = name.rpartition(".")[0]
        return self.places[name]

    def check(self, names: Iterable[str]) -> None:
        """Raise `ConfigError` unless each prefix names something and every parameter has a place.

        Args:
            names: All parameters of the model.
        """
        known = {""}
        for name in names:
            if self.places and self.place_of(name) is None:
                raise ConfigError(
                    f"device_map: gives no device for {name}; add its module, or '' for the rest"
                )
            while name:
                known.add(name)
                name = name.rpartition(".")[0]
        for prefix in self.places:
            if prefix not in known:
                raise ConfigError(
                    f"device_map: {prefix!r} is no module of the model that has weights"
                )

    def tier_of(self, name: str) -> Tier | None:
        """Return the tier that a map asks for a weight; None leaves it to the planner.

        A map of one place alone says where to compute, not what must be kept there.
        """
        if set(self.places.values()) == {"disk"}:
            return "disk"
        if len(set(self.places.values())) < 2:
            return None
        place = self.place_of(name) or self.main
        return "vram" if place.startswith("cuda") else "resident" if place == "cpu" else "disk"


def read_device_map(device_map: Any) -> DeviceMap:
    """Return what `device_map` asks for; transformers has turned single devices into maps.

    Raises:
        BackendError: A place that packed weights do not run on.
        ConfigError: It is no device map.
    """
    if device_map is None or device_map in AUTOMATIC:
        return DeviceMap(device_map)
    if not isinstance(device_map, Mapping) or not device_map:
        raise ConfigError(
            f"device_map must be a map of module prefixes, or one of {', '.join(AUTOMATIC)}, got "
            f"{device_map!r}"
        )
    return DeviceMap(places={name: _place_of(name, place) for name, place in device_map.items()})


def _place_of(name: str, device: Any) -> str:
    """Return `cpu`, `disk` or `cuda:N` for an entry of a device map."""
    text = f"cuda:{device}" if isinstance(device, int) else str(device)
    if text in ("cpu", "disk"):
        return text
    kind, _, index = text.partition(":")
    if kind == "cuda" and (not index or index.isdigit()):
        if not index:
            index = str(torch.cuda.current_device() if torch.cuda.is_available() else 0)
        return f"cuda:{index}"
    raise BackendError(
        f"device_map: {name or 'model'}: packed weights run on the CPU or CUDA devices, got "
        f"{device!r}"
    )


def refuse(device: str) -> str | None:
    """Return why packed weights cannot run on a device, None when they can."""
    return gpu_device.refusal(device)


def open_device(name: str) -> Device:
    """Return a CUDA device with a copy stream of its own.

    Raises:
        BackendError: It cannot be used.
    """
    return CudaDevice(name)


def device_budget(device: Device, vram: int | None, limit: int | None) -> int:
    """Return the memory of a device that a model may take.

    Args:
        device: The device, before anything of the model is there.
        vram: What the caller gives; it is taken at the word.
        limit: At most so much; without `vram`, a tenth of the device is left free all the same.
    """
    if vram is not None:
        return vram
    free, total = device.memory()
    room = free - total // RESERVE_SHARE
    return max(1, room if limit is None else min(room, limit))


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
