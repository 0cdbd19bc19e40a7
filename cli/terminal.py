"""What goes to the terminal: names are escaped here, and a reader that went away is no error."""

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from typing import Any, TextIO

import click

from endor.errors import EndorWarning, SlowWarning


class ReaderGone(Exception):
    """Nobody reads our output any more: there is nothing left to do, and nothing went wrong."""


class Interrupted(click.ClickException):
    """Ctrl-C in a command that knows what it leaves."""

    exit_code = 128 + signal.SIGINT


def printable(text: str, *, keep: str = "") -> str:
    """Return `text` with everything that a terminal could obey, or not show, as an escape.

    That is control characters (ESC begins sequences that move the cursor, set the title or write
    the clipboard), characters that turn the direction of text, invisible ones, and halves of
    surrogate pairs. Names in checkpoints are anybody's.

    Args:
        text: A name, a message, or lines of them.
        keep: Characters to leave as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        one
        if one.isprintable() or one in keep
        else one.encode("unicode_escape", "backslashreplace").decode()
        for one in text
    )


def show(text: str = "", *, err: bool = False) -> None:
    """Print lines for a reader, on the standard output or error; goes on when nobody reads."""
    echo(printable(text, keep="\n"), err=err)


def echo(text: str, *, err: bool = False) -> None:
    """Print a line as it is: JSON, which escapes by itself."""
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        mute(sys.stderr if err else sys.stdout)


SCHEMA_VERSION = 1
"""Of what `--json` prints (docs/json.md); raised when a key goes or changes its meaning."""


def emit(value: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Print one JSON object, with the version of its schema, on the standard output."""
    echo(json.dumps({"schema_version": SCHEMA_VERSION, **value}, indent=indent))


class _Saying(logging.Handler):
    """Prints what the library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


_quiet = False


def is_quiet() -> bool:
    """Return whether progress is to be left out."""
    return _quiet


def tell_more_or_less(*, verbose: int, quiet: bool) -> None:
    """Show what the library logs: its decisions (1), its details too (2); or not even progress."""
    global _quiet
    _quiet = quiet
    logger = logging.getLogger("endor")
    logger.handlers = [one for one in logger.handlers if not isinstance(one, _Saying)]
    if verbose:
        logger.addHandler(_Saying())
        logger.setLevel(logging.DEBUG if verbose > 1 else logging.INFO)


def say(message: str) -> None:
    """Print one line on the standard error, after our name."""
    show(f"endor: {printable(' '.join(message.splitlines()))}", err=True)


def stream(text: str) -> None:
    """Print generated text as it comes; a terminal gets no control characters but line ends.

    Raises:
        ReaderGone: Nobody reads.
    """
    if sys.stdout.isatty():
        text = "".join(
            one if one in "\n\t" or ord(one) >= 0xA0 or one.isprintable() else printable(one)
            for one in text
        )
    try:
        click.echo(text, nl=False)
    except BrokenPipeError:
        mute(sys.stdout)
        raise ReaderGone from None


def mute(stream: TextIO) -> None:
    """Send what is still to be written to a stream nowhere."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, stream.fileno())
    os.close(sink)


def prepare() -> None:
    """Make the three standard streams usable whatever they were started as.

    A closed one is opened on the null device: else the next file that is opened would take its
    number, and messages of C libraries would be written into it. What an encoding lacks is
    escaped. Warnings of ours become one line each.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for one in (sys.stdout, sys.stderr):
        if hasattr(one, "reconfigure"):
            one.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # also the bars of transformers
    plain = warnings.showwarning

    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, (EndorWarning, SlowWarning)):
            say(f"warning: {message}")
        else:
            plain(message, category, filename, lineno, file, line)

    warnings.showwarning = show_warning


def finish() -> None:
    """Write out what is buffered.

    Raises:
        OSError: The disk behind the standard output is full.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        mute(sys.stdout)
