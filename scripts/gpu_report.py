"""Measurements and summary of gpu_check.sh: `gpu_report.py kernels|model|summary OUTDIR`."""

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


def kernels(out: Path) -> int:
    """Measure expansion, products and the link; each record is written as soon as there is one."""
    from endor.bench.gpu import kernels, link
    from endor.bench.gpu.case import GpuCase
    from endor.bench.records import BenchRecord, write_json_lines

    path = out / "kernels.jsonl"
    path.unlink(missing_ok=True)
    wrong = 0

    def keep(records: Iterable[BenchRecord]) -> None:
        for record in records:
            write_json_lines([record], path)
            print(line(record.to_dict()), flush=True)

    keep(link.link(GpuCase(repeats=7)))
    for density in DENSITIES:
        for rows, cols in SHAPES:
            case = GpuCase(rows, cols, density)
            for measure in (kernels.expansion, kernels.products):
                try:
                    keep(measure(case))
                except Exception:
                    traceback.print_exc()
                    wrong = 1
    return wrong


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
            wrong |= "error" in answer
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
    """Write summary.md from whatever the steps left."""
    text = ["# GPU check", ""]
    device = out / "device.txt"
    if device.exists():
        text += ["```", device.read_text().strip(), "```", ""]
    text += ["| step | ended | took |", "|---|---|---|"]
    for row in (out / "steps.txt").read_text().splitlines():
        text.append("| " + " | ".join([*row.split("|"), "", ""][:3]) + " |")
    records = out / "kernels.jsonl"
    if records.exists():
        text += ["", "| subject | shape | density | us | GB/s | of ceiling | dense GB/s | note |"]
        text += ["|---|---|---|---|---|---|---|---|"]
        text += [line(json.loads(row)) for row in records.read_text().splitlines()]
    if (out / "model.json").exists():
        text += ["", *model_table(json.loads((out / "model.json").read_text()), best_link(records))]
    (out / "summary.md").write_text("\n".join(text) + "\n")
    return 0


def best_link(records: Path) -> float:
    """Return the fastest pinned copy, in 1e9 bytes/s; 0 when none was measured."""
    if not records.exists():
        return 0.0
    rows = [json.loads(row) for row in records.read_text().splitlines()]
    return max((row["gbps"] for row in rows if row["subject"].startswith("pinned")), default=0.0)


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
    return {"kernels": kernels, "model": model, "summary": summary}[part](out)


if __name__ == "__main__":
    sys.exit(main())
