"""Quality against bits a weight, every method on the same statistics: docs/benchmarks/quality.md.

    python scripts/quality_bench.py MODEL OUT.jsonl --rows ecq:3.5 gptq:4:64 --texts FILE:WINDOWS

Rows: `ecq:BITS`; `rtn:BITS` (entropy-coded, no calibration); `gptq:BITS:GROUP`, a plain GPTQ with
symmetric integers and a float16 scale for each group of inputs, its scale searched;
`hqq:BITS:GROUP`, half-quadratic quantisation (Badri and Shaji, 2023), not calibrated; `gguf:TYPE`,
a type of the gguf package; `llama:TYPE`, the same by llama.cpp's own quantiser with an importance
matrix (the library that llama-cpp-python ships; rows are filled up to whole blocks of 256 with
zeros, which are not counted as bits); `dense`; `dir:PATH:BITS`, a checkpoint made elsewhere. Statistics are
those of the dense model on the calibration windows (kept in --statistics, made when missing), so
that rows differ in nothing but the method. The model is in memory: for small ones. A record a row
is appended to OUT.jsonl; rows that are there are skipped.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

SCALES = [0.5 + 0.05 * step for step in range(11)]
"""Shares of the largest magnitude that plain GPTQ tries as a group's end of scale."""

Quantizer = Callable[[str, torch.Tensor, torch.Tensor], tuple[torch.Tensor, float]]
"""From a name, a weight and its Gram matrix to new values and bits a weight."""


def matrices(model: Any) -> dict[str, nn.Linear]:
    """Return the linear layers of the decoder layers by name."""
    return {
        name: module
        for name, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear)
    }


def statistics(model: Any, model_dir: Path, samples: int, path: Path) -> dict[str, torch.Tensor]:
    """Return mean x xᵀ of each matrix's inputs; q, k, v and gate, up share one."""
    if path.exists():
        return dict(torch.load(path))
    from endor.pruning import PruneOptions
    from endor.pruning.calibration import calibration_windows

    ids = calibration_windows(model_dir, PruneOptions(samples=samples))
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0].reshape(-1, args[0].shape[-1])
            found = inputs.T @ inputs / ids.numel()
            sums[name] = sums[name] + found if name in sums else found

        return hook

    leaders = [name for name in matrices(model) if shared(name) == name]
    handles = [matrices(model)[name].register_forward_pre_hook(watch(name)) for name in leaders]
    with torch.no_grad():
        for window in ids.split(4):
            model.model(window, use_cache=False)
    for handle in handles:
        handle.remove()
    torch.save(sums, path)
    return sums


def shared(name: str) -> str:
    """Return the matrix whose inputs the matrix `name` shares."""
    for mine, theirs in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
        name = name.replace(mine, theirs)
    return name


def ecq(bits: float) -> Quantizer:
    """Return Endor's own quantiser."""
    from endor.quantization.ecq import Ecq

    def quantize(name: str, weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, float]:
        coded = Ecq(weight, gram, dtype=torch.bfloat16).fit(bits, tolerance=0.02)
        return coded.values, coded.bits

    return quantize


def rounded(bits: float) -> Quantizer:
    """Return Endor's rounding without calibration."""
    from endor.codecs.integer import size_bits
    from endor.codecs.rounding import round_to_bits

    def quantize(name: str, weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, float]:
        codes, step = round_to_bits(weight.numpy(), bits)
        return torch.from_numpy(codes * step), size_bits(codes, step)

    return quantize


def gptq(bits: int, group: int) -> Quantizer:
    """Return plain GPTQ (arXiv 2210.17323)."""
    top = 2 ** (bits - 1) - 1

    def scale_of(part: torch.Tensor, worth: torch.Tensor) -> torch.Tensor:
        peak = part.abs().amax(1, keepdim=True).clamp_min(1e-8)
        best, least = peak, torch.full_like(peak, torch.inf)
        for share in SCALES:
            scale = (peak * share / top).half().float().clamp_min(6e-8)
            values = (part / scale).round().clamp(-top, top) * scale
            error = ((values - part).square() * worth).sum(1, keepdim=True)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        return best

    def quantize(name: str, weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, float]:
        gram = gram.clone()
        dead = gram.diagonal() == 0
        gram.diagonal()[dead] = 1.0
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        factor = torch.linalg.cholesky(inverse, upper=True)
        work, out = weight.clone(), torch.empty_like(weight)
        for start in range(0, weight.shape[1], group):
            stop = min(start + group, weight.shape[1])
            diagonal = factor.diagonal()[start:stop]
            scale = scale_of(work[:, start:stop], 1 / diagonal.square())[:, 0]
            errors = torch.empty_like(work[:, start:stop])
            for at in range(start, stop):
                column = work[:, at]
                out[:, at] = (column / scale).round().clamp(-top, top) * scale
                errors[:, at - start] = (column - out[:, at]) / factor[at, at]
                work[:, at + 1 : stop] -= errors[:, at - start, None] * factor[at, at + 1 : stop]
            work[:, stop:] -= errors @ factor[start:stop, stop:]
        return out.bfloat16().float(), bits + 16 / group

    return quantize


def hqq(bits: int, group: int) -> Quantizer:
    """Return half-quadratic quantisation: a float16 scale and zero a group, the zero refined."""
    top, power = 2**bits - 1, 0.7

    def quantize(name: str, weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, float]:
        part = weight.reshape(-1, group)
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        scale = (top / (high - low).clamp_min(1e-8)).clamp_max(2e4)
        zero = -low * scale
        beta, least, best = 10.0, torch.inf, zero
        for _ in range(20):
            codes = (part * scale + zero).round().clamp(0, top)
            error = part - (codes - zero) / scale
            mean = float(error.abs().mean())
            if mean >= least:
                break
            least, best = mean, zero
            kept = (error.abs() - error.abs().clamp_min(1e-8).pow(power - 1) / beta).clamp_min(0)
            zero = (codes - (part - error.sign() * kept) * scale).mean(1, keepdim=True)
            beta *= 1.01
        step, zero = (1 / scale).half().float(), best.half().float()
        codes = (part / step + zero).round().clamp(0, top)
        return ((codes - zero) * step).reshape_as(weight).bfloat16().float(), bits + 32 / group

    return quantize


def gguf(kind: str) -> Quantizer:
    """Return a type of llama.cpp's files, by the gguf package's own quantiser."""
    from gguf import GGMLQuantizationType, quants
    from gguf.constants import GGML_QUANT_SIZES

    chosen = GGMLQuantizationType[kind]
    block, nbytes = GGML_QUANT_SIZES[chosen]

    def quantize(name: str, weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, float]:
        values = quants.dequantize(quants.quantize(weight.numpy(), chosen), chosen)
        return torch.from_numpy(values.copy()), 8 * nbytes / block

    return quantize


def llama(kind: str) -> Quantizer:
    """Return a type of llama.cpp's files, by its own quantiser: mean squared inputs as weights."""
    import ctypes
    from importlib.util import find_spec

    from gguf import GGMLQuantizationType, quants
    from gguf.constants import GGML_QUANT_SIZES

    found = find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise SystemExit("llama: needs the package llama-cpp-python")
    library = ctypes.CDLL(str(Path(found.origin).parent / "lib" / "libggml-base.so"))
    chosen = GGMLQuantizationType[kind]
    block, nbytes = GGML_QUANT_SIZES[chosen]
    library.ggml_quantize_init(ctypes.c_int(chosen))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def quantize(name: str, weight: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, float]:
        rows, cols = weight.shape
        padded = -(-cols // block) * block
        values = torch.zeros(rows, padded)
        values[:, :cols] = weight
        worth = torch.zeros(padded)
        worth[:cols] = gram.diagonal()
        packed = torch.empty(rows, padded // block * nbytes, dtype=torch.uint8)
        size = library.ggml_quantize_chunk(
            ctypes.c_int(chosen),
            ctypes.c_void_p(values.data_ptr()),
            ctypes.c_void_p(packed.data_ptr()),
            ctypes.c_int64(0),
            ctypes.c_int64(rows),
            ctypes.c_int64(padded),
            ctypes.c_void_p(worth.data_ptr()),
        )
        if size != packed.numel():
            raise SystemExit(f"llama:{kind}: wrote {size} of {packed.numel()} bytes for {name}")
        out = quants.dequantize(packed.numpy(), chosen)[:, :cols]
        return torch.from_numpy(out.copy()), 8 * nbytes / block

    return quantize


def quantizer_of(row: str) -> Quantizer:
    """Return the method that `row` names."""
    kind, *words = row.split(":")
    if kind == "ecq":
        return ecq(float(words[0]))
    if kind == "rtn":
        return rounded(float(words[0]))
    if kind == "gptq":
        return gptq(int(words[0]), int(words[1]))
    if kind == "hqq":
        return hqq(int(words[0]), int(words[1]))
    if kind == "gguf":
        return gguf(words[0])
    if kind == "llama":
        return llama(words[0])
    raise SystemExit(f"unknown row {row!r}")


def apply(model: Any, row: str, grams: dict[str, torch.Tensor]) -> dict[str, float]:
    """Quantise all matrices of `model` in place; return bits, relative error, seconds."""
    quantize = quantizer_of(row)
    began = time.perf_counter()
    bits = weights = 0.0
    logs = []
    for name, module in matrices(model).items():
        weight, gram = module.weight.data, grams[shared(name)]
        values, each = quantize(name, weight, gram)
        change = values - weight
        error = float(((change @ gram) * change).sum() / ((weight @ gram) * weight).sum())
        logs.append(torch.tensor(error).log())
        module.weight.data.copy_(values)
        bits += each * weight.numel()
        weights += weight.numel()
    return {
        "bits": bits / weights,
        "error": float(torch.stack(logs).mean().exp()),
        "seconds": round(time.perf_counter() - began, 1),
    }


class Remembered:
    """The dense model, run once for each window; its logits are kept in float16."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = model.device
        self._logits: dict[bytes, torch.Tensor] = {}

    def __call__(self, input_ids: torch.Tensor, *, use_cache: bool) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in self._logits:
            self._logits[key] = self.model(input_ids=input_ids, use_cache=use_cache).logits.half()
        return argparse.Namespace(logits=self._logits[key].float())


def measure(
    row: str, chosen: argparse.Namespace, load: Callable[[Path], Any], dense: Remembered
) -> dict[str, Any]:
    """Return the record of one row."""
    from transformers import AutoTokenizer

    from endor.bench.quality.perplexity import agreement, tokenize

    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    if row.startswith("dir:"):
        _, path, bits = row.split(":")
        model, record = load(Path(path)), {"bits": float(bits)}
    else:
        model, record = load(chosen.model), {"bits": 16.0}
        if row != "dense":
            grams = statistics(dense.model, chosen.model, chosen.samples, chosen.statistics)
            record = apply(model, row, grams)
    out: dict[str, Any] = {"row": row, **record}
    for text in chosen.texts:
        path, _, windows = text.rpartition(":")
        tokens = tokenize(Path(path).read_text(encoding="utf-8"), tokenizer)
        found = agreement(model, dense, tokens, window=chosen.window, max_windows=int(windows))
        out[Path(path).stem] = {
            "perplexity": found.model.perplexity,
            "kl": found.kl,
            "kl_stderr": found.kl_stderr,
            "top1": found.top1,
            "nats_more": found.nll_difference,
            "nats_more_stderr": found.nll_difference_stderr,
            "windows": found.model.windows,
            "window_nll": [round(value, 5) for value in found.model.window_nll],
        }
    return out


def plot(records: list[dict[str, Any]], text: str, path: Path) -> None:
    """Draw perplexity on `text` against bits, a line through the rows of each method."""
    from endor.bench.plot import Point, quality

    records = sorted(records, key=lambda one: -one[text]["perplexity"])
    points = [
        Point(one["row"], one["bits"], one[text]["perplexity"], one["row"].split(":")[0])
        for one in records
        if one["row"] != "dense"
    ]
    quality(points, path, title=f"{text}: {records[0][text]['windows']} windows")


def main() -> None:
    """Measure what OUT.jsonl does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--texts", nargs="+", required=True, help="FILE:WINDOWS")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--statistics", type=Path, default=Path("statistics.pt"))
    parser.add_argument("--plot", type=Path, help="picture to draw at the end (.svg, .png, .pdf)")
    chosen = parser.parse_args()
    from transformers import AutoModelForCausalLM

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    have = []
    if chosen.out.exists():
        have = [json.loads(line) for line in chosen.out.read_text().splitlines()]
    done = {record["row"] for record in have}
    dense = Remembered(load(chosen.model))
    for row in chosen.rows:
        if row not in done:
            with torch.no_grad():
                record = measure(row, chosen, load, dense)
            with chosen.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            have.append(record)
    if chosen.plot:
        plot(have, Path(chosen.texts[0].rpartition(":")[0]).stem, chosen.plot)


if __name__ == "__main__":
    main()
