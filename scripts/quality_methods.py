"""Quantisers that docs/benchmarks/quality.md compares, each on a weight and a Gram matrix.

`ecq:BITS` is Endor's own; `rtn:BITS` Endor's rounding, entropy-coded, not calibrated. The others
are plain implementations of what is published, or the libraries' own:

- `gptq:BITS:GROUP`  symmetric integers, a float16 scale for each group of inputs, searched
- `hqq:BITS:GROUP`   half-quadratic quantisation (Badri and Shaji, 2023); not calibrated
- `gguf:TYPE`        a type of the gguf package
- `llama:TYPE`       the same by llama.cpp's own quantiser with an importance matrix (the library
                     that llama-cpp-python ships); rows are filled up to whole blocks of 256 with
                     zeros, which are not counted as bits
"""

from collections.abc import Callable
from pathlib import Path

import torch

Quantizer = Callable[[str, torch.Tensor, torch.Tensor], tuple[torch.Tensor, float]]
"""From a name, a weight and its Gram matrix to new values and bits a weight."""

SCALES = [0.5 + 0.05 * step for step in range(11)]
"""Shares of the largest magnitude that plain GPTQ tries as a group's end of scale."""


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
