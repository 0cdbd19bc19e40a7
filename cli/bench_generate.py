"""`endor bench generate`: Endor against other ways to run a model that does not fit."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from endor.cli.common import trust_option
from endor.cli.tables import table
from endor.cli.terminal import echo, show

if TYPE_CHECKING:
    from endor.bench.generation.case import GenerateRecord


@click.command("generate")
@click.argument("packed", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--against",
    default="",
    metavar="LIST",
    help="Peers, comma-separated: accelerate-disk, accelerate-cpu, airllm, dense.",
)
@click.option(
    "--dense",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The same weights as an ordinary checkpoint (`endor unpack`), for the peers.",
)
@click.option("--ram", required=True, metavar="SIZE", help="Budget of every system, as 2GiB.")
@click.option("--cold/--warm", default=True, help="Page cache before every step.  [default: cold]")
@click.option("--direct/--no-direct", default=True, help="Also run Endor's direct product.")
@click.option("--prompt-tokens", default=16, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", default=6, show_default=True, help="Tokens to generate.")
@click.option("--batch", default=1, show_default=True, help="Sequences at once.")
@click.option("--rounds", default=3, show_default=True, help="Processes per system.")
@click.option(
    "--threads",
    type=click.IntRange(0, 256),
    default=0,
    help="CPU threads; torch's default when omitted.",
)
@click.option(
    "--work",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where peers may write; AirLLM needs the dense size there.",
)
@click.option("--airllm-python", metavar="PATH", help="An interpreter that has AirLLM.")
@trust_option
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write Endor's timeline.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw tokens per second (needs matplotlib).",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Append one JSON line per system to FILE; - for standard output, no table.",
)
def generate_command(
    packed: Path,
    against: str,
    dense: Path | None,
    ram: str,
    cold: bool,
    direct: bool,
    prompt_tokens: int,
    tokens: int,
    batch: int,
    rounds: int,
    threads: int,
    work: Path | None,
    airllm_python: str | None,
    trust_remote_code: bool,
    report: Path | None,
    plot: Path | None,
    json_path: Path | None,
) -> None:
    """Generate with PACKED and with other systems, under one memory budget, and compare.

    Every system runs in processes of its own, in alternating rounds, on the same random prompt; the
    medians are compared, and the logits checked bit for bit.
    """
    from endor.bench.generation.case import GenerateCase
    from endor.bench.generation.generate import generate
    from endor.planning import parse_bytes

    case = GenerateCase(
        packed=packed,
        dense=dense,
        ram_bytes=parse_bytes(ram, "--ram"),
        against=tuple(filter(None, (name.strip() for name in against.split(",")))),
        fast=direct,
        cold=cold,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        batch=batch,
        rounds=rounds,
        threads=threads,
        work=work,
        airllm_python=airllm_python,
        trust_remote_code=trust_remote_code,
        report=report,
    )
    records = generate(case, progress=lambda text: show(text, err=True))
    if json_path is not None and str(json_path) == "-":
        for record in records:
            echo(json.dumps(record.to_dict()))
    else:
        show(summary(records))
        if json_path is not None:
            with json_path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record.to_dict()) + "\n" for record in records)
    if plot is not None:
        from endor.bench.generation.plot import comparison

        comparison(records, plot)


def summary(records: Sequence["GenerateRecord"]) -> str:
    """Return the comparison for a reader."""
    first = records[0]
    place = first.environment
    lines = [
        f"{first.model}, budget {first.ram_bytes / 1e9:.2f} GB, page cache {first.page_cache}",
        f"prompt {first.prompt_tokens}, {first.tokens} tokens, batch {first.batch}, "
        f"{first.threads} threads, {place.device}, {place.git_rev}",
        "",
    ]
    rows = []
    for one in records:
        if not one.decode_s:
            continue
        expected = one.predicted_decode_s
        rows.append(
            [
                one.system,
                f"{one.tokens_per_s:.3f}",
                f"{one.decode_s:.3f}",
                f"{one.decode_p20:.3f}..{one.decode_p80:.3f}",
                f"{first.decode_s and one.decode_s / first.decode_s:.2f}",
                f"{expected:.3f} ({one.decode_s / expected - 1:+.0%})" if expected else "",
                f"{one.prefill_s:.2f}",
                f"{one.disk_bytes_per_step / 1e9:.2f}",
                f"{one.anonymous_peak_bytes / 1e9:.2f}",
                f"{one.cached_share:.0%}",
                {True: "yes", False: "no", None: ""}[one.equal],
            ]
        )
    header = [
        "",
        "tokens/s",
        "s a step",
        "p20..p80",
        f"time / {first.system}",
        "predicted",
        "prefill s",
        "disk GB a step",
        "peak GB",
        "cached",
        "bits equal",
    ]
    lines.append(table(header, rows))
    notes = [f"{one.system}: {one.note}" for one in records if one.note]
    notes += [f"{one.system}: not measured: {one.missing}" for one in records if one.missing]
    return "\n".join(lines + ([""] if notes else []) + notes)
