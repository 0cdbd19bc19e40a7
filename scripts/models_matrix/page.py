"""The recorded results, and docs/models.md made from them."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catalog import TASKS

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).resolve().parent / "results.jsonl"
PAGE = ROOT / "docs" / "models.md"

Record = dict[str, Any]

RANK = {"ok": 0, "dense": 1, "refused": 2, "late": 3, "crash": 4, "error": 4, "wrong": 5}
KEPT = (
    "name",
    "transformers",
    "model_type",
    "status",
    "reason",
    "image",
    "packed_share",
    "loaded_share",
    "wanda",
)


def read_results(path: Path) -> dict[str, Record]:
    """Return the records of a file by name; none where there is no file."""
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record["name"]: record for record in records}


def write_results(path: Path, records: Mapping[str, Record]) -> None:
    """Write what does not vary from run to run, in order of names."""
    lines = [
        json.dumps({key: record[key] for key in KEPT if key in record})
        for _, record in sorted(records.items())
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def worse(recorded: Mapping[str, Record], found: Mapping[str, Record]) -> list[str]:
    """Return a line for each row that got worse: status, bytes packed, images, pruning."""
    lines = []
    for name, new in found.items():
        old = recorded.get(name)
        if old is None:
            if RANK[new["status"]] > RANK["dense"]:
                lines.append(f"{name}: {new['status']}, and not recorded: {new.get('reason')}")
        elif RANK[new["status"]] > RANK[old["status"]]:
            lines.append(f"{name}: was {old['status']}, is {new['status']}: {new.get('reason')}")
        elif new["status"] == "ok":
            for key in ("packed_share", "loaded_share"):
                if new[key] < old.get(key, 0) - 0.005:
                    lines.append(f"{name}: {key} was {old[key]}, is {new[key]}")
            if old.get("image") and not new.get("image"):
                lines.append(f"{name}: images were compared, and are not")
            if old.get("wanda") == "ok" and new.get("wanda", "ok") != "ok":
                lines.append(f"{name}: pruned by wanda, and now {new['wanda']}")
    return lines


def summary(found: Mapping[str, Record], lost: list[str]) -> str:
    """Return the last line: counts, and the share of what the dense side runs that is ok."""
    counts = Counter(record["status"] for record in found.values())
    runs = sum(count for status, count in counts.items() if status != "dense")
    share = counts["ok"] / runs if runs else 1.0
    words = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return f"models: {words}; {share:.1%} of the {runs} that run dense; {len(lost)} worse"


def write_page() -> None:
    """Write docs/models.md."""
    PAGE.write_text(page(read_results(RESULTS)), encoding="utf-8")


INTRO = """# Models

What Endor does with each model class of transformers {version}, made by `make models`
(`scripts/models_matrix`); do not edit. Each is tried as a tiny random model, in bfloat16 where the
dense model runs in it: packed lossless, verified against its source, unpacked to the same bits,
loaded, its outputs and greedy tokens compared bit for bit with the dense model's, in memory and
streamed at the least budget that loads it; models that take images, with an image among the text
too. A class that several tasks have is under the first.

- *packed*: part of the checkpoint's bytes in packed tensors (at a real size more: embeddings weigh
  less there); *loaded*: part that stays packed in memory.
- *pruned*: `endor pack --prune wanda`, for models that generate.
- "dense side": it is the dense model that does not run here, so there is no verdict.

{summary}
"""


def page(records: Mapping[str, Record]) -> str:
    """Return the text of docs/models.md."""
    version = next((record["transformers"] for record in records.values()), "")
    intro = INTRO.format(version=version, summary=_totals(records))
    parts = [intro]
    for task in TASKS:
        rows = [record for name, record in sorted(records.items()) if name.startswith(f"{task}/")]
        if rows:
            ok = sum(row["status"] == "ok" for row in rows)
            runs = sum(row["status"] != "dense" for row in rows)
            parts += [f"## {task}: {ok} of {runs}\n", HEAD, *map(_row, rows), ""]
    return "\n".join(parts)


HEAD = "| model | result | packed | loaded | pruned |\n|---|---|---|---|---|"


def _totals(records: Mapping[str, Record]) -> str:
    counts = Counter(record["status"] for record in records.values())
    runs = sum(count for status, count in counts.items() if status != "dense")
    rest = [f"{counts[status]} {status}" for status in sorted(counts.keys() - {"ok", "dense"})]
    images = sum(bool(record.get("image")) for record in records.values())
    pruned = Counter(
        str(record["wanda"]).split(":")[0] for record in records.values() if "wanda" in record
    )
    lines = [
        f"Of {len(records)} classes the dense side runs {runs}, and **{counts['ok']} of these are "
        f"ok ({counts['ok'] / max(1, runs):.1%})**{''.join(f', {item}' for item in rest)}.",
        f"{images} were compared with images. Calibrated pruning: "
        + ", ".join(f"{count} {kind}" for kind, count in pruned.most_common())
        + ".",
    ]
    return "\n".join(lines)


def _row(record: Record) -> str:
    name = record["name"].partition("/")[2]
    status = record["status"]
    if status == "ok":
        result = "ok, with images" if record.get("image") else "ok"
        shares = [f"{record['packed_share']:.0%}", f"{record['loaded_share']:.0%}"]
    else:
        result = f"{WORDS.get(status, status)}: {_plain(record.get('reason', ''))}"
        shares = ["", ""]
    wanda = record.get("wanda", "")
    return f"| {name} | {result} | {shares[0]} | {shares[1]} | {_plain(wanda)} |"


WORDS = {"dense": "dense side"}


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())[:220]
