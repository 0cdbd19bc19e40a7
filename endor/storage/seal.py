"""What marks a safetensors file as Endor's: the checksum that seals its header, and two keys."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from endor.errors import ChecksumError, FormatError
from endor.storage.checksum import DIGITS, checksum
from endor.storage.safetensors import Entry, Header, brief, header_json, with_length

DIRECTORY_KEY = "endor"
CHECKSUM_KEY = "endor.checksum"
RESERVED_METADATA = frozenset({"format", DIRECTORY_KEY, CHECKSUM_KEY})
PAD_PREFIX = "__pad__."

_MARKER = f'"{CHECKSUM_KEY}":"'.encode()
_BLANK = b"0" * DIGITS


def is_sealed(header: Header) -> bool:
    """Whether anything in the header says that Endor wrote the file."""
    keys = (DIRECTORY_KEY, CHECKSUM_KEY)
    return any(key in header.metadata for key in keys) or any(
        key.startswith(PAD_PREFIX) for key in header.entries
    )


def check_seal(header: Header) -> None:
    """Raise unless the header's bytes match the checksum that it carries.

    Raises:
        FormatError: There is no well-formed checksum.
        ChecksumError: It differs.
    """
    recorded = header.metadata.get(CHECKSUM_KEY, "")
    digits = recorded.encode(errors="replace")
    if len(digits) != DIGITS or header.raw.count(_MARKER + digits + b'"') != 1:
        raise FormatError(
            f"{header.path}: metadata must hold {CHECKSUM_KEY}, {DIGITS} hexadecimal digits "
            f"written once and without spaces, got {brief(recorded)}; copy the file again"
        )
    found = checksum(header.raw.replace(_MARKER + digits, _MARKER + _BLANK))
    if found != recorded:
        raise ChecksumError(
            f"{header.path}: header checksum must be {recorded}, got {found}; the header is "
            "damaged: copy or convert the file again"
        )


def seal(
    entries: Iterable[tuple[str, Entry]],
    directory: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> bytes:
    """Return the header JSON for `entries`, with a blank checksum and no padding."""
    text = json.dumps(directory, separators=(",", ":"), ensure_ascii=False)
    ours = {DIRECTORY_KEY: text, CHECKSUM_KEY: _BLANK.decode()}
    return header_json(entries, {**metadata, **ours})


def finish(blank: bytes, data_start: int) -> bytes:
    """Return what `seal` gave with its length, padding and checksum: `data_start` bytes."""
    raw = with_length(blank, data_start)
    return raw.replace(_MARKER + _BLANK, _MARKER + checksum(raw).encode(), 1)
