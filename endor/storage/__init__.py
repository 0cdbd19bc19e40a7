"""Packed tensors in aligned records of a safetensors file."""

from typing import TYPE_CHECKING, Any

from endor.storage.buffers import HostBuffer
from endor.storage.check import CheckedRecord, bind_checked, check_bytes, check_record
from endor.storage.layout import ALIGN, ArrayEntry, FileLayout, Record, TensorEntry, align_up
from endor.storage.readers import RecordReader, open_reader
from endor.storage.source import ReaderKind, ReadStat, Ticket
from endor.storage.temporary import TemporaryFile, remove_stale_temporaries, sync_directory
from endor.storage.verify import check_stream, read_records, verify_file
from endor.storage.writer import FileWriter, RecordWriter, header_capacity, largest_spec

if TYPE_CHECKING:
    from endor.storage.file import load_file, safe_open, save_file

__all__ = [
    "ALIGN",
    "ArrayEntry",
    "CheckedRecord",
    "FileLayout",
    "FileWriter",
    "HostBuffer",
    "ReadStat",
    "ReaderKind",
    "Record",
    "RecordReader",
    "RecordWriter",
    "TemporaryFile",
    "TensorEntry",
    "Ticket",
    "align_up",
    "bind_checked",
    "check_bytes",
    "check_record",
    "check_stream",
    "header_capacity",
    "largest_spec",
    "load_file",
    "open_reader",
    "read_records",
    "remove_stale_temporaries",
    "safe_open",
    "save_file",
    "sync_directory",
    "verify_file",
]


def __getattr__(name: str) -> Any:
    """Import the torch interface on first use: everything else works without it."""
    if name in ("load_file", "safe_open", "save_file"):
        from endor.storage import file

        return getattr(file, name)
    raise AttributeError(f"module 'endor.storage' has no attribute {name!r}")
