"""Conversion holds a few tensors, never a checkpoint."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest

MIB = 1 << 20
ROWS, COLS, LAYERS = 8192, 4096, 32
CHILD = """
import sys
from pathlib import Path
import endor
endor.pack_checkpoint(sys.argv[1], sys.argv[2], prune=sys.argv[3])
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
print("torch" in sys.modules)
"""


def write_two_gigabytes(path):
    """Write 32 matrices of 64 MiB whose bits repeat, by hand and quickly."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(16 * MIB // 4, dtype=np.float32)
    block = (weights.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    header = {}
    for layer in range(LAYERS):
        start = layer * 2 * ROWS * COLS
        header[f"model.layers.{layer}.mlp.up_proj.weight"] = {
            "dtype": "BF16",
            "shape": [ROWS, COLS],
            "data_offsets": [start, start + 2 * ROWS * COLS],
        }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(LAYERS * 2 * ROWS * COLS // len(block)):
            file.write(block)


@pytest.mark.slow
def test_peak_memory_of_a_two_gigabyte_checkpoint(tmp_path):
    model = tmp_path / "model.safetensors"
    write_two_gigabytes(model)
    assert model.stat().st_size > 2**31
    largest = 2 * ROWS * COLS
    for prune in ("none", "magnitude"):
        out = tmp_path / prune
        command = [sys.executable, "-c", CHILD, str(model), str(out), prune]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        kib, torch_loaded = result.stdout.split()
        assert int(kib) * 1024 <= 3 * largest + 300 * 10**6
        assert torch_loaded == "False"
        assert sum(path.stat().st_size for path in out.glob("*.safetensors")) > 2**29
