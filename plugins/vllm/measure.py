"""Tokens a second and memory of vLLM on a packed checkpoint beside the dense one, in one run.

python plugins/vllm/measure.py DENSE PACKED [--tokens 64] [--rounds 3] [--threads N]

Each of three ways (dense; packed, expanded for each product; packed, few rows multiplied as they
lie) is a process of its own that loads once and then waits: rounds go over the three in turn, so
that what else the machine does meets all of them. A figure is the best round's. Memory is what
the weights of the model take, and what the process holds after loading, caches included. On a
machine that does other things, one thread is the fairest: OpenMP's threads wait for each other.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAYS: dict[str, dict[str, object]] = {
    "dense": {},
    "packed, expanded": {"load_format": "endor"},
    "packed, multiplied": {
        "load_format": "endor",
        "model_loader_extra_config": {"exact": False},
    },
}
BATCHES = (1, 8)
PROMPT = list(range(100, 132))


def resident_bytes() -> int:
    """Return the process's resident memory, without what the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def serve(model: str, options: str, tokens: int) -> None:
    """Load, say what is held, then time a batch for each number read from standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        max_model_len=512,
        max_num_seqs=max(BATCHES),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        disable_log_stats=True,
        **json.loads(options),
    )
    held = {"resident_bytes": resident_bytes(), "weight_bytes": weight_bytes(llm)}
    print(json.dumps(held), file=answers, flush=True)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for line in sys.stdin:
        prompts = [{"prompt_token_ids": [row, *PROMPT]} for row in range(int(line))]
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        spent = time.perf_counter() - start
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps(made / spent), file=answers, flush=True)


def weight_bytes(llm: Any) -> int:
    """Return what the model's weights take; a dense layer's too, whose parameter vLLM empties."""

    def count(model: Any) -> int:
        from vllm.model_executor.layers.linear import LinearBase

        total = sum(p.numel() * p.element_size() for p in model.parameters())
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, LinearBase) and weight is not None and not weight.numel():
                rows, cols = sum(module.output_partition_sizes), module.input_size_per_partition
                total += rows * cols * weight.element_size()
        return int(total)

    return int(llm.apply_model(count)[0])


def start(
    model: str, options: dict[str, object], tokens: int, threads: int
) -> subprocess.Popen[str]:
    """Return a process that serves, once it has loaded."""
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "ENDOR_THREADS": str(threads),
    }
    command = [sys.executable, __file__, "--serve", model, json.dumps(options), str(tokens)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def ask(process: subprocess.Popen[str], question: str | None) -> object:
    """Return the answer of a serving process to `question`, or what it says by itself."""
    assert process.stdin is not None
    assert process.stdout is not None
    if question is not None:
        process.stdin.write(question + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a run of vLLM ended with exit code {process.wait()}; see above")
    return json.loads(line)


def cpu_name() -> str:
    """Return what the CPU calls itself, and how many of it there are."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense")
    parser.add_argument("packed")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    paths = {way: arguments.packed if options else arguments.dense for way, options in WAYS.items()}
    tokens, threads = arguments.tokens, arguments.threads
    processes = {way: start(paths[way], WAYS[way], tokens, threads) for way in WAYS}
    try:
        held = {way: ask(process, None) for way, process in processes.items()}
        best = {way: dict.fromkeys(BATCHES, 0.0) for way in WAYS}
        for _ in range(arguments.rounds + 1):  # the first one warms up
            for batch in BATCHES:
                for way, process in processes.items():
                    rate = ask(process, str(batch))
                    best[way][batch] = max(best[way][batch], float(rate))  # type: ignore[arg-type]
    finally:
        for process in processes.values():
            process.kill()
    print(f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}; vLLM eager, bfloat16")
    print(f"{tokens} tokens after {len(PROMPT) + 1}, best of {arguments.rounds} rounds")
    columns = " | ".join(f"tokens/s, batch {batch}" for batch in BATCHES)
    print(f"| | weights, MB | resident after loading, MB | {columns} |")
    print("|---|" + "---:|" * (2 + len(BATCHES)))
    for way in WAYS:
        memory = held[way]
        assert isinstance(memory, dict)
        rates = " | ".join(f"{best[way][batch]:.1f}" for batch in BATCHES)
        sizes = (memory["weight_bytes"] / 1e6, memory["resident_bytes"] / 1e6)
        print(f"| {way} | {sizes[0]:.0f} | {sizes[1]:.0f} | {rates} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
