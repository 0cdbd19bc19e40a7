"""Runs vLLM on checkpoints in a process of its own: `driver.py` reads jobs, prints what came out.

Standard input: a JSON list of {"model", "options", "prompts", "tokens"}, and "prefetch" to have
decoder layers offloaded. The last line of standard output: a list of {"tokens", "expansions",
"products", "packed_bytes", "layers", "kept_views", "prefetch"}, or {"error"}.
"""

import gc
import json
import os
import sys
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.offloader import set_offloader

    from endor.kernels import native
    from endor_vllm import op

    last = max(op.matrices(), default=-1)
    offloader = prefetching() if job.get("prefetch") else None
    options = {"enforce_eager": True, "dtype": "bfloat16"} | job["options"]
    try:
        llm = LLM(
            job["model"], max_model_len=128, max_num_seqs=3, skip_tokenizer_init=True, **options
        )
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        del error
        gc.collect()
        cleanup_dist_env_and_memory()
        return {"error": said}
    if offloader is not None:
        offloader.post_init()  # vLLM's runner for GPUs does
    sampling = SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    matrices = [matrix for number, matrix in op.matrices().items() if number > last]
    gc.collect()
    result = {
        "kept_views": len(native._views),
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "layers": len(matrices),
        "expansions": sum(matrix.expansions for matrix in matrices),
        "products": sum(matrix.products for matrix in matrices),
        "packed_bytes": sum(matrix.placement.nbytes for matrix in matrices),
    }
    if offloader is not None:
        result["prefetch"] = offloader.summary()
    del llm, matrices
    set_offloader(None)
    cleanup_dist_env_and_memory()
    return result


def prefetching() -> Any:
    """Have the next model offloaded, and return by what."""
    from prefetching import SynchronousOffloader
    from vllm.v1.worker import gpu_model_runner

    offloader = SynchronousOffloader()
    create = gpu_model_runner.create_offloader

    def once(config: Any) -> Any:
        gpu_model_runner.create_offloader = create
        return offloader

    gpu_model_runner.create_offloader = once
    return offloader


def main() -> None:
    os.environ.update(SETTINGS)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    results = [run(job) for job in json.load(sys.stdin)]
    print(json.dumps(results), file=answers, flush=True)


if __name__ == "__main__":
    main()
