"""One call that loads a packed checkpoint as a transformers model."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from endor.checkpoint.index import read_packed_index
from endor.checkpoint.loadable import is_packed
from endor.checkpoint.located import located
from endor.dependencies import changed
from endor.errors import CheckpointError, ConfigError
from endor.hf.config import Loading, settled, spelled_out
from endor.models.empty import model_class
from endor.trust import one_line_errors, read_model_config

if TYPE_CHECKING:
    import torch


_log = logging.getLogger(__name__)


@spelled_out
def load_model(
    packed_dir: str | Path,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: "torch.dtype | str" = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **options: Unpack[Loading],
) -> Any:
    """Return the transformers model of a packed checkpoint, ready to generate.

    The same as `AutoModelForCausalLM.from_pretrained(packed_dir)`, with the model class that the
    checkpoint names.

    Args:
        packed_dir: Directory that `endor pack` wrote, or the id of such a model on the Hub.
        revision: A branch, tag or commit there.
        device: Where it runs: `"cpu"`, `"cuda"` or `"cuda:N"`.
        dtype: Element type to run in; packed weights are converted as they are expanded. `"auto"`
            is the checkpoint's own.
        attn_implementation: As in transformers.
        trust_remote_code: Run Python code that comes with the checkpoint, where its architecture
            is not one of transformers' own. Without, such a checkpoint is refused.
        options: Memory, arithmetic, what is planned for; see `endor.hf.Loading`.

    Returns:
        A `PreTrainedModel` in evaluation mode; `model.endor` is its store of packed weights,
        `model.endor_plan` what the planner decided and expects.

    Raises:
        ConfigError: The directory holds no packed checkpoint, or transformers does not take its
            config.
        CheckpointError: A file is missing.
        BackendError: The device cannot be used.
        BudgetError: `ram` or `vram` is too small; the message has the least that works.
        FormatError: The files are damaged.
    """
    from endor.hf.quantization_config import EndorConfig

    found = settled(options)
    if device == "cpu" and found["vram"] is not None:
        raise ConfigError("vram needs a device other than the CPU: pass device='cuda'")
    path = located(packed_dir, revision=revision)
    if not is_packed(path):
        raise ConfigError(
            f"{path}: config.json names no packed checkpoint; make one with `endor pack`"
        )
    read_packed_index(path)
    config = read_model_config(path, trust_remote_code=trust_remote_code)
    config.quantization_config = EndorConfig.from_dict(config.quantization_config)
    config.quantization_config.__dict__.update(found)
    with one_line_errors(path, "the model does not load"):
        model = model_class(config, trust_remote_code=trust_remote_code).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=trust_remote_code,
            **({"attn_implementation": attn_implementation} if attn_implementation else {}),
        )
    if getattr(model, "endor", None) is None:
        raise changed("transformers", "from_pretrained did not call Endor's quantizer")
    plan = getattr(model, "endor_plan", None)
    for tier, count in model.endor.count_tiers().items():
        _log.info("%s: %d units %s", path, count["units"], tier)
    if plan is not None:
        rate, bound = plan.decode_tokens_per_s, plan.decode.bound
        _log.info("%s: %.3g tokens/s expected, bound by the %s", path, rate, bound)
    return model


@spelled_out
def open_model(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: "torch.dtype | str" = "auto",
    trust_remote_code: bool = False,
    **options: Unpack[Loading],
) -> Any:
    """Return the model of a packed or of an ordinary checkpoint, its weights in place.

    Arguments and errors as for `load_model`; an ordinary checkpoint takes only `device` and
    `dtype`.

    Raises:
        ConfigError: An option needs a packed checkpoint.
        CheckpointError: There is no checkpoint.
    """
    import transformers

    path = located(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give a directory with config.json")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if is_packed(path):
        model = load_model(
            path, device=device, dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
        model.endor.preload()
        return model
    found = settled(options)
    asked = found["vram"] or found["ram"] or found["kv"] in ("ram", "disk")
    if asked or not found["exact"] or found["experts"] == "lossy":  # as predict, which is not exact
        raise ConfigError(
            f"{path} is an ordinary checkpoint: vram, ram, kv, fast products, lossy experts need "
            "a packed one"
        )
    read_model_config(path, trust_remote_code=trust_remote_code)
    with one_line_errors(path, "the model does not load"):
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code
        ).to(device)
