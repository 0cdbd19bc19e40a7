"""The kernels' library as another process: cross-compiled for 64-bit ARM, run by qemu."""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from endor import codecs
from endor.kernels import native

COMPILER = "aarch64-linux-gnu-gcc"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")

_HERE = Path(__file__).parent
_CSRC = Path(native.__file__).parent / "csrc"
_POINTER = 0xE17D0F0000000000
_POINTERS = tuple(name for name, kind in native.Tensor._fields_ if kind is ctypes.c_void_p)
_INT, _READ, _WRITTEN, _STRUCTURE = range(4)

Argument = tuple[int, Any]
"""A kind, and an integer, an (address, size), or bytes."""


def emulator() -> str | None:
    """Return the program that runs ARM code here, None where there is none."""
    return next((found for name in EMULATORS if (found := shutil.which(name))), None)


def missing() -> str | None:
    """Return what keeps the ARM kernels from being tested here, None when nothing does."""
    if shutil.which(COMPILER) is None:
        return f"{COMPILER} is not installed (Debian: gcc-aarch64-linux-gnu)"
    if emulator() is None:
        return f"{EMULATORS[0]} is not installed (Debian: qemu-user)"
    return None


def build(folder: Path) -> Path:
    """Compile the kernels and the server, warnings being errors, and return the program."""
    program = folder / "server"
    flags = ("-O3", "-std=gnu11", "-pthread", "-static", "-Wall", "-Wextra", "-Werror")
    sources = sorted(str(path) for path in _CSRC.glob("*.c"))
    subprocess.run(
        [COMPILER, *flags, f"-I{_CSRC}", str(_HERE / "server.c"), *sources, "-o", str(program)],
        check=True,
    )
    return program


class Remote:
    """Stands in for the ctypes library: the same functions, with the same arguments."""

    def __init__(self, program: Path, cpu: str) -> None:
        runner = emulator()
        assert runner is not None
        self._process = subprocess.Popen(
            [runner, "-cpu", cpu, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    def _call(self, function: int, *arguments: Argument) -> int:
        message = [struct.pack("<II", function, len(arguments))]
        for kind, value in arguments:
            if kind == _INT:
                message.append(struct.pack("<IQ", kind, value & (1 << 64) - 1))
                continue
            data = value if kind == _STRUCTURE else ctypes.string_at(*value)
            message += [struct.pack("<IQ", kind, len(data)), data]
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        pipe_in.write(b"".join(message))
        pipe_in.flush()
        answer = pipe_out.read(8)
        if len(answer) != 8:
            raise AssertionError(
                f"the kernel under qemu ended with status {self._process.wait(20)}: it was killed "
                "for an access outside of its arrays, or crashed"
            )
        for kind, value in arguments:
            if kind == _WRITTEN:
                address, size = value
                ctypes.memmove(address, pipe_out.read(size), size)
        return int(struct.unpack("<Q", answer)[0])

    def _status(self, function: int, *arguments: Argument) -> int:
        return ctypes.c_int(self._call(function, *arguments) & 0xFFFFFFFF).value

    @staticmethod
    def _tensor(view: native.Tensor, written: tuple[str, ...] = ()) -> list[Argument]:
        """Return the arguments 1 to 9 that stand for a tensor: its arrays, then its structure."""
        tiles = -(-view.numel // codecs.TILE)
        groups = -(-tiles // 8)
        sizes = {
            "tile_offsets": 4 * (tiles + 1),
            "bitmap": 128 * tiles,
            "values": view.nnz * view.itemsize,
            "bytes": view.nnz * (view.rest_bits // 8),
            "planes": (view.k + view.rest_bits % 8) * 8 * -(-view.nnz // 64),
            "patch_offsets": 4 * (groups + 1),
            "patch_ranks": 2 * view.patches,
            "patch_exponents": view.patches,
        }
        raw = bytearray(bytes(view))
        arguments: list[Argument] = []
        for index, name in enumerate(_POINTERS, start=1):
            address = getattr(view, name)
            if address:
                at = getattr(native.Tensor, name).offset
                raw[at : at + 8] = struct.pack("<Q", _POINTER + index)
                kind = _WRITTEN if name in written else _READ
                arguments.append((kind, (address, sizes[name])))
            else:
                arguments.append((_INT, 0))
        return [*arguments, (_STRUCTURE, bytes(raw))]

    def endor_kernels(self) -> int:
        return self._call(0)

    def endor_has_bf16_pairs(self, kernel: int) -> int:
        return self._call(1, (_INT, kernel))

    def endor_decode(
        self, kernel: int, view: Any, out: int, start: int, stop: int, threads: int, streaming: int
    ) -> int:
        tensor = view._obj
        size = (stop - start) * tensor.itemsize
        return self._status(
            2,
            (_INT, kernel),
            *self._tensor(tensor),
            (_WRITTEN, (out, size)),
            *((_INT, value) for value in (start, stop, threads, streaming)),
        )

    def endor_scan(
        self,
        kernel: int,
        src: int,
        n: int,
        itemsize: int,
        exponent_bits: int,
        mantissa_bits: int,
        bitmap: int,
        tile_offsets: int,
        histogram: int,
        threads: int,
    ) -> int:
        tiles = -(-n // codecs.TILE)
        return self._call(
            3,
            (_INT, kernel),
            (_READ, (src, n * itemsize)),
            *((_INT, value) for value in (n, itemsize, exponent_bits, mantissa_bits)),
            (_WRITTEN, (bitmap, 128 * tiles)),
            (_WRITTEN, (tile_offsets, 4 * (tiles + 1))),
            (_WRITTEN, (histogram, 8 * 256)),
            (_INT, threads),
        )

    def endor_pack_raw(
        self,
        kernel: int,
        src: int,
        n: int,
        itemsize: int,
        bitmap: int,
        tile_offsets: int,
        values: int,
        threads: int,
    ) -> int:
        tiles = -(-n // codecs.TILE)
        elements = np.frombuffer(ctypes.string_at(src, n * itemsize), f"u{itemsize}")
        stored = int(np.count_nonzero(elements))
        return self._call(
            4,
            (_INT, kernel),
            (_READ, (src, n * itemsize)),
            (_INT, n),
            (_INT, itemsize),
            (_WRITTEN, (bitmap, 128 * tiles)),
            (_WRITTEN, (tile_offsets, 4 * (tiles + 1))),
            (_WRITTEN, (values, stored * itemsize)),
            (_INT, threads),
        )

    def endor_exp_start(
        self, kernel: int, view: Any, src: int, histogram: int | None, nnz: Any, threads: int
    ) -> int:
        tensor = view._obj
        return self._call(
            5,
            (_INT, kernel),
            *self._tensor(tensor, ("tile_offsets", "bitmap", "bytes", "planes")),
            (_READ, (src, tensor.numel * tensor.itemsize)),
            (_INT, 0) if histogram is None else (_WRITTEN, (histogram, 8 * 256)),
            (_WRITTEN, (ctypes.addressof(nnz._obj), 8)),
            (_INT, threads),
        )

    def endor_exp_finish(self, job: int, view: Any) -> int:
        written = ("patch_offsets", "patch_ranks", "patch_exponents")
        return self._status(8, (_INT, job), *self._tensor(view._obj, written))

    def endor_exp_free(self, job: int) -> None:
        self._call(9, (_INT, job))

    def endor_matvec(
        self,
        kernel: int,
        view: Any,
        weight_kind: int,
        rows: int,
        cols: int,
        x: int,
        x_kind: int,
        batch: int,
        out: int,
        threads: int,
    ) -> int:
        x_size = 4 if x_kind == native.WEIGHT_KINDS["F32"] else 2
        return self._status(
            6,
            (_INT, kernel),
            *self._tensor(view._obj),
            *((_INT, value) for value in (weight_kind, rows, cols)),
            (_READ, (x, batch * cols * x_size)),
            (_INT, x_kind),
            (_INT, batch),
            (_WRITTEN, (out, 4 * batch * rows)),
            (_INT, threads),
        )

    def endor_probe(self, kernel: int, dst: int | None, src: int, nbytes: int, threads: int) -> int:
        to = (_INT, 0) if dst is None else (_WRITTEN, (dst, nbytes))
        return self._call(
            7, (_INT, kernel), to, (_READ, (src, nbytes)), (_INT, nbytes), (_INT, threads)
        )

    def probe_beyond(self, array: np.ndarray) -> int:
        """Have a kernel read a page more than `array` holds."""
        here = (array.ctypes.data, array.nbytes)
        count = array.nbytes + 8192
        return self._call(7, (_INT, 0), (_INT, 0), (_READ, here), (_INT, count), (_INT, 1))
