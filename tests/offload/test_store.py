"""Weights come out with their bits, in every tier and dtype, on several threads at once."""

import copy
import gc
import pickle

import numpy as np
import pytest
import torch

from endor.errors import BackendError, ConfigError, DTypeError
from endor.offload import Store
from endor.packed import bits_of
from endor.planning import Part, Placement, WeightSpec, collect_units
from endor.storage import open_reader

from ..support.packed_files import finishes, loaders, make_packed, wait_until

TIERS = ["resident", "disk", "dense"]


def placed(packed, tier):
    return Placement({unit.name: tier for unit in packed.units}, packed.largest)


@pytest.mark.parametrize("tier", TIERS)
def test_dense_and_fresh_have_the_bits(packed, tier):
    store = packed.store(placed(packed, tier))
    for _ in range(2):
        for name, expected in packed.dense.items():
            np.testing.assert_array_equal(bits_of(store.weights[name].dense()), expected)
            np.testing.assert_array_equal(bits_of(store.weights[name].fresh()), expected)
    expansions = {"resident": 32, "disk": 32, "dense": 8}[tier]
    assert store.ledger.counters.expands == expansions
    store.close()


def test_scratch_is_reused_and_fresh_is_not(packed):
    store = packed.store()
    weight = store.weights["w0"]
    assert weight.dense().data_ptr() == store.weights["w1"].dense().data_ptr()
    kept = weight.fresh()
    store.weights["w1"].dense()
    np.testing.assert_array_equal(bits_of(kept), packed.dense["w0"])
    store.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_conversion_is_torch_conversion(packed, dtype):
    store = packed.store(dtype=dtype)
    weight = store.weights["w5"]
    expected = torch.from_numpy(packed.dense["w5"].view(np.int16)).view(torch.bfloat16).to(dtype)
    assert torch.equal(weight.dense(), expected)
    assert torch.equal(weight.fresh(), expected)
    assert not weight.multiplies
    store.close()


@pytest.mark.parametrize("tier", ["resident", "disk"])
def test_product(packed, tier):
    store = packed.store(placed(packed, tier))
    for weight in store.weights.values():
        x = torch.randn(3, weight.shape[1]).bfloat16()
        found = weight.product(x)
        exact = x.double() @ weight.fresh().double().T
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    assert store.ledger.counters.products == 8
    store.close()


def test_a_weight_of_several_parts(packed):
    """Two stored matrices below each other, and a range out of the middle of a third."""
    rows = packed.dense["w0"].shape[1]
    assert packed.dense["w4"].shape[1] == rows == 96
    below = WeightSpec(
        "below", (160, 96), (Part("w0", 0, 6144, 0), Part("w4", 0, 9216, 6144)), "below"
    )
    middle = WeightSpec("middle", (10, 64), (Part("w7", 640, 1280, 0),), "middle")
    specs = [(below, torch.bfloat16), (middle, torch.bfloat16)]
    units = collect_units([packed.layout], [below, middle])
    placement = Placement({unit.name: "disk" for unit in units}, packed.largest)
    store = Store.open([packed.layout], units, specs, placement, open_reader())
    stacked = np.concatenate([packed.dense["w0"], packed.dense["w4"]])
    np.testing.assert_array_equal(bits_of(store.weights["below"].dense()), stacked)
    np.testing.assert_array_equal(
        bits_of(store.weights["middle"].dense()), packed.dense["w7"][10:20]
    )
    assert store.weights["below"].multiplies
    assert not store.weights["middle"].multiplies
    x = torch.randn(2, 96).bfloat16()
    exact = x.double() @ store.weights["below"].fresh().double().T
    found = store.weights["below"].product(x).double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)
    store.close()


def test_threads_have_scratch_of_their_own(packed):
    store = packed.store(packed.placement(packed.largest * 2, resident=[1, 3]), threads=2)

    def run(order):
        for _ in range(20):
            for name in order:
                np.testing.assert_array_equal(
                    bits_of(store.weights[name].dense()), packed.dense[name]
                )

    names = list(packed.dense)
    finishes(lambda: run(names), lambda: run(names[::-1]), lambda: run(names[::2]))
    store.close()


def test_close_ends_every_use(packed):
    others = loaders()
    store = packed.store(packed.placement(resident=[0]))
    store.preload()
    store.weights["w0"].dense()
    store.close()
    assert loaders() <= others
    for name in ("w0", "w1"):
        with pytest.raises(BackendError, match="closed"):
            store.weights[name].dense()


def test_a_forgotten_store_closes_itself(packed):
    others = loaders()
    store = packed.store()
    weight = store.weights["w0"]
    weight.dense()
    assert loaders() > others
    gc.disable()  # nothing but the weight keeps the engine, and no cycle keeps the weight
    try:
        del store
        np.testing.assert_array_equal(bits_of(weight.fresh()), packed.dense["w0"])
        del weight
    finally:
        gc.enable()
    wait_until(lambda: loaders() <= others)


def test_copies_share_and_pickles_are_refused(packed):
    store = packed.store()
    assert copy.deepcopy(store) is store
    weight = store.weights["w0"]
    assert copy.deepcopy(weight) is weight
    for item in (store, weight):
        with pytest.raises(ConfigError, match="save_pretrained"):
            pickle.dumps(item)
    store.close()


def test_report_is_plain_data(packed):
    import json

    store = packed.store(packed.placement(resident=[0, 1]))
    store.preload()
    report = json.loads(json.dumps(store.report()))
    assert report["tiers"]["resident"]["units"] == 2
    assert report["tiers"]["disk"]["units"] == 6
    assert report["staging_bytes"] == packed.largest
    assert report["counters"]["reads"] >= 2
    assert store.held_nbytes == report["tiers"]["resident"]["nbytes"] + packed.largest
    assert store.numel == sum(bits.size for bits in packed.dense.values())
    assert store.packed_nbytes == packed.nbytes
    store.close()


def test_integers_are_refused(tmp_path):
    from endor import kernels
    from endor.codecs import DTYPES
    from endor.storage import FileLayout, FileWriter, header_capacity, largest_spec

    path, item = tmp_path / "a.safetensors", DTYPES["I8"]
    bits = np.zeros((64, 64), dtype=np.uint8)
    plan = {"w": {"w": largest_spec(bits.shape, item)}}
    with (
        FileWriter(path, header_capacity=header_capacity(plan)) as writer,
        writer.record("w") as record,
    ):
        record.add("w", kernels.encode(bits, item))
    layout = FileLayout.read(path)
    spec = WeightSpec("w", (64, 64), (Part("w", 0, 4096, 0),), "w")
    units = collect_units([layout], [spec])
    placement = Placement({"w": "resident"}, 0)
    with open_reader() as reader, pytest.raises(DTypeError, match="I8"):
        Store.open([layout], units, [(spec, torch.bfloat16)], placement, reader)


def test_dense_stored_tensors_work_too(tmp_path):
    packed = make_packed(tmp_path / "a.safetensors", [(64, 96)], codec="dense")
    assert packed.layout.tensors["w0"].spec.codec == "dense"
    store = packed.store()
    np.testing.assert_array_equal(bits_of(store.weights["w0"].dense()), packed.dense["w0"])
    assert not store.weights["w0"].multiplies
    store.close()
