"""Packing by several processes: each packs a share of the records, one assembles them.

    OUT.shares/00001-of-00004/    a share: a packed checkpoint of its records, and its run

A share is made like any output: it appears whole or not at all, it is locked while it is made, and
it goes on where it was killed. So shares may be packed at once, by workers that see one directory
(NFS, Lustre), and again where a worker was lost. Records are encoded one by one, so what the
assembly writes equals what one process would have written, byte for byte.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endor.checkpoint.output import check_output
from endor.checkpoint.plan import Unit
from endor.checkpoint.report import PackReport, Progress
from endor.checkpoint.sources.packed import PackedSource
from endor.checkpoint.targets import output_path, target_of
from endor.codecs import Encoded
from endor.errors import CheckpointError, ConfigError
from endor.jsontext import read_object
from endor.packing.pack import pack_checkpoint
from endor.packing.share_options import pack_call, plain_options, same_everywhere

NAME = "endor.share.json"
"""In a share: its number, the run it is part of, and how to call `pack_checkpoint` for it."""

MAX_SHARES = 9999


@dataclass(frozen=True, slots=True)
class Share:
    """One share of a run.

    Attributes:
        number: From 1.
        count: Shares in all.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Return the share that `I/N` means.

        Raises:
            ConfigError: It is none.
        """
        number, slash, count = text.partition("/")
        if slash and number.isdecimal() and count.isdecimal():
            share = cls(int(number), int(count))
            if 1 <= share.number <= share.count <= MAX_SHARES:
                return share
        raise ConfigError(f"share: must be I/N with 1 <= I <= N <= {MAX_SHARES}, got {text!r}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def directory(self) -> str:
        return f"{self.number:05d}-of-{self.count:05d}"


def shares_of(out: Path | str) -> Path:
    """Return where the shares of OUT lie."""
    target = target_of(output_path(out))
    return target.with_name(f"{target.name}.shares")


def pack_share(
    model: Path | str,
    out: Path | str,
    share: Share,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    **call: Any,
) -> PackReport:
    """Pack one share of a model's records into `OUT.shares`; `finish_checkpoint` makes OUT of all.

    A share that is there already, of the same model and options, is left as it is.

    Args:
        model: As for `pack_checkpoint`; a model on the Hub only with `stream`.
        out: OUT, which must not be there yet.
        share: Which of how many; all workers must be given the same number and options.
        overwrite: OUT will be replaced when all is assembled; the share is packed again.
        threads: As for `pack_checkpoint`.
        progress: As there.
        call: Options of `pack_checkpoint` that need no calibration.

    Raises:
        ConfigError: An option needs to see the whole model.
        CheckpointError: `OUT.shares` holds another run's shares, or other errors of
            `pack_checkpoint`.
    """
    home, made = shares_of(out), {**plain_options(call), "model": same_everywhere(model, call)}
    others = [path.name for path in _found(home) if not path.name.endswith(share.directory[5:])]
    if others:
        raise CheckpointError(
            f"{home}: holds share {others[0]}, and {share} is of another number of shares; give "
            "every worker the same, or remove that directory"
        )
    check_output(out, made["model"] if not call.get("stream") else home, overwrite=overwrite)
    done = home / share.directory
    again = (done / NAME).is_file()
    part = _Worker(share, made, done if again and not overwrite else None)
    try:
        return pack_checkpoint(
            **pack_call(made),
            out_dir=done,
            part=part,
            resume=not overwrite,
            overwrite=overwrite or again,
            threads=threads,
            progress=progress,
        )
    except _DoneBefore:
        from endor.checkpoint.report import Sizes

        with closing(PackedSource(done)) as source:
            return PackReport(done, Sizes.of(source.layouts), len(source.layouts), 0.0, 0)


def finish_checkpoint(
    out: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Make OUT of all its shares, which must be there and of one run; then remove these.

    Raises:
        CheckpointError: A share is missing, damaged, or of another run; or OUT cannot be made.
        OutputExistsError: As for `pack_checkpoint`.
    """
    home = shares_of(out)
    found = _found(home)
    if not found:
        raise CheckpointError(
            f"{home}: no shares here; pack them first: endor pack MODEL {out} --shard I/N"
        )
    notes = {path: _note(path) for path in found}
    count = int(found[0].name[-5:])
    names = [Share(number, count).directory for number in range(1, count + 1)]
    missing = [name for name in names if home / name not in notes]
    odd = [path.name for path in found if path.name not in names]
    if odd:
        raise CheckpointError(f"{home}: holds {found[0].name} and {odd[0]}, shares of two runs")
    if missing:
        raise CheckpointError(
            f"{home}: {len(missing)} of {count} shares are missing: {', '.join(missing[:3])}; "
            f"pack them: --shard {int(missing[0][:5])}/{count}"
        )
    first = notes[found[0]]
    with ExitStack() as stack:
        sources = [stack.enter_context(closing(PackedSource(path))) for path in found]
        report = pack_checkpoint(
            **pack_call(first["call"]),
            out_dir=out,
            part=_Assembly(notes, sources),
            resume=resume,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    shutil.rmtree(home)
    return report


class _DoneBefore(Exception):
    """The share is there already."""


class _Worker:
    """The part of a run that packs one share.

    Args:
        share: Which.
        call: What `pack_checkpoint` was called with.
        done: The share, where it was packed before.
    """

    def __init__(self, share: Share, call: Mapping[str, Any], done: Path | None) -> None:
        self._share = share
        self._call = call
        self._done = done
        self._identity: dict[str, Any] = {}

    def units(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """Return the share: records that follow each other, of about as many bytes in each."""
        count = self._share.count
        if count > len(units):
            raise ConfigError(
                f"share: {self._share} is of more shares than the {len(units)} records that there "
                "are; give a smaller N"
            )
        ends, total, before = [0], sum(unit.nbytes for unit in units) or 1, 0
        for place, unit in enumerate(units):
            before += unit.nbytes
            left = count - len(ends)  # shares that must still get a record each
            full = before * count >= len(ends) * total
            if len(ends) < count and (full or len(units) - place - 1 == left):
                ends.append(place + 1)
        ends.append(len(units))
        return units[ends[self._share.number - 1] : ends[self._share.number]]

    def identify(self, identity: dict[str, Any]) -> dict[str, Any]:
        self._identity = json.loads(json.dumps(identity))
        if self._done is not None:
            _check_same(self._done, _note(self._done), self._identity)
            raise _DoneBefore
        return {**identity, "share": str(self._share)}

    def files(self) -> Mapping[str, bytes]:
        note = {"share": str(self._share), "identity": self._identity, "call": self._call}
        return {NAME: (json.dumps(note, indent=1) + "\n").encode()}

    def encoded(self, name: str) -> Encoded | None:
        return None


class _Assembly:
    """The part of a run that writes what the shares hold."""

    def __init__(
        self, notes: Mapping[Path, Mapping[str, Any]], sources: Sequence[PackedSource]
    ) -> None:
        self._notes = notes
        self._homes = {name: source for source in sources for name in source.tensors}

    def units(self, units: Sequence[Unit]) -> Sequence[Unit]:
        for unit in units:
            for tensor in unit.tensors:
                if tensor.name not in self._homes:
                    raise CheckpointError(
                        f"{tensor.name}: is in none of the shares; remove them and pack them again"
                    )
        return units

    def identify(self, identity: dict[str, Any]) -> dict[str, Any]:
        now = json.loads(json.dumps(identity))
        for path, note in self._notes.items():
            _check_same(path, note, now)
        return identity

    def files(self) -> Mapping[str, bytes]:
        return {}

    def encoded(self, name: str) -> Encoded | None:
        return self._homes[name].encoded(name)


def _found(home: Path) -> list[Path]:
    """Return the shares that are complete."""
    return sorted(path.parent for path in home.glob(f"?????-of-?????/{NAME}"))


def _note(share: Path) -> dict[str, Any]:
    found = read_object(share / NAME)
    if not isinstance(found.get("identity"), dict) or not isinstance(found.get("call"), dict):
        raise CheckpointError(f"{share / NAME}: is damaged; remove the share and pack it again")
    return found


def _check_same(path: Path, note: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    before = note["identity"]
    for key in sorted(before.keys() | identity.keys()):
        if before.get(key) != identity.get(key):
            raise CheckpointError(
                f"{path}: is the share of another run: {key} was "
                f"{json.dumps(before.get(key))[:80]} and is {json.dumps(identity.get(key))[:80]}; "
                "pack all shares from the same model with the same options, or remove this one"
            )
