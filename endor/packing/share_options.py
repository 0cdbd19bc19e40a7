"""How a packing is called, as every process of a run of several is told: in JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endor.errors import ConfigError, EndorError
from endor.hub.names import hub_name
from endor.pruning.contract import METHODS, NOTHING, PruneOptions
from endor.quantization.contract import QuantizeOptions


def check_shareable(model: Path | str, call: Mapping[str, Any]) -> None:
    """Raise unless a model can be packed in shares with these options of `pack_checkpoint`.

    Raises:
        ConfigError: One of them needs to see the whole model, or workers cannot see it.
    """
    plain_options(call)
    same_everywhere(model, call)


def same_everywhere(model: Path | str, call: Mapping[str, Any]) -> str:
    """Return how every worker finds the model."""
    if hub_name(model) is None:
        return str(Path(model).absolute())
    if not call.get("stream"):
        raise ConfigError(
            f"{model}: workers share no cache of the Hub; add --stream, so that each fetches what "
            "it packs, or give a directory that all see"
        )
    return str(model)


def plain_options(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON values.

    Raises:
        ConfigError: One needs to see the whole model.
    """
    made = {key: value for key, value in call.items() if value not in (None, (), False)}
    prune, quantize = made.pop("prune", None), made.pop("quantize", None)
    if isinstance(prune, PruneOptions):
        made |= {"sparsity": prune.sparsity, "pattern": prune.pattern}
        prune = prune.method
    if prune not in (None, NOTHING.name):
        method = METHODS.get(prune) if isinstance(prune, str) else None
        if method is None or method.calibrated:
            raise ConfigError(
                "--shard packs lossless, with --prune magnitude or magnitude-row, and with --bits "
                "and --calibration none; what is calibrated goes from layer to layer in one process"
            )
        made["prune"] = prune
    if made.get("quality") is not None or (quantize is not None and call.get("calibrate", True)):
        raise ConfigError(
            "--shard with --bits needs --calibration none; what is calibrated goes from layer to "
            "layer in one process"
        )
    if isinstance(quantize, QuantizeOptions):
        if quantize != QuantizeOptions(bits=quantize.bits):
            raise ConfigError("--shard takes no more of --bits than the number")
        made |= {"bits": quantize.bits}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in made.items()}


def pack_call(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `pack_checkpoint` that `plain_options` wrote down.

    Raises:
        EndorError: They are none.
    """
    call = dict(made)
    bits = call.pop("bits", None)
    call.pop("calibrate", None)
    if bits is not None:
        call |= {"quantize": QuantizeOptions(bits=bits), "calibrate": False}
    if "model" not in call:
        raise EndorError("the share names no model; pack it again")
    return call
