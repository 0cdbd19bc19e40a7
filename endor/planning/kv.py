"""How much memory the cache of keys and values takes, by where it is kept."""

from dataclasses import dataclass
from typing import Literal

from endor.errors import ConfigError

KVSetting = Literal["auto", "device", "ram", "disk"]
"""Where keys and values stay between uses: where the model computes, in host memory, or in a file;
`auto` takes the first of these that fits."""

SETTINGS: tuple[KVSetting, ...] = ("device", "ram", "disk")

SLOTS = 2
"""Layers whose keys and values are on their way or in use: one is used, the next one comes."""


@dataclass(frozen=True, slots=True)
class KVBytes:
    """Memory that a setting takes.

    Attributes:
        compute: Where the model computes: device memory, or RAM without a device.
        ram: Host memory beside a device.
        disk: File space.
    """

    compute: int
    ram: int
    disk: int


def check_kv(setting: str) -> KVSetting:
    """Return a setting that a caller gave.

    Raises:
        ConfigError: There is none of that name.
    """
    for known in ("auto", *SETTINGS):
        if setting == known:
            return known
    raise ConfigError(f"kv must be auto, device, ram or disk, got {setting!r}")


def kv_bytes(
    setting: KVSetting, total_bytes: int, layers: int, *, beside_device: bool = False
) -> KVBytes:
    """Return the memory that a full cache takes.

    Args:
        setting: Where it is kept; not `auto`.
        total_bytes: Keys and values of all layers, tokens and sequences of the batch.
        layers: Layers that share it evenly.
        beside_device: Whether the model computes on a device with memory of its own.

    Raises:
        ConfigError: Another setting.
    """
    layer = -(-total_bytes // max(1, layers))
    # One layer's keys and values as attention reads them, beside the slots that they come through.
    working = min(total_bytes, layer) * (1 + SLOTS)
    if setting == "device":
        return KVBytes(total_bytes, 0, 0)
    if setting == "ram" and beside_device:
        return KVBytes(working, total_bytes, 0)
    if setting == "ram":
        return KVBytes(total_bytes + layer, 0, 0)
    if setting == "disk":
        return KVBytes(working, SLOTS * layer if beside_device else 0, total_bytes)
    raise ConfigError(f"kv must be {', '.join(SETTINGS)} to be counted, got {setting!r}")


def choose_kv(
    total_bytes: int, layers: int, *, compute_bytes: int, ram_bytes: int | None = None
) -> KVSetting:
    """Return the first setting of `device`, `ram`, `disk` that fits, `disk` when none does.

    Args:
        total_bytes: Keys and values of all layers, tokens and sequences.
        layers: Layers that share it evenly.
        compute_bytes: What is left for it where the model computes.
        ram_bytes: What is left for it in host memory beside a device; None without a device.
    """
    for setting in SETTINGS:
        needs = kv_bytes(setting, total_bytes, layers, beside_device=ram_bytes is not None)
        if needs.compute <= compute_bytes and needs.ram <= (ram_bytes or 0):
            return setting
    return "disk"
