"""`endor unpack`: an ordinary checkpoint again."""

from pathlib import Path

import click

from endor.cli.common import (
    MODEL,
    companion_lines,
    human,
    json_option,
    output_options,
    refuse_existing,
    resumable,
)
from endor.cli.hub import at_hand, revision_option
from endor.cli.progress import progress_bar
from endor.cli.terminal import emit, show


@click.command("unpack")
@click.argument("packed", type=MODEL)
@click.argument("out", type=MODEL)
@output_options
@revision_option
@json_option
def unpack_command(
    packed: Path,
    out: Path,
    resume: bool,
    overwrite: bool,
    threads: int | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Write PACKED to OUT as an ordinary Hugging Face checkpoint, bit for bit.

    Every checksum is checked on the way.
    """
    refuse_existing(out, resume=resume, overwrite=overwrite)
    from endor.checkpoint import unpack_checkpoint
    from endor.checkpoint.composite import is_composite
    from endor.checkpoint.output import check_output

    packed = at_hand(packed, revision)
    if not is_composite(packed):  # which looks for itself
        check_output(out, packed, resume=resume, overwrite=overwrite)

    with resumable(out), progress_bar("unpack") as progress:
        report = unpack_checkpoint(
            packed,
            out,
            resume=resume,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    if as_json:
        emit(report.to_dict())
        return
    show(
        f"{out}: {report.tensors} tensors, {human(report.dense_bytes)} in {report.files} file(s), "
        f"{report.seconds:.1f} s, {report.gbps:.2f} GB/s"
    )
    companion_lines(report.left_out, report.code)
