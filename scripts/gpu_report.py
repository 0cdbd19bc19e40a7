"""Measurements and summary of gpu_check.sh: `gpu_report.py kernels|link|model|summary FOLDER`."""

import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHAPES = ((4096, 11008), (8192, 28672))
DENSITIES = (0.5, 0.3)
RECORDS = "records.jsonl"


def kernels(out: Path) -> int:
    """Measure expansion and products."""
    from endor.bench.gpu import kernels
    from endor.bench.gpu.case import GpuCase

    wrong = 0
    for density in DENSITIES:
        for rows, cols in SHAPES:
            case = GpuCase(rows, cols, density)
            for measure in (kernels.expansion, kernels.products):
                try:
                    keep(out, measure(case))
                except Exception:
                    traceback.print_exc()
                    wrong = 1
    return wrong


def link(out: Path) -> int:
    """Measure copies from the host."""
    from endor.bench.gpu import link
    from endor.bench.gpu.case import GpuCase

    keep(out, link.link(GpuCase(repeats=7)))
    return 0


def keep(out: Path, records: Iterable[Any]) -> None:
    """Append each record as soon as there is one: a step may be ended at any time."""
    from endor.bench.records import write_json_lines

    for record in records:
        write_json_lines([record], out / RECORDS)
        print(line(record.to_dict()), flush=True)


def model(out: Path) -> int:
    """Generate with a synthetic model under a VRAM cap, by every system."""
    from endor.bench.gpu import model

    case = model.ModelCase()
    folder = Path(tempfile.mkdtemp(prefix="endor-gpu-check-"))
    found: dict[str, Any] = {"case": {name: getattr(case, name) for name in case.__slots__}}
    path = out / "model.json"
    wrong = 0
    try:
        found["made"] = model.make(case, folder)
        print(found["made"], flush=True)
        found["systems"] = []
        for answer in model.run(case, folder):
            found["systems"].append(answer)
            path.write_text(json.dumps(found, indent=1))
            print({key: answer[key] for key in answer if key != "report"}, flush=True)
            # a peer that fails is a row of the table, not a fault of ours
            wrong |= "error" in answer and answer["system"].startswith("endor")
    except Exception as error:
        found["error"] = repr(error)
        traceback.print_exc()
        wrong = 1
    finally:
        path.write_text(json.dumps(found, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
    return wrong


def line(record: dict[str, Any]) -> str:
    """Return a record as a row of the summary's table."""
    shape = "x".join(str(size) for size in record["shape"])
    share = f"{record['ceiling_ratio']:.2f}" if record["ceiling_ratio"] else ""
    return (
        f"| {record['subject']} | {shape} | {record['density']:g} | {record['p50'] * 1e6:.1f} | "
        f"{record['gbps']:.0f} | {share} | {record['dense_gbps']:.0f} | {record['note']} |"
    )


def summary(out: Path) -> int:
    """Write summary.md and results.json from whatever the steps left."""
    device = text_of(out / "device.txt").strip()
    steps = [[*row.split("|"), "", ""][:3] for row in text_of(out / "steps.txt").splitlines()]
    records = [json.loads(row) for row in text_of(out / RECORDS).splitlines()]
    found = json.loads(text_of(out / "model.json") or "null")
    text = ["# GPU check", "", "```", device, "```", "", "| step | ended | took |", "|---|---|---|"]
    text += [f"| {' | '.join(row)} |" for row in steps]
    for name, ended, _ in steps:
        if ended.startswith(("FAILED", "NOT ENDED")):
            last = text_of(out / f"{name}.log").strip().splitlines()[-12:]
            text += ["", f"End of {name}.log:", "", "```", *last, "```"]
    if records:
        text += ["", "| subject | shape | density | us | GB/s | of ceiling | dense GB/s | note |"]
        text += ["|---|---|---|---|---|---|---|---|", *(line(record) for record in records)]
    if found:
        text += ["", *model_table(found, best_link(records))]
    (out / "summary.md").write_text("\n".join(text) + "\n")
    results = {
        "device": device,
        "steps": [dict(zip(("step", "ended", "took"), row, strict=True)) for row in steps],
        "records": records,
        "model": found,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


def text_of(path: Path) -> str:
    """Return what `path` holds; nothing where a step did not come so far."""
    return path.read_text(errors="replace") if path.exists() else ""


def best_link(records: Iterable[dict[str, Any]]) -> float:
    """Return the fastest pinned copy, in 1e9 bytes/s; 0 when none was measured."""
    pinned = (row["gbps"] for row in records if row["subject"].startswith("pinned"))
    return max(pinned, default=0.0)


def model_table(found: dict[str, Any], link_gbps: float) -> list[str]:
    """Return the table of the whole-model run."""
    made = found.get("made", {})
    text = [
        f"Model of {made.get('dense_bytes', 0) / 1e9:.2f} GB dense, "
        f"{made.get('packed_bytes', 0) / 1e9:.2f} GB packed; "
        f"weights in VRAM at most {found['case']['vram_bytes'] / 2**20:.0f} MiB.",
        "",
        "| system | tokens/s | prefill s | load s | peak VRAM MiB | link MB/token | link use |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in found.get("systems", []):
        if "error" in item:
            text.append(f"| {item['system']} | {item['error'].splitlines()[-1]} | | | | | |")
            continue
        moved = item.get("link_bytes_per_token", 0.0)
        use = moved / item["token_s"] / 1e9 / link_gbps if moved and link_gbps else 0.0
        text.append(
            f"| {item['system']} | {item['tokens_per_s']:.2f} | {item['prefill_s']:.2f} | "
            f"{item['load_s']:.1f} | {item['peak_vram_bytes'] / 2**20:.0f} | {moved / 1e6:.0f} | "
            f"{use:.2f} |"
        )
    if "error" in found:
        text += ["", f"Stopped: {found['error']}"]
    return text


def main() -> int:
    """Run the part that the command line names."""
    part, out = sys.argv[1], Path(sys.argv[2])
    return {"kernels": kernels, "link": link, "model": model, "summary": summary}[part](out)


if __name__ == "__main__":
    sys.exit(main())
