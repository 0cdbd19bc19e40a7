"""Which tensors of a checkpoint are packed, by name and shape."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

from endor.checkpoint.sources.contract import SourceTensor
from endor.errors import ConfigError

MIN_SIZE = 64
"""Smallest rows and columns that are packed by default."""

_EXCLUDED_MODULES = frozenset({"gate", "router", "wg", "wte", "wpe", "lm_head", "score"})
_EXCLUDED_WORDS = ("embed", "norm", "position", "router", "relative_attention_bias")


def is_linear(tensor: SourceTensor) -> bool:
    """Whether the default policy packs `tensor`.

    It takes the matrices of repeated layers, at least 64 by 64: `*.weight` under a numbered module,
    two-dimensional or a stack of them, and all stacks of experts. Embeddings, heads, norms and
    routers stay as they are.
    """
    if not tensor.dtype.packable or len(tensor.shape) < 2 or min(tensor.shape[-2:]) < MIN_SIZE:
        return False
    parts = tensor.name.split(".")
    if not any(part.isdecimal() for part in parts[:-1]):
        return False
    if len(tensor.shape) == 3 and "experts" in parts:
        return True
    if len(tensor.shape) not in (2, 3) or parts[-1] != "weight":
        return False
    module = parts[-2]
    if len(tensor.shape) == 3 and "conv" in module:
        return False
    return module not in _EXCLUDED_MODULES and not any(word in module for word in _EXCLUDED_WORDS)


def matcher(pattern: str) -> Callable[[str], bool]:
    """Return a test of tensor names for a glob, or for a regular expression after `re:`.

    A pattern may name a tensor (`*.mlp.*.weight`) or its module (`*.down_proj`); a regular
    expression may match anywhere in the name.

    Raises:
        ConfigError: the expression does not compile.
    """
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r}: not a regular expression: {error}") from None
        return lambda name: expression.search(name) is not None
    glob = re.compile(fnmatch.translate(pattern))
    return lambda name: bool(glob.match(name) or glob.match(name.removesuffix(".weight")))


def select(
    tensors: Iterable[SourceTensor], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> frozenset[str]:
    """Return the names of the tensors to pack.

    Args:
        tensors: The checkpoint's.
        include: Patterns of tensors to pack besides the default ones.
        exclude: Patterns of tensors to leave as they are; wins over the rest.

    Raises:
        ConfigError: a pattern matches no tensor, or `include` asks for a dtype that has no codec.
    """
    tensors = list(tensors)
    chosen = {tensor.name for tensor in tensors if is_linear(tensor)}
    for pattern in include:
        found = _matching(pattern, tensors, "include")
        for tensor in found:
            if not tensor.dtype.packable:
                raise ConfigError(
                    f"include {pattern!r}: {tensor.name} is {tensor.dtype.name}, which is stored "
                    "dense only; narrow the pattern"
                )
        chosen.update(tensor.name for tensor in found)
    for pattern in exclude:
        chosen.difference_update(tensor.name for tensor in _matching(pattern, tensors, "exclude"))
    return frozenset(chosen)


def _matching(pattern: str, tensors: list[SourceTensor], option: str) -> list[SourceTensor]:
    matches = matcher(pattern)
    found = [tensor for tensor in tensors if matches(tensor.name)]
    if not found:
        example = next((tensor.name for tensor in tensors if is_linear(tensor)), "")
        hint = f", such as {example}" if example else ""
        raise ConfigError(
            f"{option} {pattern!r}: matches none of {len(tensors)} tensors; give names as the "
            f"checkpoint has them{hint}"
        )
    return found
