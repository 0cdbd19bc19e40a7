"""`endor pack --shard` and `--finish`: one packing by several processes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from endor.cli.common import Command, human, refuse_existing, resumable
from endor.cli.progress import progress_bar
from endor.cli.terminal import emit, show

if TYPE_CHECKING:
    from endor.checkpoint.report import PackReport

_WITH_FINISH = {"model", "finish", "resume", "overwrite", "threads", "as_json"}


def share_options(command: Command) -> Command:
    """Add `--shard` and `--finish`."""
    for option in (
        click.option(
            "--finish",
            is_flag=True,
            help="`endor pack OUT --finish`: make OUT of the shares in OUT.shares, all of which "
            "must be there, then remove these.",
        ),
        click.option(
            "--shard",
            metavar="I/N",
            help="Pack one share of the records into OUT.shares: N processes that see one "
            "directory, each with another I from 1 to N and the same options. Without calibration "
            "only; one that is there is kept.",
        ),
    ):
        command = option(command)
    return command


def finish_shares(context: click.Context, out: Path, second: Path | None) -> "PackReport":
    """Make OUT of its shares.

    Raises:
        click.UsageError: An option was given that the shares have settled.
    """
    if second is not None:
        raise click.UsageError("--finish takes OUT alone: `endor pack OUT --finish`")
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in _WITH_FINISH and source is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--finish takes no {parameter.opts[-1]}: the shares know how they were packed"
            )
    given = context.params
    refuse_existing(out, resume=given["resume"], overwrite=given["overwrite"])
    from endor.packing.shares import finish_checkpoint

    with resumable(out), progress_bar("finish") as progress:
        return finish_checkpoint(
            out,
            resume=given["resume"],
            overwrite=given["overwrite"],
            threads=given["threads"],
            progress=progress,
        )


def pack_one_share(
    model: Path, out: Path, shard: str, *, resume: bool, as_json: bool, **call: Any
) -> None:
    """Pack one share and say so; it goes on where it was killed, with --resume or without."""
    from endor.packing.shares import Share, pack_share

    share = Share.parse(shard)
    with progress_bar(f"share {share}") as progress:
        report = pack_share(model, out, share, progress=progress, **call)
    if as_json:
        emit(report.to_dict())
        return
    done = f"{human(report.sizes.dense_bytes)} -> {human(report.sizes.packed_bytes)}"
    before = "" if report.converted_bytes else ", there already"
    show(f"{report.path}: {done}, {report.seconds:.1f} s{before}")
    show(f"when all {share.count} are there: endor pack {out} --finish", err=True)
