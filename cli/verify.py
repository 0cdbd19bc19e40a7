"""`endor verify`: is a packed checkpoint whole, and is it that model?"""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from endor.cli.common import MODEL, human, json_option
from endor.cli.hub import at_hand, revision_option
from endor.cli.progress import progress_bar
from endor.cli.terminal import emit, say, show

SHOWN = 20
"""Problems that are printed one by one."""


@click.command("verify")
@click.argument("packed", type=MODEL)
@click.option(
    "--against",
    type=MODEL,
    metavar="MODEL",
    help="Also compare every tensor with this checkpoint (dense or packed), bit for bit.",
)
@click.option("--threads", type=click.IntRange(1, 256), help="Workers; every CPU when omitted.")
@revision_option
@json_option
def verify_command(
    packed: Path,
    against: Path | None,
    threads: int | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Check PACKED: checksums, structure, index; with --against, equality of every bit.

    Tensors that --bits quantised equal those of the model that PACKED was made from only nearly:
    how nearly is said. They equal those of `endor unpack PACKED` in every bit.

    Prints a line for each problem and exits 1 if there is any.
    """
    from endor.checkpoint import verify_checkpoint

    packed = at_hand(packed, revision)
    against = at_hand(against) if against else None
    with progress_bar("verify") as progress:
        report = verify_checkpoint(packed, against=against, threads=threads, progress=progress)
    if as_json:
        emit(asdict(report) | {"path": str(report.path), "ok": report.ok})
    else:
        for problem in report.problems[:SHOWN]:
            say(problem)
        if len(report.problems) > SHOWN:
            say(f"and {len(report.problems) - SHOWN} more (--json has all)")
        found = f"{report.tensors} tensors in {report.files} file(s), {human(report.nbytes)}"
        if report.ok and report.lossy:
            if report.output_error is not None:
                how = f"relative output error {report.output_error:.4f}"
            else:
                how = f"relative weight error {report.weight_error:.4f}"
            show(
                f"{packed}: whole, and lossy against {against}: {how}, the mean of {report.lossy} "
                f"quantised tensors; the others equal in every bit: {found}"
            )
        elif report.ok and against is not None:
            show(f"{packed}: whole, and equal to {against} in every bit: {found}")
        elif report.ok:
            show(f"{packed}: whole: {found}")
        else:
            show(f"{packed}: {len(report.problems)} problem(s): {found}")
    if not report.ok:
        sys.exit(1)
