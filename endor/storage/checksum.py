"""The checksum of headers and records: xxh3_64, as 16 hexadecimal digits."""

import xxhash

DIGITS = 16


class Digest:
    """A checksum that grows with the bytes it is fed."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def update(self, data: bytes | memoryview) -> None:
        self._state.update(data)

    def hexdigest(self) -> str:
        return str(self._state.hexdigest())


def checksum(data: bytes | memoryview) -> str:
    """Return the xxh3_64 of `data`, most significant digit first."""
    return str(xxhash.xxh3_64_hexdigest(data))
