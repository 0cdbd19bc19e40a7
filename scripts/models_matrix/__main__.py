"""Every model that transformers can load, tried on Endor: `make models`.

    python scripts/models_matrix [--only REGEX] [--quick] [--out FILE] [--workers N] [--record]

Batches of models run in processes of their own. The results are compared with the recorded ones;
a row that got worse is an error. `--record` writes them, and docs/models.md, anew.
"""

import argparse
import re
import sys
from pathlib import Path

from catalog import QUICK, entries
from page import RESULTS, read_results, summary, worse, write_page, write_results
from pool import run_all


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="regular expression over task/Class")
    parser.add_argument("--quick", action="store_true", help="popular ones only")
    parser.add_argument("--out", type=Path, help="where the JSON lines go; recorded ones otherwise")
    parser.add_argument(
        "--recorded", type=Path, default=RESULTS, help="what the results are compared with"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="renew the recorded results")
    chosen = parser.parse_args()
    names = [entry.name for entry in entries() if re.search(chosen.only, entry.name)]
    if chosen.quick:
        names = [name for name in names if name in QUICK]
    if not names:
        parser.error(f"--only {chosen.only!r} names no model")
    found = run_all(names, workers=chosen.workers)
    recorded = read_results(chosen.recorded)
    if chosen.out is not None:
        write_results(chosen.out, found)
    if chosen.record:
        write_results(RESULTS, recorded | found)
        write_page()
    lost = worse(recorded, found)
    for line in lost:
        print(line)
    print(summary(found, lost))
    sys.exit(1 if lost and not chosen.record else 0)


if __name__ == "__main__":
    main()
