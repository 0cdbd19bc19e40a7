"""What could take the process down runs in a child: guard pages, hostile arrays, fork."""

import subprocess
import sys
import textwrap

import pytest

SETUP = """
import ctypes, mmap, os, sys
import numpy as np
from endor import codecs, kernels
from endor.codecs import DTYPES, Encoded
from endor.errors import FormatError

kernel = sys.argv[1]
rng = np.random.default_rng(1)
libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(array):
    '''A copy of `array` whose last byte is followed by a page that cannot be touched.'''
    page = mmap.PAGESIZE
    size = -(-max(array.nbytes, 1) // page) * page
    area = mmap.mmap(-1, size + page)
    kept.append(area)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0) == 0
    raw = np.frombuffer(area, dtype=np.uint8, count=size)[size - array.nbytes :]
    raw[:] = array.reshape(-1).view(np.uint8)
    return raw.view(array.dtype).reshape(array.shape)

def tensors():
    for name in ("BF16", "F16", "F32", "F8_E4M3", "I8"):
        item = DTYPES[name]
        for n in (1, 64, 1000, 1024, 5000, 8192, 20000):
            for density in (1.0, 0.5, 0.02):
                bits = rng.integers(0, 1 << 8 * item.itemsize, n, dtype=item.uint)
                bits[rng.random(n) >= density] = 0
                for codec, bitmap in (("raw", None), ("exp", True), ("exp", False)):
                    yield bits, item, codecs.encode(bits, item, codec=codec, bitmap=bitmap)
"""

GUARD = """
for bits, item, encoded in tensors():
    tight = Encoded(encoded.spec, {k: guarded(v) for k, v in encoded.arrays.items()})
    for threads, streaming in ((1, False), (2, True)):
        out = guarded(np.zeros_like(bits))
        kernels.decode(tight, out, threads=threads, streaming=streaming, kernel=kernel)
        assert np.array_equal(out, bits)
    again = kernels.encode(guarded(bits), item, codec=encoded.spec.codec, kernel=kernel)
    for cols in (64, 50):
        if item.name in ("BF16", "F16", "F32") and bits.size % cols == 0:
            shaped = codecs.encode(bits.reshape(-1, cols), item, codec=encoded.spec.codec)
            tight = Encoded(shaped.spec, {k: guarded(v) for k, v in shaped.arrays.items()})
            for x in (np.zeros((3, cols), np.float32), np.zeros((3, cols), item.uint)):
                out = guarded(np.zeros((3, bits.size // cols), np.float32))
                kernels.matvec(tight, guarded(x), out, kernel=kernel)
    kept[:-200] = []
print("ok")
"""

HOSTILE = """
for bits, item, encoded in tensors():
    for suffix in encoded.arrays:
        arrays = {k: guarded(v) for k, v in encoded.arrays.items()}
        raw = arrays[suffix].reshape(-1).view(np.uint8)
        if not raw.size:
            continue
        at = rng.integers(0, raw.size, 20)
        raw[at] = rng.integers(0, 256, 20)
        if rng.random() < 0.3:
            raw[:] = 255
        buffer = guarded(np.full(bits.size + 64, 0xA5, dtype=bits.dtype))
        out = buffer[64:]
        try:
            kernels.decode(Encoded(encoded.spec, arrays), out, threads=2, kernel=kernel)
        except FormatError:
            pass
        assert (buffer[:64] == 0xA5).all()
        if item.name in ("BF16", "F16", "F32"):
            rows = max(bits.size // 64, 1)
            cols = bits.size // rows
            if rows * cols == bits.size:
                spec = codecs.TensorSpec(
                    (rows, cols), *(getattr(encoded.spec, f) for f in
                    ("dtype", "codec", "bitmap", "nnz", "k", "base", "patches"))
                )
                try:
                    kernels.matvec(
                        Encoded(spec, arrays), np.zeros((2, cols), np.float32),
                        guarded(np.zeros((2, rows), np.float32)), kernel=kernel)
                except FormatError:
                    pass
    kept[:-200] = []
print("ok")
"""

FORK = """
bits = rng.integers(0, 3, 600_000).astype(np.uint16)
encoded = codecs.encode(bits, DTYPES["BF16"], codec="raw")

def good():
    out = np.zeros_like(bits)
    kernels.decode(encoded, out, threads=4, kernel=kernel)
    return np.array_equal(out, bits)

assert good()
children = []
for _ in range(4):
    child = os.fork()
    if not child:
        os._exit(0 if all(good() for _ in range(20)) else 1)
    children.append(child)
    assert good()
for child in children:
    assert os.waitpid(child, 0)[1] == 0
assert good()
print("ok")
"""


def run(script: str, kernel: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SETUP + script), kernel],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stderr[-3000:]}"
    assert done.stdout.strip() == "ok"


def test_nothing_outside_the_arrays_is_touched(compiled: str) -> None:
    run(GUARD, compiled)


def test_hostile_arrays_do_no_harm(compiled: str) -> None:
    run(HOSTILE, compiled)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_workers_after_fork(compiled: str) -> None:
    run(FORK, compiled)


def test_import_needs_neither_torch_nor_a_library() -> None:
    code = "import sys, endor.kernels; assert 'torch' not in sys.modules; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "ok", done.stderr
