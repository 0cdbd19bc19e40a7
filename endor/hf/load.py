"""One call that loads a packed checkpoint as a transformers model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from endor.errors import CheckpointError, ConfigError
from endor.hf.model import is_packed

if TYPE_CHECKING:
    import torch

    from endor.offload import Placement
    from endor.offload.kv_plan import KVSetting


def load_model(
    packed_dir: str | Path,
    *,
    device: str = "cpu",
    ram: int | str | None = None,
    vram: int | str | None = None,
    exact: bool = True,
    dtype: "torch.dtype | str" = "auto",
    verify: bool = True,
    reader: str = "auto",
    threads: int = 2,
    placement: "Placement | None" = None,
    attn_implementation: str | None = None,
    context: int = 1024,
    prompt: int = 128,
    batch: int = 1,
    measure: bool = False,
    kv: "KVSetting" = "auto",
) -> Any:
    """Return the transformers model of a packed checkpoint, ready to generate.

    The same as `AutoModelForCausalLM.from_pretrained(packed_dir)`, with the model class that the
    checkpoint names.

    Args:
        packed_dir: Directory that `endor pack` wrote.
        device: Where it runs: `"cpu"`, `"cuda"` or `"cuda:N"`.
        ram: Host memory for the model, such as `"8GiB"`: on the CPU for weights, the cache of
            `context` tokens and scratch. What does not fit is read from disk for every token. None
            takes what the machine has.
        vram: Device memory for the same, with a CUDA device: what does not fit stays packed in
            page-locked RAM as far as `ram` goes. None takes nine tenths of what is free.
        exact: Give the bits of the unpacked model; see `EndorConfig`.
        dtype: Element type to run in; packed weights are converted as they are expanded. `"auto"`
            is the checkpoint's own.
        verify: Check every record when it is first read.
        reader: `"auto"`, `"direct"` or `"buffered"`.
        threads: Reads in flight.
        placement: A tier per unit, instead of the planner's choice.
        attn_implementation: As in transformers.
        context: Tokens that the cache is planned for, prompt included.
        prompt: Tokens of each prompt that is planned for.
        batch: Sequences at once that are planned for.
        measure: Measure machine and disk first, unless that was done before.
        kv: Where `generate` keeps keys and values: `"device"` (where the model computes), `"ram"`
            (host memory beside a device), `"disk"`, or `"auto"`: the first where the planned
            context fits.

    Returns:
        A `PreTrainedModel` in evaluation mode; `model.endor` is its store of packed weights,
        `model.endor_plan` what the planner decided and expects.

    Raises:
        ConfigError: The directory holds no packed checkpoint.
        BackendError: The device cannot be used.
        BudgetError: `ram` or `vram` is too small; the message has the least that works.
        FormatError: The files are damaged.
    """
    import transformers

    from endor.hf.quantizer import EndorConfig

    path = Path(packed_dir)
    if device == "cpu" and vram is not None:
        raise ConfigError("vram needs a device other than the CPU: pass device='cuda'")
    if not is_packed(path):
        raise ConfigError(
            f"{path}: config.json names no packed checkpoint; make one with `endor pack`"
        )
    options = EndorConfig(
        ram,
        exact,
        verify,
        reader,
        threads,
        placement,
        vram=vram,
        context=context,
        prompt=prompt,
        batch=batch,
        measure=measure,
        kv=kv,
    )
    config = transformers.AutoConfig.from_pretrained(path)
    config.quantization_config = {
        **config.quantization_config,
        **options.get_loading_attributes(),
    }
    return _model_class(transformers, config).from_pretrained(
        path,
        config=config,
        dtype=dtype,
        device_map={"": device},
        **({"attn_implementation": attn_implementation} if attn_implementation else {}),
    )


def open_model(
    path: str | Path,
    *,
    device: str = "cpu",
    ram: int | str | None = None,
    vram: int | str | None = None,
    exact: bool = True,
    dtype: "torch.dtype | str" = "auto",
    context: int = 1024,
    prompt: int = 128,
    measure: bool = False,
    kv: "KVSetting" = "auto",
) -> Any:
    """Return the model of a packed or of an ordinary checkpoint, its weights in place.

    Arguments and errors as for `load_model`; an ordinary checkpoint takes only `device` and
    `dtype`.

    Raises:
        ConfigError: An option needs a packed checkpoint.
        CheckpointError: There is no checkpoint.
    """
    import transformers

    if not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give a directory with config.json")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if is_packed(Path(path)):
        model = load_model(
            path,
            device=device,
            vram=vram,
            ram=ram,
            exact=exact,
            dtype=dtype,
            context=context,
            prompt=prompt,
            measure=measure,
            kv=kv,
        )
        model.endor.preload()
        return model
    if vram or ram or not exact or kv in ("ram", "disk"):
        raise ConfigError(
            f"{path} is an ordinary checkpoint: vram, ram, kv and fast products need a packed one"
        )
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)


def _model_class(transformers: Any, config: Any) -> Any:
    """Return the class that a config names, or the automatic one for causal language models."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM
