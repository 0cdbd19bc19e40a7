"""Count what the GPU kernels cost, on the simulated machine of tests/cuda/sass, and write it down.

`python scripts/gpu_counts.py` writes the budget of the tests, the table of docs/kernels-gpu.md and
the model of docs/benchmarks/gpu.md; with `--check` it only says whether they are as counted today.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.cuda.sass.figures import BUDGET, COLUMNS, FIGURES, compiler, count  # noqa: E402
from tests.cuda.sass.simulator import ARCHITECTURES, Simulator, missing  # noqa: E402

BEGIN, END = "<!-- counted: begin -->\n", "<!-- counted: end -->\n"

Costs = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True, slots=True)
class Card:
    """A card for the model.

    Attributes:
        name: As people call it.
        multiprocessors: How many it has.
        clock_ghz: Their boost clock.
        copy_gbps: What a copy in device memory moves, read and write counted.
        architecture: Whose machine code stands for its own.
    """

    name: str
    multiprocessors: int
    clock_ghz: float
    copy_gbps: float
    architecture: str


CARDS = (
    Card("RTX 3060", 28, 1.78, 330, "sm_86"),
    Card("RTX 4090", 128, 2.52, 920, "sm_86"),
    Card("RTX 5090", 170, 2.41, 1640, "sm_90"),
    Card("H100 SXM", 132, 1.98, 3000, "sm_90"),
    Card("H200", 132, 1.98, 4300, "sm_90"),
)
ISSUED, PASSED = 0.75, 0.8
"""Used shares of the issue slots, and of the cycles of the unit for memory and shuffles."""


def gweights(found: dict[str, float], card: Card) -> float:
    """Return the weights that `card` does in a nanosecond.

    The three limits (device memory, issue, transfers) are joined by the 4-norm: near each other
    they hinder each other, far apart the largest counts.
    """
    cycles_of_memory = found["bytes"] / (card.copy_gbps / card.multiprocessors / card.clock_ghz)
    limits = (cycles_of_memory, found["instructions"] / 4 / ISSUED, found["transfers"] / PASSED)
    cycles = sum(limit**4 for limit in limits) ** 0.25
    return float(1024 / cycles * card.multiprocessors * card.clock_ghz)


def model(costs: Costs) -> str:
    """Return the table of modelled weights per second."""
    lines = [
        "G weights/s, **modelled**, not measured (`python scripts/gpu_counts.py`):",
        "",
        f"| kernel | {' | '.join(card.name for card in CARDS)} |",
        f"|---|{'---|' * len(CARDS)}",
    ]
    for name, rows in costs.items():
        cells = " | ".join(f"{gweights(rows[card.architecture], card):.0f}" for card in CARDS)
        lines.append(f"| {name} | {cells} |")
    dense = " | ".join(f"{0.9 * card.copy_gbps / 2:.0f}" for card in CARDS)
    lines.append(f"| dense bf16 weights read at 0.9 of a copy | {dense} |")
    return "\n".join(lines) + "\n"


def replaced(page: str, text: str) -> str:
    """Return `page` with `text` between its marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + text + END + tail


def table(costs: Costs, nvrtc: str) -> str:
    """Return the table, one row a kernel and architecture."""
    lines = [
        f"Per 1024 weights, executed (NVRTC {nvrtc}). `python scripts/gpu_counts.py` writes this",
        "table and the budget that the tests hold.",
        "",
        f"| kernel | code for | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    for name, rows in costs.items():
        for architecture, found in rows.items():
            cells = " | ".join(f"{found[column]:g}" for column in COLUMNS)
            lines.append(f"| {name} | {architecture} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    reason = missing()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    simulator = Simulator()
    costs = {
        figure.name: {at: count(figure, simulator, at) for at in ARCHITECTURES}
        for figure in FIGURES
    }
    new = {BUDGET: json.dumps({"nvrtc": compiler(), "costs": costs}, indent=1) + "\n"}
    for name, text in (
        ("kernels-gpu.md", table(costs, compiler())),
        ("benchmarks/gpu.md", model(costs)),
    ):
        page = ROOT / "docs" / name
        new[page] = replaced(page.read_text(), text)
        print(text)
    if check:
        same = all(path.read_text() == text for path, text in new.items())
        print("as recorded" if same else "not what is recorded: run scripts/gpu_counts.py")
        return 0 if same else 1
    for path, text in new.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
