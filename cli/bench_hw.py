"""`endor bench hw`: what this machine can do."""

from dataclasses import asdict
from pathlib import Path

import click

from endor.cli.tables import table
from endor.cli.terminal import emit, show


@click.command("hw")
@click.option(
    "--path",
    type=click.Path(exists=True, path_type=Path),
    help="A packed checkpoint or file: its disk is measured too.",
)
@click.option(
    "--dtype",
    type=click.Choice(["BF16", "F16", "F32"]),
    default="BF16",
    show_default=True,
    help="Element type of the weights.",
)
@click.option("--remeasure", is_flag=True, help="Measure again what is remembered.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def hw_command(path: Path | None, dtype: str, remeasure: bool, as_json: bool) -> None:
    """Measure the constants that plans are made of.

    They are remembered until the machine, its thread count or the kernels change.
    """
    from endor.bench.hw import constants, hw
    from endor.machine import cache_path
    from endor.planning.machine import disturbance

    machine, disk = hw(dtype, path, refresh=remeasure)
    if as_json:
        found = {"machine": machine.to_dict(), "disk": asdict(disk) if disk else None}
        emit(found, indent=2)
        return
    rows = [[item.name, f"{item.value:.4g}", item.unit] for item in constants(machine, disk)]
    show(table([f"{machine.dtype}, {machine.threads} threads", "", "unit"], rows))
    show(f"\nmeasured {machine.measured} with kernel {machine.kernel}")
    if text := disturbance(machine, disk):
        show(text)
    show(f"remembered in {cache_path()}")
