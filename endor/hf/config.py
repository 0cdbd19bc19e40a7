"""How a packed checkpoint is loaded: every option once, with its meaning, its default, its check.

`endor.load_model`, `EndorConfig` and the command line take their options from here. Importable
without torch and transformers.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from endor.errors import ConfigError
from endor.sizes import parse_bytes

if TYPE_CHECKING:
    from endor.planning.beside import HostCompute
    from endor.planning.kv import KVSetting
    from endor.planning.plan import Workload
    from endor.planning.tiers import Placement
    from endor.planning.workload import Experts

METHOD = "endor"
"""What a packed checkpoint's `quantization_config` calls its method."""

Function = TypeVar("Function", bound=Callable[..., Any])


class Loading(TypedDict, total=False):
    """The options.

    Attributes:
        ram: Host memory for weights, such as `"8GiB"`; on the CPU also for scratch, activations and
            the cache of the planned context. None takes what the machine has. What does not fit
            is read from disk for every token. Wins over the `"cpu"` of `max_memory`.
        vram: Memory of each CUDA device for the model, where it runs on one: unpacked parameters,
            packed weights, slots, scratch, activations and the cache of the planned context; what
            does not fit stays packed in page-locked RAM as far as `ram` goes. None takes nine
            tenths of what is free. Wins over `max_memory`.
        exact: Give the bits that the unpacked model gives. False multiplies up to eight rows
            straight from the packed form, faster and with float32 sums in another order.
        host_compute: Whether the processor multiplies weights in RAM while a CUDA device is the
            model's: `"on"`, `"off"`, or `"auto"`, where that is predicted to be faster. Up to eight
            rows, and never with `exact`: `"on"` is then refused.
        experts: `"lossy"` lets experts that are not at hand (in VRAM; in memory, where experts are
            read from disk) be replaced by others that are, for up to eight tokens: faster, and no
            longer what the model computes.
        predict: Multiply only those rows of first matrices of feed-forward blocks whose neurons
            the checkpoint's predictors name, for up to eight tokens on the processor: faster, and
            no longer what the model computes. Never with `exact`.
        kv: Where `generate` keeps keys and values: `"device"` (where the model computes), `"ram"`
            (host memory beside a device), `"disk"`, or `"auto"`: the first where the planned
            context fits.
        context: Tokens that the cache is planned for, prompt included.
        prompt: Tokens of each prompt that is planned for.
        batch: Sequences at once that are planned for.
        placement: A tier per unit, instead of the planner's choice.
        measure: Measure this machine and its disk, once, to place weights by; without, what is
            remembered of it, or typical constants.
        verify: Check every record's checksum whenever it is read, and its structure the first time.
        reader: `"auto"`, `"direct"` (past the page cache) or `"buffered"`.
        threads: Reads in flight, 1 to 256.
    """

    ram: int | str | None
    vram: int | str | None
    exact: bool
    host_compute: "HostCompute"
    experts: "Experts"
    predict: bool
    kv: "KVSetting"
    context: int
    prompt: int
    batch: int
    placement: "Placement | None"
    measure: bool
    verify: bool
    reader: str
    threads: int


DEFAULTS: Loading = {
    "ram": None,
    "vram": None,
    "exact": True,
    "host_compute": "auto",
    "experts": "exact",
    "predict": False,
    "kv": "auto",
    "context": 1024,
    "prompt": 128,
    "batch": 1,
    "placement": None,
    "measure": False,
    "verify": True,
    "reader": "auto",
    "threads": 2,
}

OPTIONS = tuple(DEFAULTS)

_COUNTS: tuple[Literal["context", "prompt", "batch"], ...] = ("context", "prompt", "batch")


def settled(options: Mapping[str, Any]) -> Loading:
    """Return all options: `options`, sizes as bytes, and the defaults of the others.

    Raises:
        ConfigError: There is no such option, or one makes no sense.
    """
    from endor.kernels.dispatch import check_threads
    from endor.planning.beside import check_host_compute
    from endor.planning.kv import check_kv
    from endor.planning.tiers import Placement
    from endor.planning.workload import check_experts, check_predict

    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ConfigError(
            f"{unknown[0]}: is no option of loading; there are {', '.join(sorted(OPTIONS))}"
        )
    found: Loading = {**DEFAULTS, **options}  # type: ignore[typeddict-item]
    ram, vram = found["ram"], found["vram"]
    found["ram"] = None if ram is None else parse_bytes(ram, "ram")
    found["vram"] = None if vram is None else parse_bytes(vram, "vram")
    check_threads(found["threads"])
    check_kv(found["kv"])
    check_host_compute(found["host_compute"], exact=found["exact"])
    check_experts(found["experts"])
    check_predict(found["predict"], exact=found["exact"])
    placement = found["placement"]
    if placement is not None and not isinstance(placement, Placement):
        raise ConfigError(f"placement: must be a Placement, got {type(placement).__name__}")
    for name in _COUNTS:
        value = found[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r:.40}")
    return found


def workload(options: Loading) -> "Workload":
    """Return what the model is to be planned for."""
    from endor.planning.plan import Workload

    found = settled(options)
    context = found["context"]
    return Workload(
        batch=found["batch"],
        prompt=min(found["prompt"], context),
        context=context,
        product="exact" if found["exact"] else "direct",
        kv=found["kv"],
        host_compute=found["host_compute"],
        experts=found["experts"],
        predict=found["predict"],
    )


def spelled_out(function: Function) -> Function:
    """Show the options one by one in the signature of a function that takes `**options`."""
    given = inspect.signature(function)
    kept = [item for item in given.parameters.values() if item.kind is not item.VAR_KEYWORD]
    kinds = Loading.__annotations__
    options = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kinds[name]
        )
        for name, value in DEFAULTS.items()
    ]
    function.__signature__ = given.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
    return function
