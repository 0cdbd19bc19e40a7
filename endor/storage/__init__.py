"""Packed tensors in aligned records of a safetensors file."""

from endor.storage.buffers import HostBuffer
from endor.storage.layout import ALIGN, ArrayEntry, FileLayout, Record, TensorEntry
from endor.storage.temporary import remove_stale_temporaries
from endor.storage.writer import FileWriter, header_capacity, largest_spec

__all__ = [
    "ALIGN",
    "ArrayEntry",
    "FileLayout",
    "FileWriter",
    "HostBuffer",
    "Record",
    "TensorEntry",
    "header_capacity",
    "largest_spec",
    "remove_stale_temporaries",
]
