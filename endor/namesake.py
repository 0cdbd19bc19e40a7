"""The other distribution called `endor`: the same module and command, of other people."""

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from endor.errors import EndorWarning

DISTRIBUTION = "endor-sparse"
"""What this package is called on the registry; the module and the command are `endor`."""

OWN_COMMAND = "endor.cli.main:main"
"""An installed `endor` with this command is this package under the name it once had."""


def find(folders: Iterable[str] | None = None) -> Path | None:
    """Return the record of an installed distribution `endor` that is not this one, or None.

    Looks at names of directories only, so that it costs next to nothing at every import.

    Args:
        folders: Where packages are looked for; `sys.path` when omitted.
    """
    for folder in sys.path if folders is None else folders:
        try:
            found = sorted(Path(folder).glob("endor-*.dist-info")) if folder else []
        except OSError:
            continue
        for record in found:
            if not _is_own(record):
                return record
    return None


def _is_own(record: Path) -> bool:
    try:
        return OWN_COMMAND in (record / "entry_points.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def message(record: Path) -> str:
    """Return the one sentence that says what was found and what to do."""
    return (
        f"another package called endor is installed in {record.parent} ({record.stem}) and takes "
        f"the same module and command as {DISTRIBUTION}: run `pip uninstall -y endor "
        f"{DISTRIBUTION}`, then `pip install {DISTRIBUTION}`"
    )


def warn() -> None:
    """Warn once where the other package is installed beside this one."""
    record = find()
    if record is not None:
        warnings.warn(message(record), EndorWarning, stacklevel=3)
