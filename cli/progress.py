"""How far something is: bars on a terminal, lines elsewhere, nothing where nobody wants it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from endor.cli.common import human
from endor.cli.terminal import is_quiet, printable, say

LINE_EVERY_S = 30
"""Between two lines of progress where no bar is shown."""


@contextmanager
def progress_bar(
    what: str, *, unit: str = "B", after_s: float = 10
) -> Iterator[Callable[[int, int], None]]:
    """Show how far something is on stderr; yields the function that takes done and total.

    A bar on a terminal; elsewhere a line every half minute, and none for what is quick.

    Args:
        what: What goes on.
        unit: Of done and total; bytes are written in words.
        after_s: When the first line comes.
    """
    if is_quiet():
        yield _nothing
        return
    if not sys.stderr.isatty():
        yield _lines(what, unit, after_s)
        return
    from tqdm import tqdm

    bar: tqdm[Any] | None = None

    def move(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:  # what comes before the first call is none of its time
            bar = tqdm(
                desc=printable(what),
                unit=unit,
                unit_scale=unit == "B",
                dynamic_ncols=True,
                delay=0.2,
            )
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield move
    finally:
        if bar is not None:
            bar.close()


def _nothing(done: int, total: int, what: str = "") -> None:
    """Progress that nobody wants to see."""


def _lines(what: str, unit: str, after_s: float) -> Callable[[int, int], None]:
    due: float | None = None

    def move(done: int, total: int) -> None:
        nonlocal due
        now = time.monotonic()
        due = now + after_s if due is None else due
        if now >= due and done < total:
            due = now + LINE_EVERY_S
            words = (human(done), human(total)) if unit == "B" else (done, f"{total} {unit}s")
            say(f"{what}: {words[0]} of {words[1]}")

    return move


@contextmanager
def calibration_progress() -> Iterator[Callable[[int, int, str], None]]:
    """Show layers done on stderr, once a calibrated run reports some: a second bar, or lines."""
    if is_quiet():
        yield _nothing
        return
    if not sys.stderr.isatty():
        last = -1

        def tell(done: int, total: int, what: str) -> None:
            nonlocal last
            if done != last:
                say(f"layers: {done} of {total} done ({what})")
            last = done

        yield tell
        return
    from tqdm import tqdm

    bar: tqdm[Any] | None = None

    def move(done: int, total: int, what: str) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(desc="layers", total=total, unit="layer", dynamic_ncols=True, position=1)
        bar.set_postfix_str(printable(what))
        bar.update(done - bar.n)

    try:
        yield move
    finally:
        if bar is not None:
            bar.close()
