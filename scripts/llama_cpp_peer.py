"""Tokens a second of llama.cpp on a dense Llama checkpoint, for docs/benchmarks/offload.md.

    python scripts/llama_cpp_peer.py DENSE WORK --types Q3_K_M Q4_K_M --memory 0.5GiB

Writes DENSE as a GGUF file into WORK, quantises it by llama.cpp's own quantiser (the package
llama-cpp-python) and decodes greedily. With `--memory` each type also runs in a control group that
leaves it so much memory, its mapped file included: what llama.cpp does where a model does not fit.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from endor.sizes import parse_bytes

CGROUP = Path("/sys/fs/cgroup")
OLD = CGROUP / "memory"
"""Where version 1 of control groups has memory."""
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a Llama's tensor."""
    parent = name.removesuffix(".weight")
    if parent in OUTSIDE:
        return f"{OUTSIDE[parent]}.weight"
    _, _, index, inside = parent.split(".", 3)
    return f"blk.{index}.{LAYER[inside]}.weight"


def write_gguf(model: Path, out: Path) -> None:
    """Write a Llama without its tokenizer: prompts are numbers of tokens.

    Rows of q and k are not permuted as llama.cpp's rotary embedding wants them: speed does not
    depend on it, and nothing else is measured.
    """
    import gguf
    import torch

    from endor.checkpoint.open import open_source

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    source = open_source(model)
    for name, tensor in source.tensors.items():
        raw = np.empty(tensor.nbytes, dtype=np.uint8)
        source.read_into(name, raw)
        values = torch.from_numpy(raw).view(torch.bfloat16).reshape(tensor.shape)
        matrix = len(tensor.shape) > 1
        writer.add_tensor(gguf_name(name), (values.half() if matrix else values.float()).numpy())
    source.close()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(path: Path, out: Path, kind: str) -> None:
    """Quantise a GGUF file by llama.cpp's own quantiser."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = os.cpu_count() or 1
    if llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), params):
        raise SystemExit(f"{out}: llama.cpp could not quantise {path}")


def decode(path: Path, tokens: int, threads: int) -> dict[str, Any]:
    """Return seconds of each decoded token, after a prompt of 16."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    model.eval(list(range(3, 19)))
    seconds = []
    for turn in range(tokens):
        begin = time.perf_counter()
        model.eval([turn + 20])
        seconds.append(time.perf_counter() - begin)
    return {"file_bytes": path.stat().st_size, "seconds": sorted(seconds)}


def in_group(arguments: list[str], limit: int | None) -> dict[str, Any] | None:
    """Run this script again, in a control group of `limit` bytes, and return what it prints.

    None where the kernel ended it, since that is not enough memory.
    """
    group = (OLD if OLD.is_dir() else CGROUP) / "endor-llama-cpp"
    if limit is not None:
        group.mkdir(exist_ok=True)
        name = "memory.limit_in_bytes" if OLD.is_dir() else "memory.max"
        (group / name).write_text(str(limit))

    def enter() -> None:
        if limit is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter, check=False)
    if done.returncode == -signal.SIGKILL and limit is not None:
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def drop(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def main() -> None:
    """Write, quantise, measure, print a line a type."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q3_K_M", "Q4_K_M"])
    parser.add_argument("--memory", type=parse_bytes)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--one", type=Path, help="Only decode with this GGUF file.")
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(decode(chosen.one, chosen.tokens, chosen.threads)))
        return
    chosen.work.mkdir(parents=True, exist_ok=True)
    whole = chosen.work / "f16.gguf"
    for kind in chosen.types:
        path = chosen.work / f"{kind}.gguf"
        if not path.exists():
            if not whole.exists():
                write_gguf(chosen.dense, whole)
            quantize(whole, path, kind)
        for limit in (None, chosen.memory)[: 2 if chosen.memory else 1]:
            if limit:
                drop(path)
            arguments = [str(chosen.dense), str(chosen.work), "--one", str(path)]
            arguments += ["--tokens", str(chosen.tokens), "--threads", str(chosen.threads)]
            found = in_group(arguments, limit)
            where = f"{limit / 1e9:.2f} GB of memory" if limit else "all in memory"
            if found is None:
                print(f"{kind}: {where}: killed, it needs more", flush=True)
                continue
            middle = found["seconds"][len(found["seconds"]) // 2]
            print(
                f"{kind}: {found['file_bytes'] / 1e9:.2f} GB, {where}: {middle:.3f} s a token "
                f"({1 / middle:.2f} tokens/s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
