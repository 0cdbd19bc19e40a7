"""scripts/recode_sizes.py: codes of other formats, and what coding them takes."""

import importlib.util
from pathlib import Path

import pytest
import torch

_PATH = Path(__file__).parents[2] / "scripts" / "recode_sizes.py"
_SPEC = importlib.util.spec_from_file_location("recode_sizes", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
recode_sizes = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(recode_sizes)


@pytest.mark.parametrize("name", recode_sizes.FORMATS)
def test_codes_fit_and_take_no_more_than_stored(name: str) -> None:
    bits, quantise = recode_sizes.FORMATS[name]
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    codes = quantise(weight)
    assert codes.max() - codes.min() < 2**bits
    assert codes.unique().numel() > 2 ** (bits - 1)
    assert 0.5 * bits < recode_sizes.coded_bits(codes, bits) < bits + 0.05


def test_formats_give_the_codes_that_they_define() -> None:
    row = torch.zeros(1, 64)
    row[0, :6] = torch.tensor([1.0, -1.0, 0.0, 0.0796, 0.5626, -0.5251])
    assert recode_sizes.nf4(row)[0, :6].tolist() == [15, 0, 7, 8, 13, 2]
    row[0, :6] = torch.tensor([6.0, -6.0, 0.5, -0.5, 3.0, 1.0])
    assert recode_sizes.mxfp4(row)[0, :6].tolist() == [7, 15, 1, 9, 5, 2]
    row[0, :3] = torch.tensor([448.0, -448.0, 1.0])
    assert recode_sizes.fp8(row)[0, :3].tolist() == [0x7E, 0xFE, 0x38]
    row[0, :3] = torch.tensor([7.5, -7.5, 1.0])
    assert recode_sizes.integers(row, 64, 4)[0, :3].tolist() == [7, -8, 1]
