"""Matrices in bundles: packed, unpacked and checked with numpy, the reference.

What a bundle is: `endor.codecs.bundles`. A neuron's weights then are one run of bytes of the file,
so that one request reads them (PowerInfer, arXiv 2312.12456, and LLM in a flash, arXiv 2312.11514,
which bundles rows and columns of one neuron, say why that matters).
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from endor.codecs import exp, raw
from endor.codecs.bitmap import tile_offsets
from endor.codecs.bundles import HEAD, UNIT, WANTED_NBYTES, Bundles, align, places
from endor.codecs.spec import BITMAP_TILE_BYTES, GROUP, TILE, Encoded, TensorSpec
from endor.errors import FormatError


def rows_together(spec: TensorSpec) -> int:
    """Return how many rows of the stored matrix `spec` make a bundle of about 4 KiB, at least 1."""
    rows = spec.shape[0]
    return max(1, min(rows, WANTED_NBYTES * rows // max(spec.nbytes, 1)))


def bundled_spec(stored: TensorSpec, rows: int, nbytes: int) -> TensorSpec:
    """Return the spec of the matrix whose transposed one, `stored`, lies in bundles."""
    return replace(stored.turned(), bundles=Bundles(rows, nbytes))


def part_spec(spec: TensorSpec, index: int, nnz: int, patches: int) -> TensorSpec:
    """Return the spec of one bundle, as a matrix of its own."""
    assert spec.bundles is not None
    cols, rows = spec.shape
    first = index * spec.bundles.rows
    shape = (min(spec.bundles.rows, rows - first), cols)
    return replace(spec, shape=shape, nnz=nnz, patches=patches, transposed=False, bundles=None)


def encode(bits: np.ndarray, form: TensorSpec, rows: int) -> Encoded:
    """Return the matrix whose transposed one is `bits`, in bundles of `rows` of its rows.

    Args:
        bits: Unsigned `(neurons, hidden)`.
        form: Codec, bitmap and window.
        rows: Of a bundle.
    """
    parts = []
    for first in range(0, len(bits), rows):
        piece = np.ascontiguousarray(bits[first : first + rows])
        if form.codec == "raw":
            parts.append(raw.encode(piece, form.dtype))
        else:
            made = exp.encode(piece, form.dtype, bitmap=form.bitmap, k=form.k, base=form.base)
            parts.append(made)
    sizes = [HEAD + sum(align(array.nbytes) for array in part.spec.arrays) for part in parts]
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    data = np.zeros(int(offsets[-1]), dtype=np.uint8)
    for part, at in zip(parts, offsets.tolist(), strict=False):
        head = np.array([part.spec.nnz, part.spec.patches], dtype="<u4")
        data[at : at + HEAD] = head.view(np.uint8)
        for suffix, start, nbytes in places(_sizes_of(part.spec)):
            if nbytes:
                flat = part.arrays[suffix].reshape(-1).view(np.uint8)
                data[at + start : at + start + nbytes] = flat
    stored = replace(
        form,
        shape=bits.shape,
        nnz=sum(part.spec.nnz for part in parts),
        patches=sum(part.spec.patches for part in parts),
        transposed=False,
        bundles=None,
    )
    arrays = {"bundle_offsets": (offsets // UNIT).astype("<u4"), "bundles": data}
    return Encoded(bundled_spec(stored, rows, data.size), arrays)


def decode(encoded: Encoded) -> np.ndarray:
    """Return the elements of the stored matrix, flat; `encoded` is valid."""
    out = np.empty(encoded.spec.numel, dtype=encoded.spec.dtype.uint)
    at = 0
    for part in parts(encoded):
        module = raw if part.spec.codec == "raw" else exp
        out[at : at + part.spec.numel] = module.decode(part)
        at += part.spec.numel
    return out


def parts(encoded: Encoded) -> Iterator[Encoded]:
    """Yield each bundle as a matrix of its own, its arrays being views; `encoded` is valid."""
    for index in range(len(encoded.arrays["bundle_offsets"]) - 1):
        yield part(encoded, index)


def part(encoded: Encoded, index: int) -> Encoded:
    """Return one bundle as a matrix of its own, its arrays being views; `encoded` is valid."""
    offsets, data = encoded.arrays["bundle_offsets"], encoded.arrays["bundles"]
    begin = UNIT * int(offsets[index])
    nnz, patches = data[begin : begin + HEAD].view("<u4").tolist()
    spec = part_spec(encoded.spec, index, nnz, patches)
    starts = {suffix: start for suffix, start, _ in places(_sizes_of(spec))}
    arrays = {}
    for array in spec.arrays:
        at = begin + starts[array.suffix]
        flat = data[at : at + array.nbytes].view(array.dtype.uint)
        arrays[array.suffix] = flat.reshape(array.unit_shape)
    return Encoded(spec, arrays)


def check(encoded: Encoded) -> None:
    """Raise `FormatError` unless every bundle is what it must be; shapes were checked before."""
    spec, offsets = encoded.spec, encoded.arrays["bundle_offsets"].astype(np.int64)
    words = encoded.arrays["bundles"].view("<u8")
    if offsets[0] != 0 or offsets[-1] != words.size or (np.diff(offsets) < 1).any():
        raise FormatError(f"bundle_offsets must rise from 0 to {words.size}")
    heads = words[offsets[:-1]].astype(np.uint64)
    nnz = (heads & np.uint64(0xFFFFFFFF)).astype(np.int64)
    patches = (heads >> np.uint64(32)).astype(np.int64)
    if (int(nnz.sum()), int(patches.sum())) != (spec.nnz, spec.patches):
        raise FormatError(
            f"bundles must have nnz {spec.nnz} and {spec.patches} patches, got {int(nnz.sum())} "
            f"and {int(patches.sum())}"
        )
    assert spec.bundles is not None
    whole = spec.shape[1] // spec.bundles.rows
    for first, last in ((0, whole), (whole, nnz.size)):
        if first < last:
            one = part_spec(spec, first, 0, 0)
            alike = _Alike(one, words, first, offsets[first : last + 1])
            alike.check(nnz[first:last], patches[first:last])


class _Alike:
    """Bundles of one shape that follow each other.

    Args:
        spec: Of one of them, but for what it stores.
        words: All bundles as u64.
        first: Number of the first of these.
        offsets: Where they begin, and the last one ends, in words.
    """

    def __init__(
        self, spec: TensorSpec, words: np.ndarray, first: int, offsets: np.ndarray
    ) -> None:
        self.spec, self.words, self.first = spec, words, first
        self.begins, self.ends = offsets[:-1], offsets[1:]

    def check(self, nnz: np.ndarray, patches: np.ndarray) -> None:
        spec = self.spec
        least = 0 if spec.bitmap else spec.numel
        fits: np.ndarray = (least <= nnz) & (nnz <= spec.numel)
        self.require(fits, f"nnz must fit {spec.numel} elements")
        most = nnz if spec.codec == "exp" else np.zeros_like(nnz)
        self.require(patches <= most, "patches must not exceed nnz")
        found = list(places(_sizes(spec, nnz, patches)))
        starts = {suffix: start for suffix, start, _ in found}
        self.require(
            self.begins + found[-1][1] // UNIT == self.ends,
            "its length must be what nnz and patches need",
        )
        for suffix, start, nbytes in found[:-1]:
            self.check_gap(suffix, start, nbytes)
        ranks = None
        if spec.bitmap:
            ranks = self.check_bitmap(starts, nnz)
        if spec.codec == "exp":
            self.check_planes(starts["planes"], nnz)
            self.check_patches(starts, nnz, patches, ranks)

    def require(self, right: np.ndarray, rule: str) -> None:
        wrong = np.flatnonzero(~np.broadcast_to(right, self.begins.shape))
        if wrong.size:
            raise FormatError(f"bundle {self.first + int(wrong[0])}: {rule}")

    def gather(self, begins: np.ndarray, start: np.ndarray | int, count: int) -> np.ndarray:
        """Return `count` words of bundles from byte `start` on, u64 `(bundles, count)`."""
        at = begins + start // UNIT
        return np.ascontiguousarray(self.words[at[:, None] + np.arange(count)])

    def check_gap(self, suffix: str, start: np.ndarray | int, nbytes: np.ndarray | int) -> None:
        odd = np.broadcast_to(np.asarray(nbytes) % UNIT, self.begins.shape)
        some = np.flatnonzero(odd)
        last = (self.begins + (start + nbytes) // UNIT)[some]
        rest = self.words[last] >> (8 * odd[some]).astype(np.uint64)
        right = np.ones(self.begins.shape, dtype=np.bool_)
        right[some] = rest == 0
        self.require(right, f"bytes behind {suffix} must be 0")

    def check_bitmap(self, starts: dict[str, np.ndarray | int], nnz: np.ndarray) -> np.ndarray:
        """Return the rank of the first stored element of each tile, and nnz, of each bundle."""
        spec = self.spec
        bitmap = self.gather(
            self.begins, starts["bitmap"], spec.n_tiles * BITMAP_TILE_BYTES // UNIT
        )
        whole, odd = divmod(spec.numel, 64)
        past = bitmap[:, whole:].copy()
        if odd:
            past[:, 0] >>= np.uint64(odd)
        zero: np.ndarray = (past == 0).all(axis=1)
        self.require(zero, f"bitmap bits past element {spec.numel} must be 0")
        counts = np.diff(tile_offsets(bitmap.reshape(-1).view(np.uint8)).astype(np.int64))
        counted = np.cumsum(counts.reshape(len(bitmap), spec.n_tiles), axis=1)
        words = align(4 * (spec.n_tiles + 1)) // UNIT
        given = self.gather(self.begins, starts["tile_offsets"], words).view("<u4")
        given = given[:, : spec.n_tiles + 1]
        ranks = np.concatenate([np.zeros((len(bitmap), 1), np.int64), counted], axis=1)
        self.require((given == ranks).all(axis=1), "tile_offsets must count the bits of its bitmap")
        self.require(ranks[:, -1] == nnz, "nnz must count the bits of its bitmap")
        return ranks

    def check_planes(self, start: np.ndarray | int, nnz: np.ndarray) -> None:
        words, odd = -(-nnz // 64), (nnz % 64).astype(np.uint64)
        for plane in range(self.spec.bit_planes):
            last = self.begins + start // UNIT + (plane + 1) * words - 1
            past = self.words[last] >> odd
            self.require((odd == 0) | (past == 0), "bits of a plane past nnz must be 0")

    def check_patches(
        self,
        starts: dict[str, np.ndarray | int],
        nnz: np.ndarray,
        patches: np.ndarray,
        ranks: np.ndarray | None,
    ) -> None:
        spec, some = self.spec, np.flatnonzero(patches)
        if not some.size:
            return
        bundles = self.begins[some]
        at = {
            suffix: np.broadcast_to(np.asarray(start), nnz.shape)[some]
            for suffix, start in starts.items()
        }
        groups = spec.n_groups
        offsets = self.gather(bundles, at["patch_offsets"], align(4 * (groups + 1)) // UNIT)
        offsets = offsets.view("<u4")[:, : groups + 1].astype(np.int64)
        rises = (offsets[:, 0] == 0) & (offsets[:, -1] == patches[some])
        rises &= (np.diff(offsets, axis=1) >= 0).all(axis=1)
        self._require_of(some, rises, "patch_offsets must rise from 0 to patches")
        begins = np.broadcast_to(np.arange(groups) * GROUP, (some.size, groups))
        if ranks is not None:
            begins = ranks[some][:, : -1 : GROUP // TILE]
        sizes = np.diff(np.concatenate([begins, nnz[some][:, None]], axis=1), axis=1)
        group = np.repeat(np.arange(some.size * groups), np.diff(offsets, axis=1).reshape(-1))
        relative = self._flat("<u2", bundles, at["patch_ranks"], patches[some])
        owner = group // groups
        inside = relative < sizes.reshape(-1)[group]
        self._require_each(some, owner, inside, "a patch rank must lie inside its group")
        absolute = begins.reshape(-1)[group] + relative
        rising = np.ones(absolute.shape, dtype=np.bool_)
        rising[1:] = (np.diff(absolute) > 0) | (np.diff(owner) > 0)
        self._require_each(some, owner, rising, "patch ranks must be strictly increasing")
        exponents = self._flat("<u1", bundles, at["patch_exponents"], patches[some])
        below = exponents >> spec.dtype.exponent_bits == 0
        limit = f"a patch exponent must be below {1 << spec.dtype.exponent_bits}"
        self._require_each(some, owner, below, limit)

    def _flat(
        self, dtype: str, begins: np.ndarray, start: np.ndarray, count: np.ndarray
    ) -> np.ndarray:
        """Return `count` items from byte `start` of each bundle on, one behind the other."""
        items = self.words.view(dtype)
        first = (UNIT * begins + start) // items.itemsize
        before = np.cumsum(count) - count
        found: np.ndarray = items[np.repeat(first - before, count) + np.arange(int(count.sum()))]
        return found.astype(np.int64)

    def _require_of(self, some: np.ndarray, right: np.ndarray, rule: str) -> None:
        all_right = np.ones(self.begins.shape, dtype=np.bool_)
        all_right[some] = right
        self.require(all_right, rule)

    def _require_each(
        self, some: np.ndarray, owner: np.ndarray, right: np.ndarray, rule: str
    ) -> None:
        self._require_of(some, np.bincount(owner[~right], minlength=some.size) == 0, rule)


def _sizes_of(spec: TensorSpec) -> list[tuple[str, int]]:
    return [(array.suffix, array.nbytes) for array in spec.arrays]


def _sizes(
    spec: TensorSpec, nnz: np.ndarray, patches: np.ndarray
) -> list[tuple[str, np.ndarray | int]]:
    """Return suffix and bytes of the arrays of bundles, in the order of `TensorSpec.arrays`."""
    out: list[tuple[str, np.ndarray | int]] = []
    if spec.bitmap:
        out += [("tile_offsets", 4 * (spec.n_tiles + 1))]
        out += [("bitmap", spec.n_tiles * BITMAP_TILE_BYTES)]
    if spec.codec == "raw":
        return [*out, ("values", nnz * spec.dtype.itemsize)]
    if spec.byte_planes:
        out.append(("bytes", nnz * spec.byte_planes))
    out.append(("planes", 8 * spec.bit_planes * -(-nnz // 64)))
    out.append(("patch_offsets", np.where(patches > 0, 4 * (spec.n_groups + 1), 0)))
    return [*out, ("patch_ranks", 2 * patches), ("patch_exponents", patches)]
