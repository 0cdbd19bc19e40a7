"""Conversions that are killed, fail and run out of memory, and what must hold afterwards."""

import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from child import MODES, Ended, calls, run
from models import tree, weights, write, write_language_model

MIB = 1 << 20


@dataclass
class Result:
    """What a campaign found: cases tried, how they ended, and what broke a promise."""

    name: str
    cases: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, outcome: str, problem: str | None = None, what: str = "") -> None:
        self.cases += 1
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if problem:
            self.failures.append(f"{what}: {problem}")


@dataclass(frozen=True)
class Conversion:
    """Something that writes `OUT` from a source.

    Attributes:
        name: For the table.
        source: What is read; must be the same afterwards.
        act: Writes; called with OUT and options.
        expected: What OUT holds when all went well.
        old: What OUT holds before, if anything.
    """

    name: str
    source: Path
    act: Callable[..., object]
    expected: dict[str, str]
    old: Path | None = None


def pack(source: Path, out: Path, **options: Any) -> None:
    from endor.packing import pack_checkpoint

    _quiet()
    pack_checkpoint(source, out, max_shard_bytes=MIB, threads=2, **options)


def unpack(source: Path, out: Path, **options: Any) -> None:
    from endor.checkpoint import unpack_checkpoint

    _quiet()
    unpack_checkpoint(source, out, threads=2, **options)


def prune(source: Path, out: Path, **options: Any) -> None:
    from endor.packing import prune_checkpoint

    _quiet()
    prune_checkpoint(source, out, threads=2, **options)


def calibrated(source: Path, scratch: Path | None, out: Path, **options: Any) -> None:
    """Pack with Wanda; finished layers wait in `scratch`, or in TMPDIR without one."""
    from endor.checkpoint import open_source
    from endor.checkpoint.select import select
    from endor.packing import pack_checkpoint
    from endor.pruning.contract import PruneOptions
    from endor.pruning.source import PrunedSource

    _quiet()
    chosen = PruneOptions(
        method="wanda", samples=8, seq_len=64, device="cpu", scratch=scratch, calibration=()
    )
    with closing(open_source(source)) as dense:
        selected = select(dense.tensors.values())
        with closing(PrunedSource(dense, chosen, selected)) as pruned:
            pack_checkpoint(pruned, out, max_shard_bytes=MIB, threads=2, **options)


def _quiet() -> None:
    warnings.simplefilter("ignore")


def conversions(work: Path, *, language_model: bool) -> list[Conversion]:
    """Return the conversions, each with what it gives when nothing disturbs it."""
    model, other, packed = work / "model", work / "other", work / "packed"

    def make() -> None:
        write(model, weights(8, 512, 512, 1), shards=3)
        write(other, weights(8, 512, 512, 2), shards=3)
        pack(model, packed)
        pack(other, work / "old-packed")
        unpack(work / "old-packed", work / "old-dense")
        pack(model, work / "expected-pack")
        unpack(packed, work / "expected-unpack")
        prune(model, work / "expected-prune")
        if language_model:
            write_language_model(work / "llm")
            calibrated(work / "llm", work / "scratch", work / "expected-calibrated")
            shutil.rmtree(work / "scratch")

    make()  # here and not in a child: every child finds the imports done
    packing, unpacking = tree(work / "expected-pack"), tree(work / "expected-unpack")
    found = [
        Conversion("pack", model, partial(pack, model), packing),
        Conversion("pack over old", model, partial(pack, model), packing, work / "old-packed"),
        Conversion("unpack", packed, partial(unpack, packed), unpacking),
        Conversion(
            "unpack over old", packed, partial(unpack, packed), unpacking, work / "old-dense"
        ),
        Conversion("prune", model, partial(prune, model), tree(work / "expected-prune")),
    ]
    if language_model:
        act = partial(calibrated, work / "llm", None)
        found.append(
            Conversion("pack, wanda", work / "llm", act, tree(work / "expected-calibrated"))
        )
        act = partial(calibrated, work / "llm", work / "scratch")
        found.append(
            Conversion(
                "pack, wanda, --scratch", work / "llm", act, tree(work / "expected-calibrated")
            )
        )
    return found


class Yard:
    """An empty directory in which one conversion runs, is disturbed, and is run again."""

    def __init__(self, work: Path, conversion: Conversion) -> None:
        self.conversion = conversion
        self.folder = Path(tempfile.mkdtemp(prefix="yard-", dir=work))
        self.temporary = work / "tmp"
        self.out = self.folder / "out"
        self.before = tree(conversion.source)
        self.old: dict[str, str] | None = None
        if conversion.old is not None:
            shutil.copytree(conversion.old, self.out)
            self.old = tree(self.out)

    def act(self, **options: Any) -> None:
        if self.old is not None:
            options["overwrite"] = True
        self.conversion.act(self.out, **options)

    def close(self) -> None:
        shutil.rmtree(self.folder)

    def problem(self, ended: Ended, *, killed: bool) -> str | None:
        """Return what is wrong with the state after a disturbed run, if anything."""
        if not ended.well and not killed:
            return f"ended with {ended.status}, signal {ended.signal}: {ended.text[-2000:]}"
        if tree(self.conversion.source) != self.before:
            return "the source was changed"
        state = self.state()
        if state == "other":
            return f"OUT is neither old nor new: {sorted(tree(self.out))}"
        if ended.status == 0 and state != "new":
            return f"success, but OUT is {state}"
        if ended.refused and state == "new":
            return f"an error, but OUT is new: {ended.text[-500:]}"
        return None

    def state(self) -> str:
        """Return what OUT is: new, old (nothing, if there was nothing), moved, or other."""
        if not self.out.exists():
            replaced = self.folder / "out.partial" / "replaced"
            if self.old is not None:
                return "moved" if tree(replaced) == self.old else "other"
            return "old"
        found = tree(self.out)
        if found == self.conversion.expected:
            return "new"
        return "old" if found == self.old else "other"

    def again(self) -> str | None:
        """Run to the end, undisturbed; return what is wrong then."""
        if self.state() == "new" and self.old is None:
            ended = run(self.look)
        else:
            ended = run(lambda: self.act(resume=True))
        if ended.status:
            return f"the next run failed: {ended.text[-2000:]}"
        if self.state() != "new":
            return f"after the next run OUT is {self.state()}"
        left = sorted(path.name for path in self.folder.iterdir() if path != self.out)
        left += [path.name for path in self.temporary.glob("endor-*")]
        return f"left behind: {left}" if left else None

    def look(self) -> None:
        """Start again on an OUT that is complete: it is refused, and tidied up."""
        from endor.errors import OutputExistsError

        try:
            self.act(resume=True)
        except OutputExistsError:
            return
        raise AssertionError("a complete OUT was not refused")


def disturbed(work: Path, conversion: Conversion, **how: Any) -> tuple[str, str | None]:
    """Run a conversion while something goes wrong, then again; return outcome and problem."""
    yard = Yard(work, conversion)
    try:
        killed = "kill" in str(how.get("mode")) or how.get("kill_after_s") is not None
        below: dict[str, Any] = {"below": work} if "mode" in how else {}
        ended = run(yard.act, **below, **how)
        outcome = "killed" if ended.signal else "refused" if ended.refused else "succeeded"
        return outcome, yard.problem(ended, killed=killed) or yard.again()
    finally:
        yard.close()


def fault_campaign(
    work: Path,
    found: list[Conversion],
    modes: tuple[str, ...],
    name: str,
    seconds: float,
    seed: int,
) -> Result:
    """Let each system call of each conversion fail in turn: all of them, or as many as fit."""
    result = Result(name)
    began = time.monotonic()
    cases = []
    for conversion in found:
        yard = Yard(work, conversion)
        count = calls(yard.act, work)
        yard.close()
        cases += [(conversion, call, mode) for call in range(1, count + 1) for mode in modes]
    result.outcomes["of"] = len(cases)
    random.Random(seed).shuffle(cases)
    for conversion, call, mode in cases:
        if time.monotonic() - began > seconds:
            break
        outcome, problem = disturbed(work, conversion, call=call, mode=mode)
        result.add(outcome, problem, f"{conversion.name}, call {call}, {mode}")
    result.seconds = time.monotonic() - began
    return result


def kill_campaign(work: Path, found: list[Conversion], seconds: float, seed: int) -> Result:
    """Kill each conversion at random moments."""
    result = Result("kill -9 at random moments")
    began = time.monotonic()
    rng = random.Random(seed)
    lengths = {}
    for conversion in found:
        yard = Yard(work, conversion)
        start = time.monotonic()
        ended = run(yard.act)
        lengths[conversion.name] = time.monotonic() - start
        assert ended.status == 0, ended.text
        yard.close()
    while time.monotonic() - began < seconds:
        conversion = found[result.cases % len(found)]
        moment = rng.uniform(0, 1.05 * lengths[conversion.name])
        outcome, problem = disturbed(work, conversion, kill_after_s=moment)
        result.add(outcome, problem, f"{conversion.name}, after {moment:.4f} s")
    result.seconds = time.monotonic() - began
    return result


def memory_campaign(work: Path, seconds: float, seed: int) -> Result:
    """Run commands with less and less address space."""
    result = Result("memory limits")
    began = time.monotonic()
    commands = [
        ["pack", str(work / "model"), "OUT"],
        ["pack", str(work / "model"), "OUT", "--prune", "magnitude"],
        ["unpack", str(work / "packed"), "OUT"],
        ["verify", str(work / "packed")],
        ["inspect", str(work / "packed")],
    ]
    cases = [(c, limit) for limit in range(0, 96, 3) for c in commands]
    random.Random(seed).shuffle(cases)
    for command, limit in cases:
        if time.monotonic() - began > seconds:
            break
        folder = Path(tempfile.mkdtemp(prefix="yard-", dir=work))
        words = [str(folder / "out") if word == "OUT" else word for word in command]
        ended = run(partial(_command, words), address_bytes=limit * MIB)
        problem = None
        if ended.signal or ended.status not in (0, 1) or "Traceback" in ended.text:
            problem = f"status {ended.status}, signal {ended.signal}: {ended.text[-1500:]}"
        left = [path.name for path in folder.iterdir()]
        wanted = [["out"]] if "OUT" in command and not ended.status else [[], ["out.partial"]]
        if not problem and left not in wanted:
            problem = f"left behind: {left}"
        outcome = "one line" if ended.status else "succeeded"
        result.add(outcome, problem, f"{' '.join(command)} with {limit} MiB")
        shutil.rmtree(folder)
    result.seconds = time.monotonic() - began
    return result


def _command(words: list[str]) -> None:
    import os

    from endor.cli.main import main

    sys.argv = ["endor", *words]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        main()
    except SystemExit as done:
        sys.stderr.flush()
        os._exit(int(done.code or 0))


FAULTS = tuple(mode for mode in MODES[1:] if "kill" not in mode)
KILLS = tuple(mode for mode in MODES if "kill" in mode)
