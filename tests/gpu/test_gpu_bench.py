"""Every GPU benchmark runs, at toy size."""

import pytest

from endor.bench.gpu import kernels as bench
from endor.bench.gpu import link, model
from endor.bench.gpu.case import GpuCase

pytestmark = pytest.mark.gpu

TOY = GpuCase(rows=256, cols=1056, repeats=3)


def test_expansion():
    records = list(bench.expansion(TOY))
    assert {"endor raw", "endor exp", "endor exp without bitmap"} <= {
        record.subject for record in records
    }
    assert all(record.p50 > 0 for record in records)


def test_products():
    subjects = [record.subject for record in bench.products(TOY, batches=(1, 3))]
    assert "torch F.linear, batch 3" in subjects
    assert subjects.count("endor raw product, batch 1") == 2, "one number of rows, two of warps"
    assert subjects.count("endor exp product, batch 3") == 4, "two numbers of rows, two of warps"


def test_link():
    records = list(link.link(TOY, sizes=(1 << 20,)))
    assert records[0].subject == "pinned copy of 1 MiB"
    assert sum(record.subject.startswith("streamed") for record in records) == 2


def test_model(tmp_path):
    case = model.ModelCase(
        layers=2,
        hidden=256,
        wide=512,
        heads=8,
        kv_heads=4,
        vocab=512,
        vram_bytes=3 << 20,
        tokens=4,
        seconds=120,
    )
    model.make(case, tmp_path)
    answers = list(model.run(case, tmp_path, ("dense, no cap", "endor")))
    assert all("error" not in answer for answer in answers), answers
    assert answers[0]["tokens"] == answers[1]["tokens"]
