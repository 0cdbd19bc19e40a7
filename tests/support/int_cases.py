"""Tensors in codec `int` of every kind that the GPU kernel tells apart."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from endor.codecs import DTYPES, DType, Encoded, integer


def codes_of(rng: np.random.Generator, shape: tuple[int, ...], spread: float) -> np.ndarray:
    """Codes as a uniform grid gives them, a few of them far out."""
    codes = np.rint(rng.laplace(0, spread, shape)).astype(np.int32)
    far = rng.random(shape) < 0.0005
    return np.where(far, rng.integers(-(1 << 24), 1 << 24, shape, dtype=np.int32), codes)


def steps_of(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return integer.round_steps(
        0.01 * np.exp(rng.standard_normal(shape)) * rng.choice([-1, 1], shape)
    )


def cases(rng: np.random.Generator) -> Iterator[tuple[str, Encoded]]:
    """Names and tensors."""
    bf16 = DTYPES["BF16"]

    def make(
        shape: tuple[int, ...],
        steps: Any,
        dtype: DType = bf16,
        spread: float = 2.0,
        block: Any = None,
    ) -> Encoded:
        return integer.encode(codes_of(rng, shape, spread), steps, dtype, block=block)

    for name, spread in (("narrow", 0.3), ("usual", 2.0), ("wide", 40.0), ("low bits", 300.0)):
        rows = 70 if name == "usual" else 9
        yield f"{name} codes", make((rows, 1000), steps_of(rng, (1000,)), spread=spread)
    for name in ("BF16", "F16", "F32"):
        yield f"into {name}", make((9, 900), steps_of(rng, (900,)), DTYPES[name], 5.0)
    odd = steps_of(rng, (96,))
    yield "steps in bf16", make((9, 96), 2.0**-100 * np.where(np.arange(96) % 2, 1.0, 2.0**80))
    yield "steps in fp32", make((9, 96), odd * np.float32(1.0000001) + np.float32(1e-9))
    yield "a step a row", make((60, 130), steps_of(rng, (60, 1)))
    yield "one step", make((9, 777), 0.03)
    yield "one step of a vector", make((40001,), 0.03)
    yield "groups of 128", make((17, 512), steps_of(rng, (17, 4)))
    yield "groups of 8", make((17, 512), steps_of(rng, (17, 64)))
    yield "blocks of 33 by 40", make((90, 90), steps_of(rng, (3, 3)), block=(33, 40))
    yield "blocks of rows", make((90, 40), steps_of(rng, (3, 40)), block=(33, 1))
    yield "fewer columns than lanes", make((999, 7), steps_of(rng, (7,)))
    yield "one column", make((5000, 1), steps_of(rng, (5000, 1)))
    yield "steps far below 1", make((9, 64), 2.0**-120 * (1 + np.arange(64) / 1024))
    yield (
        "steps far below 1 in groups",
        make((9, 64), 2.0**-126 * np.arange(1, 19).reshape(9, 2)),
    )
    yield "steps far above 1", make((9, 64), 2.0**110 * (1 + np.arange(64) / 1024))
    yield "a step of 0", make((9, 64), np.arange(64) / 64.0)
    for numel in (1, 31, 32, 33, 255, 257, 32768, 32769, 65536):
        yield f"{numel} elements", make((1, numel), 0.25)
    yield "3-D", make((3, 9, 333), steps_of(rng, (333,)))
    two = rng.integers(0, 2, (9, 1000))
    yield (
        "hardly a word",
        integer.encode((rng.random((9, 1000)) < 1e-3).astype(np.int32), 0.1, bf16),
    )
    yield "two codes", integer.encode(two, 0.1, bf16)
    for name, count in (("BF16", 16), ("F16", 2), ("F32", 256)):
        levels = rng.permutation(np.linspace(-1, 1, count)).astype(np.float32)
        levels[0] = -0.0
        codes = np.minimum(rng.geometric(0.2, (17, 512)) - 1, count - 1).astype(np.uint8)
        steps = steps_of(rng, (17, 16))
        yield f"{count} levels", integer.encode(codes, steps, DTYPES[name], levels=levels)
    yield "words for all", integer.encode(rng.integers(-128, 128, (9, 1000)), 0.1, bf16)
