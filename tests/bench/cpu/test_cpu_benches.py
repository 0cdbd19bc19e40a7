"""Every CPU benchmark at toy size. No figure of speed is asserted."""

from dataclasses import replace

import numpy as np
import pytest

from endor import codecs
from endor.bench.cpu import decode as decode_module
from endor.bench.cpu.cases import BenchRun, Case, weight
from endor.bench.cpu.decode import decode
from endor.bench.cpu.matvec import matvec
from endor.bench.cpu.pack import pack
from endor.errors import BackendError, ConfigError, DTypeError

NUMEL = 24 * 120
RAW_BYTES = 4 * 4 + 3 * 128 + NUMEL


def subjects(run: BenchRun) -> list[str]:
    return [record.subject for record in run.records]


def test_decode_measures_both_codecs_against_the_copy_and_the_peers(toy):
    run = decode(toy)

    names = subjects(run)
    assert names[:3] == ["non-temporal copy", "endor raw", "endor exp"]
    assert {"numpy reference, raw", "torch masked_scatter_"} <= set(names)
    raw = run.records[1]
    assert (raw.bench, raw.shape, raw.dtype, raw.density, raw.threads) == (
        "decode",
        (24, 120),
        "BF16",
        0.5,
        1,
    )
    assert raw.packed_bytes == pytest.approx(RAW_BYTES, abs=4)
    assert raw.traffic_bytes == raw.packed_bytes + 2 * NUMEL
    assert raw.ceiling == "non-temporal copy"
    assert raw.ceiling_ratio == pytest.approx(raw.gbps / run.records[0].gbps)
    assert [record.peer for record in run.records[:4]] == [False, False, False, True]
    assert run.records[0].traffic_bytes == 4 * NUMEL


@pytest.mark.parametrize("dtype", ["F16", "F32", "F8_E4M3", "I8", "U8"])
def test_decode_takes_every_packable_dtype(toy, dtype):
    run = decode(replace(toy, dtype=dtype))

    assert "endor exp" in subjects(run)
    assert {record.dtype for record in run.records} == {dtype}


def test_pack_measures_auto_too_and_counts_the_packed_bytes_written(toy):
    run = pack(toy)

    names = subjects(run)
    assert names[:4] == ["non-temporal copy", "endor raw", "endor exp", "endor auto"]
    raw = run.records[1]
    assert raw.traffic_bytes == raw.packed_bytes + 2 * NUMEL
    best = min(record.packed_bytes for record in run.records[1:3])
    assert run.records[3].packed_bytes <= best


@pytest.mark.parametrize("batch", [1, 3])
def test_matvec_counts_packed_bytes_and_measures_dense_products(toy, batch):
    run = matvec(replace(toy, batch=batch))

    assert subjects(run) == [
        "read",
        "endor raw",
        "endor exp",
        "torch F.linear, dense",
        "numpy float32, dense",
    ]
    raw, linear = run.records[1], run.records[3]
    assert raw.traffic_bytes == raw.packed_bytes
    assert linear.traffic_bytes == 2 * NUMEL


def test_one_codec_and_no_peers(toy):
    for bench in (decode, pack, matvec):
        run = bench(replace(toy, codec="exp", peers=False))
        assert len(run.records) == 2
        assert run.records[1].subject == "endor exp"
        assert run.missing == {}


def test_a_decoder_that_gives_wrong_bits_is_not_timed(toy, monkeypatch):
    def broken(encoded, out, **_):
        out[:] = codecs.decode(encoded).reshape(-1)
        out[17] ^= 1
        return out

    monkeypatch.setattr(decode_module.kernels, "decode", broken)
    with pytest.raises(BackendError, match="endor raw: decoded bits differ"):
        decode(toy)


def test_a_peer_that_gives_wrong_bits_is_reported_and_not_timed(toy, monkeypatch):
    def broken(encoded, out):
        out[...] = 1
        return out

    monkeypatch.setattr("endor.bench.cpu.peers.codecs.decode", broken)
    run = decode(toy)
    assert "numpy reference, raw" not in subjects(run)
    assert run.missing["numpy reference, raw"] == "gave other bits than the weight's"


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_the_weight_has_the_density_and_no_negative_zero(density):
    bits = weight(Case(rows=64, cols=128, density=density))

    assert bits.shape == (64, 128)
    assert np.count_nonzero(bits) == pytest.approx(density * bits.size, abs=1)
    assert not (bits == 0x8000).any()


def test_the_weight_depends_on_the_seed_only():
    case = Case(rows=8, cols=16)
    assert np.array_equal(weight(case), weight(case))
    assert not np.array_equal(weight(case), weight(replace(case, seed=1)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", 0, "rows must be at least 1"),
        ("batch", 0, "batch must be at least 1"),
        ("repeats", 0, "repeats must be at least 1"),
        ("threads", 0, r"threads must be an integer in 1\.\.256"),
        ("density", 0.0, "density must lie in"),
        ("density", 1.5, "density must lie in"),
        ("codec", "dense", "nothing to measure"),
        ("dtype", "I64", "takes only the dense codec"),
    ],
)
def test_wrong_settings_are_refused(toy, field, value, message):
    with pytest.raises(ConfigError, match=message):
        decode(replace(toy, **{field: value}))


def test_an_unknown_dtype_is_refused(toy):
    with pytest.raises(DTypeError, match="dtype must be one of"):
        pack(replace(toy, dtype="bf16"))


def test_matvec_refuses_a_dtype_without_a_product(toy):
    with pytest.raises(ConfigError, match="matvec takes BF16, F16, F32, got I8"):
        matvec(replace(toy, dtype="I8"))


def test_quick_keeps_the_weight_and_cuts_the_repeats():
    case = Case(rows=7, cols=9).quick()
    assert (case.rows, case.cols, case.repeats) == (7, 9, 5)
