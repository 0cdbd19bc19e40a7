"""The one reader of JSON: configs, indexes, headers, journals, caches, calibration lines.

A file that came from elsewhere must not be able to do more than be refused. So nesting and the
length of numbers are bounded, nothing may be in it that cannot be written again (lone surrogates)
or that file systems and C libraries read differently (NUL in a name), and what parsers disagree
about is an error: a key that occurs twice, NaN and Infinity, a number that overflows.
"""

import json
import math
import re
import stat
from pathlib import Path
from typing import Any

from endor.errors import CheckpointError, ConfigError, EndorError, FormatError
from endor.foreign import LFS_PREFIX, describe_file

MAX_DEPTH = 100
"""Nested lists and objects."""

MAX_DIGITS = 100
"""Of an integer; tokenizer configs hold 10^30, and more than 308 digits overflow a float."""

MAX_FILE_BYTES = 1 << 30

_NO_BRACKETS = re.compile(r'"(?:[^"\\]+|\\.)*+"?|[^\[\]{}"]+', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(
    text: bytes | str,
    where: str,
    *,
    error: type[EndorError] = FormatError,
    lenient: bool = False,
    advice: str = "copy the file again",
) -> Any:
    """Return the JSON value in `text`.

    Args:
        text: UTF-8 if bytes.
        where: What `text` is, for the message.
        error: What to raise.
        lenient: Take what transformers takes from a config.json and writes into one: NaN and
            Infinity, and the last of two equal keys.
        advice: What the message ends with.

    Raises:
        EndorError: `text` is not such JSON; as `error`.
    """
    try:
        plain = text if isinstance(text, str) else text.decode()
        _check_depth(plain)
        value = json.loads(
            plain,
            object_pairs_hook=_last_wins if lenient else _unique,
            parse_int=_integer,
            parse_float=float if lenient else _finite,
            parse_constant=None if lenient else _refuse_constant,
        )
        if _SURROGATE_ESCAPE.search(plain):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} must be JSON: {_reason(problem)}; {advice}") from None
    return value


def parse_object(
    text: bytes | str,
    where: str,
    *,
    error: type[EndorError] = FormatError,
    lenient: bool = False,
    advice: str = "copy the file again",
) -> dict[str, Any]:
    """Return the JSON object in `text`; arguments and errors as for `parse`."""
    value = parse(text, where, error=error, lenient=lenient, advice=advice)
    if not isinstance(value, dict):
        raise error(f"{where} must be a JSON object, got {type(value).__name__}; {advice}")
    return value


def read_object(
    path: Path,
    *,
    error: type[EndorError] = CheckpointError,
    lenient: bool = False,
    advice: str = "restore the file",
) -> dict[str, Any]:
    """Return the JSON object in the file `path`; arguments and errors as for `parse`.

    Raises:
        EndorError: There is no such file, or it is none; as `error`.
        OSError: It cannot be read.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path}: must be a file; {advice}")
        if found.st_size > MAX_FILE_BYTES:
            raise error(
                f"{path}: must be JSON of at most {MAX_FILE_BYTES} bytes, got {found.st_size}; "
                f"{advice}"
            )
        text = path.read_bytes()
        if text.startswith(LFS_PREFIX):
            raise error(f"{path}: {describe_file(path)}")
    except FileNotFoundError:
        raise error(f"{path}: no such file; is the checkpoint complete?") from None
    return parse_object(text, f"{path}:", error=error, lenient=lenient, advice=advice)


def read_utf8(path: Path, what: str) -> str:
    """Return the text of a file, without a byte order mark.

    Args:
        path: The file.
        what: What it should hold, for the message.

    Raises:
        ConfigError: It is not UTF-8.
        OSError: It cannot be read.
    """
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        encoding = "UTF-16" if utf16 else "ISO-8859-1"
        raise ConfigError(
            f"{path}: {what} must be UTF-8; byte {byte:#04x} at offset {error.start} is not; "
            f"convert it, perhaps with: iconv -f {encoding} -t UTF-8"
        ) from None


def _check_depth(text: str) -> None:
    """Raise `ValueError` where brackets are nested too deeply for the parser's recursion.

    Each round takes the innermost pairs away. What is left after `MAX_DEPTH` rounds, or cannot be
    paired, is at most as deep as it is long.
    """
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    brackets = _NO_BRACKETS.sub("", text)
    for _ in range(MAX_DEPTH):
        fewer = brackets.replace("[]", "").replace("{}", "")
        if len(fewer) == len(brackets):
            break
        brackets = fewer
    if len(brackets) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = _last_wins(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {repeated!r} occurs twice")
    return out


def _last_wins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    for key in out:
        if "\0" in key:
            raise ValueError(f"key {key!r} holds a NUL")
    return out


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits, more than {MAX_DIGITS}")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _reason(problem: Exception) -> str:
    """Return the parser's complaint, without the text that it complains about."""
    if isinstance(problem, UnicodeDecodeError):
        return f"byte {problem.object[problem.start]:#04x} at {problem.start} is not UTF-8"
    if isinstance(problem, UnicodeEncodeError):
        return "a string holds half of a surrogate pair"
    if isinstance(problem, RecursionError):
        return f"nested deeper than {MAX_DEPTH}"
    return str(problem)[:200]
