"""`endor bench`: measure this machine and print tables."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import click

from endor.cli.bench_generate import generate_command
from endor.cli.bench_hw import hw_command
from endor.cli.tables import table
from endor.cli.terminal import echo, show

if TYPE_CHECKING:
    from endor.bench.cpu.cases import BenchRun, Case

Command = Callable[..., None]


@click.group("bench")
def bench_command() -> None:
    """Measure decoding, packing, products, reading and generation.

    Each prints the rate it reached beside what this machine's memory or disk can do, measured in
    the same run, and beside other people's code where that is installed.
    """


bench_command.add_command(generate_command)
bench_command.add_command(hw_command)


def _output_options(command: Command) -> Command:
    for option in (
        click.option("--quick", is_flag=True, help="Few repeats, for a first look."),
        click.option("--peers/--no-peers", default=True, help="Measure other libraries too."),
        click.option(
            "--plot",
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE.png",
            help="Draw the rates (needs matplotlib).",
        ),
        click.option(
            "--json",
            "json_path",
            type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
            metavar="FILE",
            help="Append one JSON line per subject to FILE; - for standard output, no table.",
        ),
    ):
        command = option(command)
    return command


def _weight_options(command: Command) -> Command:
    for option in (
        click.option("--seed", default=0, show_default=True, help="Of the random weight."),
        click.option("--repeats", default=21, show_default=True, help="Timed runs per subject."),
        click.option(
            "--threads", type=click.IntRange(1, 256), help="CPU threads; all cores when omitted."
        ),
        click.option(
            "--codec",
            type=click.Choice(["auto", "raw", "exp"]),
            default="auto",
            show_default=True,
            help="Codec under test; auto measures both.",
        ),
        click.option("--dtype", default="BF16", show_default=True, help="Element type."),
        click.option("--density", default=0.5, show_default=True, help="Stored share, 0 to 1."),
        click.option("--cols", default=11008, show_default=True),
        click.option("--rows", default=4096, show_default=True),
    ):
        command = option(command)
    return _output_options(command)


@bench_command.command("decode")
@_weight_options
def decode_command(**options: Any) -> None:
    """Packed to dense on the CPU, against a non-temporal copy."""
    from endor.bench.cpu.decode import decode

    _run(decode, options)


@bench_command.command("pack")
@_weight_options
def pack_command(**options: Any) -> None:
    """Dense to packed on the CPU, against a non-temporal copy."""
    from endor.bench.cpu.pack import pack

    _run(pack, options)


@bench_command.command("matvec")
@click.option("--batch", default=1, show_default=True, help="Vectors per product.")
@_weight_options
def matvec_command(**options: Any) -> None:
    """Product with a packed weight on the CPU, against read bandwidth."""
    from endor.bench.cpu.matvec import matvec

    _run(matvec, options)


@bench_command.command("io")
@click.option(
    "--dir",
    "directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=gettempdir,
    help="Directory for the temporary file: the disk under test.  [default: the system's]",
)
@click.option("--size-mib", default=1024, show_default=True, help="Size of the file.")
@click.option("--record-mib", default=32, show_default=True, help="Size of a record.")
@click.option(
    "--threads", type=click.IntRange(1, 256), default=4, show_default=True, help="Reader threads."
)
@click.option("--repeats", default=7, show_default=True, help="Timed passes per subject.")
@_output_options
def io_command(
    directory: Path,
    size_mib: int,
    record_mib: int,
    threads: int,
    repeats: int,
    json_path: Path | None,
    plot: Path | None,
    peers: bool,
    quick: bool,
) -> None:
    """Reading a packed file, cold and warm, against raw O_DIRECT."""
    from endor.bench.cpu.io import IoCase, io

    case = IoCase(
        directory,
        file_bytes=size_mib << 20,
        record_bytes=record_mib << 20,
        threads=threads,
        repeats=repeats,
        peers=peers,
    )
    if quick:
        case = replace(
            case,
            file_bytes=min(case.file_bytes, 256 << 20),
            record_bytes=min(case.record_bytes, 32 << 20),
            repeats=min(repeats, 3),
        )
    _show(io(case), json_path, plot)


def _run(measure: "Callable[[Case], BenchRun]", options: dict[str, Any]) -> None:
    from endor.bench.cpu.cases import Case

    json_path, plot, quick = (options.pop(name) for name in ("json_path", "plot", "quick"))
    case = Case(**options)
    _show(measure(case.quick() if quick else case), json_path, plot)


def _show(run: "BenchRun", json_path: Path | None, plot: Path | None) -> None:
    from endor.bench.plot import rates
    from endor.bench.records import write_json_lines

    if json_path is not None and str(json_path) == "-":
        for record in run.records:
            echo(json.dumps(record.to_dict()))
    else:
        show(report(run))
        if json_path is not None:
            write_json_lines(run.records, json_path)
    if plot is not None:
        rates(run.records, plot)


def report(run: "BenchRun") -> str:
    """Return the table of a benchmark, with its conditions above and its remarks below."""
    first = run.records[0]
    place = first.environment
    shape = " x ".join(str(size) for size in first.shape)
    what = f"{shape} {first.dtype}, density {first.density:g}"
    if first.bench == "io":
        what = f"{first.shape[0] / 1e9:.2f} GB file"
    plural = "s" if first.threads > 1 else ""
    lines = [
        f"{first.bench}: {what}, {first.threads} thread{plural} on {place.device}",
        f"endor {place.versions['endor']} {place.git_rev}".rstrip()
        + f", kernel {place.kernel['kernel']}",
        "",
    ]
    ours = next((one for one in run.records if one.subject.startswith("endor")), None)
    header = ["", "ms", "p20..p80", "GB/s"]
    header += [f"of {first.ceiling.rpartition(' ')[2]}"] if first.ceiling else []
    header += ["dense GB/s", "bits/w"] if first.bench != "io" else []
    header += [f"time / {ours.subject}"] if ours and first.bench != "io" else []
    rows = []
    for one in run.records:
        if not one.believable:
            rows.append([one.subject, "busy", *[""] * (len(header) - 2)])
            continue
        row = [
            one.subject,
            f"{one.p50 * 1e3:.2f}",
            f"{one.p20 * 1e3:.2f}..{one.p80 * 1e3:.2f}",
            f"{one.gbps:.2f}",
        ]
        row += [f"{one.ceiling_ratio:.1%}"] if first.ceiling else []
        if first.bench != "io":
            numel = first.shape[0] * first.shape[1]
            row.append(f"{one.dense_gbps:.2f}" if one.dense_bytes else "")
            row.append(f"{8 * one.packed_bytes / numel:.2f}" if one.packed_bytes else "")
            row += [f"{one.p50 / ours.p50:.2f}" if one.dense_bytes else ""] if ours else []
        rows.append(row)
    lines.append(table(header, rows))
    notes = [f"{one.subject}: {one.note}" for one in run.records if one.note]
    notes += [
        f"{one.subject}: {one.ceiling_ratio:.0%} of {one.ceiling} is no result: the machine "
        "was too busy while that was timed; run it again when nothing else runs"
        for one in run.records
        if not one.believable
    ]
    notes += [f"{name}: not measured, {reason}" for name, reason in run.missing.items()]
    return "\n".join(lines + ([""] if notes else []) + notes)
