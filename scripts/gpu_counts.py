"""Count what the GPU kernels cost, on the simulated machine of tests/cuda/sass, and write it down.

`python scripts/gpu_counts.py` writes the budget of the tests and the table of docs/kernels-gpu.md;
with `--check` it only says whether they are what is counted today.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.cuda.sass.figures import BUDGET, COLUMNS, FIGURES, compiler, count  # noqa: E402
from tests.cuda.sass.simulator import ARCHITECTURES, Simulator, missing  # noqa: E402

PAGE = ROOT / "docs" / "kernels-gpu.md"
BEGIN, END = "<!-- counted: begin -->\n", "<!-- counted: end -->\n"


def table(costs: dict[str, dict[str, dict[str, float]]], nvrtc: str) -> str:
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
    budget = json.dumps({"nvrtc": compiler(), "costs": costs}, indent=1) + "\n"
    page = PAGE.read_text()
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    page_new = head + BEGIN + table(costs, compiler()) + END + tail
    if check:
        same = budget == BUDGET.read_text() and page_new == page
        print("as recorded" if same else "not what is recorded: run scripts/gpu_counts.py")
        return 0 if same else 1
    BUDGET.write_text(budget)
    PAGE.write_text(page_new)
    print(table(costs, compiler()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
