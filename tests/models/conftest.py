"""The small packed models of `tests/hf`."""

from ..hf.conftest import _no_measurements, _one_thread, make_pair

__all__ = ["_no_measurements", "_one_thread", "make_pair"]
