"""The device reader, over a stand-in for cuFile that writes into host memory."""

import ctypes
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import endor
from endor.errors import BackendError, ConfigError, ReadError, TruncatedError
from endor.storage import FileLayout, device_backends, open_reader
from endor.storage import cufile as module
from endor.storage.cufile import DeviceReader, open_device_reader, probe
from endor.storage.device_backends import CuFile, Kvikio, observed_path


class FakeCuFile:
    """`cuda.bindings.cufile`, with shorter reads than asked for and counts to match."""

    FileHandleType = SimpleNamespace(OPAQUE_FD=1)

    def __init__(self, *, most: int = 1 << 62, result: int | None = 0, fail: str = "") -> None:
        self.most = most
        self.result = result
        self.fail = fail
        self.open = 0
        self.handles: dict[int, int] = {}
        self.reads = 0
        self.last: SimpleNamespace | None = None

    def driver_open(self) -> None:
        if self.fail == "driver":
            raise RuntimeError("5033: driver initialization error")
        self.open += 1

    def driver_close(self) -> None:
        self.open -= 1

    def set_stats_level(self, level: int) -> None:
        assert level == 3

    def stats_start(self) -> None:
        if self.fail == "stats":
            raise RuntimeError("no statistics")

    def Descr(self) -> SimpleNamespace:
        self.last = SimpleNamespace(type=0, handle=SimpleNamespace(fd=-1), fs_ops=1, ptr=7)
        return self.last

    def handle_register(self, pointer: int) -> int:
        assert pointer == 7
        assert self.last is not None
        if self.fail == "register":
            raise RuntimeError("unsupported file system")
        handle = 100 + len(self.handles)
        self.handles[handle] = self.last.handle.fd
        return handle

    def handle_deregister(self, handle: int) -> None:
        del self.handles[handle]

    def read(self, handle: int, address: int, size: int, offset: int, at: int) -> int | None:
        self.reads += 1
        if self.result is None or self.result < 0:
            return self.result
        data = os.pread(self.handles[handle], 1 << 20, offset)[: min(size, self.most)]
        ctypes.memmove(address + at, data, len(data))
        return len(data)

    def StatsLevel3(self) -> SimpleNamespace:
        card = SimpleNamespace(
            n_p2p_reads=np.array([self.reads]),
            n_nvfs_reads=0,
            n_posix_reads=0,
            n_unaligned_reads=0,
        )
        return SimpleNamespace(ptr=1, num_gpus=1, per_gpu_stats=[card])

    def get_stats_l3(self, pointer: int) -> None:
        assert pointer == 1


@pytest.fixture
def layout(tmp_path) -> FileLayout:
    path = tmp_path / "weights.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{at}": torch.randn(300, 70, generator=generator) for at in range(3)}
    endor.save_file(tensors, path)
    return FileLayout.read(path)


@pytest.fixture(autouse=True)
def _buffered(monkeypatch) -> None:
    """A file system of a test machine may refuse O_DIRECT, and reads here are of any length."""
    monkeypatch.setattr(os, "O_DIRECT", 0)


@pytest.mark.parametrize("most", [1 << 62, 1000, 4096])
def test_records_arrive_whole_however_short_the_reads(layout, monkeypatch, most):
    monkeypatch.setattr(module, "BLOCK_BYTES", 8192)
    api = FakeCuFile(most=most)
    with DeviceReader("cufile", CuFile(api), open_reader("buffered")) as reader:
        for record in layout.records.values():
            buffer = torch.zeros(record.nbytes + 5, dtype=torch.uint8)
            stat = reader.read(record, buffer)
            expected = layout.path.read_bytes()[record.offset :][: record.nbytes]
            assert bytes(buffer[: record.nbytes].numpy()) == expected
            assert not buffer[record.nbytes :].any()
            assert stat.nbytes == record.nbytes
        told = reader.describe()
        assert told["requested"] == "cufile"
        assert told["observed"] == "gds-p2pdma"
        assert told["counts"]["n_p2p_reads"] == told["reads"] == api.reads
    assert api.open == 0
    assert api.handles == {}
    assert reader.describe()["observed"] == "unknown"


def test_host_memory_is_read_by_the_host_reader(layout):
    record = next(iter(layout.records.values()))
    with DeviceReader("cufile", CuFile(FakeCuFile()), open_reader("buffered")) as reader:
        buffer = endor.storage.HostBuffer(record.nbytes)
        assert reader.read(record, buffer).nbytes == record.nbytes
        again = endor.storage.HostBuffer(record.nbytes)
        reader.wait(reader.submit(record, again))
        assert np.array_equal(buffer.array, again.array)
        assert reader.describe()["observed"] == "none"


@pytest.mark.parametrize(
    ("api", "error", "found"),
    [
        (FakeCuFile(result=None), BackendError, "cuda-bindings>=13.2"),
        (FakeCuFile(result=-5), ReadError, "cuFile error 5"),
        (FakeCuFile(result=-1), ReadError, "cuFile failed at offset"),
        (FakeCuFile(fail="register"), BackendError, "does not take the file: unsupported"),
    ],
)
def test_failures_are_errors(layout, api, error, found):
    record = next(iter(layout.records.values()))
    reader = DeviceReader("cufile", CuFile(api), open_reader("buffered"))
    with pytest.raises(error, match=found):
        reader.read(record, torch.zeros(record.nbytes, dtype=torch.uint8))
    reader.close()
    with pytest.raises(ReadError, match="closed"):
        reader.read(record, torch.zeros(record.nbytes, dtype=torch.uint8))


def test_a_truncated_file_is_named(layout):
    record = list(layout.records.values())[-1]
    os.truncate(layout.path, record.offset + 100)
    reader = DeviceReader("cufile", CuFile(FakeCuFile()), open_reader("buffered"))
    with pytest.raises(TruncatedError, match=r"the file ends at offset .* convert the file again"):
        reader.read(record, torch.zeros(record.nbytes, dtype=torch.uint8))
    reader.close()


def test_a_driver_that_does_not_open_is_an_error():
    with pytest.raises(BackendError, match="driver does not open: 5033"):
        CuFile(FakeCuFile(fail="driver"))


def test_without_statistics_the_path_is_unknown(layout):
    record = next(iter(layout.records.values()))
    with DeviceReader("cufile", CuFile(FakeCuFile(fail="stats")), open_reader("buffered")) as one:
        one.read(record, torch.zeros(record.nbytes, dtype=torch.uint8))
        assert one.describe()["observed"] == "unknown"
        assert one.describe()["reason"] == "cufile does not tell"


def test_the_observed_path_has_a_name():
    assert observed_path({"n_p2p_reads": 3}, 3) == "gds-p2pdma"
    assert observed_path({"n_nvfs_reads": 3}, 3) == "gds-nvfs"
    assert observed_path({"n_posix_reads": 3}, 3) == "cufile-compat"
    assert observed_path({"n_posix_reads": 1, "n_nvfs_reads": 2}, 3) == "mixed"
    assert observed_path({}, 3) == "unknown"
    assert observed_path({"n_p2p_reads": 3}, 0) == "none"


def test_the_probe_looks_for_the_module_list_first(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_MODULES", tmp_path / "absent")
    with pytest.raises(BackendError, match=r"absent does not exist.*reader='direct'"):
        open_device_reader("cufile", tmp_path / "file")


def child(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def test_the_probe_ends_whatever_the_child_does(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_MODULES", tmp_path)
    with pytest.raises(BackendError, match=r"did not end within 0\.3 s"):
        probe("cufile", tmp_path, seconds=0.3, command=child("while True: pass"))
    killed = child("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(BackendError, match=r"ended with code -9: no message"):
        probe("cufile", tmp_path, command=killed)
    with pytest.raises(BackendError, match=r"ended with code 1: ValueError: bad"):
        probe("cufile", tmp_path, command=child("raise ValueError('bad')"))
    refused = child("""print('{"error": "torch sees no CUDA device"}')""")
    with pytest.raises(BackendError, match="torch sees no CUDA device; use reader='direct'"):
        probe("cufile", tmp_path, command=refused)
    text = """print('noise'); print('{"observed": "gds-nvfs"}')"""
    assert probe("cufile", tmp_path, command=child(text)) == "gds-nvfs"


def test_the_child_says_why_it_cannot(monkeypatch, tmp_path, capsys):
    from endor.storage import cufile_probe

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["probe", "cufile", str(tmp_path)])
    cufile_probe.main()
    assert "sees no CUDA device" in capsys.readouterr().out


def test_wsl_and_other_names_are_refused(monkeypatch, tmp_path):
    version = tmp_path / "version"
    version.write_text("Linux version 5.15 (Microsoft@WSL2)")
    monkeypatch.setattr(module, "_MODULES", tmp_path)
    monkeypatch.setattr(module, "_VERSION", version)
    with pytest.raises(BackendError, match="not on WSL"):
        open_device_reader("cufile", tmp_path)
    with pytest.raises(ConfigError, match="'cufile' or 'kvikio', got 'gds'"):
        open_device_reader("gds", tmp_path)


class FakeKvikio:
    """`kvikio`: files whose reads are futures."""

    def __init__(self) -> None:
        self.open = 0

    def CuFile(self, path, flags: str) -> "FakeKvikio":
        assert flags == "r"
        self.path = path
        self.open += 1
        return self

    def pread(self, target, *, size: int, file_offset: int) -> SimpleNamespace:
        address, read_only = target.__cuda_array_interface__["data"]
        assert not read_only
        data = np.fromfile(self.path, np.uint8, size, offset=file_offset).tobytes()
        ctypes.memmove(address, data, len(data))
        return SimpleNamespace(get=lambda: len(data))

    def close(self) -> None:
        self.open -= 1


def test_kvikio_reads_records_too(layout, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 8192)
    api = FakeKvikio()
    with DeviceReader("kvikio", Kvikio(api), open_reader("buffered")) as reader:
        for record in layout.records.values():
            buffer = torch.zeros(record.nbytes, dtype=torch.uint8)
            reader.read(record, buffer)
            expected = layout.path.read_bytes()[record.offset :][: record.nbytes]
            assert bytes(buffer.numpy()) == expected
        assert reader.describe()["observed"] == "unknown"
    assert api.open == 0


def test_the_extras_are_named_when_nothing_is_installed(monkeypatch):
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(device_backends.importlib, "import_module", missing)
    with pytest.raises(BackendError, match=r"pip install 'endor-sparse\[gds\]'"):
        CuFile()
    with pytest.raises(BackendError, match=r"pip install 'endor-sparse\[kvikio\]'"):
        Kvikio()
