"""What modules with packed weights have in common: an expanded weight, which refuses writes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from endor.errors import BackendError, ConfigError
from endor.offload.weight import Weight

_CPU = torch.device("cpu")


class PackedWeight(torch.Tensor):
    """An expanded weight that refuses to be written: a write would be lost, it is a copy.

    Adapter libraries merge into, and initialise from, `layer.weight.data`. What is computed from
    it is an ordinary tensor.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = kwargs.get("out")
        written = out if isinstance(out, tuple) else (out,)
        if _writes(func, args):
            written = (args[0], *written)
        if any(isinstance(item, cls) for item in written):
            refuse_write()
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            shared = (
                isinstance(found, torch.Tensor)
                and bool(args)
                and isinstance(args[0], cls)
                and found.untyped_storage()._cdata == args[0].untyped_storage()._cdata
            )
        # A view, or `.data`: what is written there is lost as well.
        return found.as_subclass(cls) if shared else found


def _writes(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether `func` changes its first argument, by torch's names."""
    name = getattr(func, "__name__", "")
    if func in _FREEZES and len(args) > 1 and args[1] is False:
        return False
    in_place = name.endswith("_") and not name.endswith("__")
    return bool(args) and (in_place or name in _WRITES)


_FREEZES = (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_WRITES = frozenset(
    f"__{name}__"
    for name in (
        *("set", "setitem", "iadd", "isub", "imul", "idiv", "itruediv", "ifloordiv", "imod"),
        *("ipow", "iand", "ior", "ixor", "ilshift", "irshift"),
    )
)


class PackedLayer(nn.Module):
    """Mixed into a module's class: its `weight` is expanded when it is asked for, and read-only."""

    weight_dtype: torch.dtype
    _weight_shape: tuple[int, ...]
    _source: Weight | None

    def hold(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Say what the weight will be, for callers."""
        self.__dict__.update(_weight_shape=tuple(shape), weight_dtype=dtype, _source=None)
        self._is_hf_initialized = True

    def bind(self, source: Weight) -> None:
        """Set where the weight comes from."""
        self._source = source

    @property
    def source(self) -> Weight:
        """Where the weight comes from.

        Raises:
            ConfigError: The layer was not bound to a packed checkpoint.
        """
        if self._source is None:
            raise ConfigError(
                "this layer has no weights: build the model with from_pretrained or "
                "endor.load_model, not from its config"
            )
        return self._source

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight in memory of its own, read-only: every access expands it again.

        While transformers builds the model it is an empty tensor on the meta device, marked as
        initialised: many an architecture's `_init_weights` looks at the weights of its children.
        """
        if self._source is None:
            return initialised(self._weight_shape, self.weight_dtype)
        return self._source.fresh().as_subclass(PackedWeight)

    @weight.setter
    def weight(self, value: Any) -> None:
        refuse_write()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            refuse_write()
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        refuse_packed_keys(state_dict, [f"{prefix}weight"])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        device = _CPU if self._source is None else self._source.device
        refuse_conversion(fn, self.weight_dtype, device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def initialised(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return what stands for a packed weight until it is bound: empty, marked as initialised."""
    empty = torch.empty(tuple(shape), dtype=dtype, device="meta")
    empty._is_hf_initialized = True  # type: ignore[attr-defined]
    return empty


def refuse_conversion(
    fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise when a conversion that `nn.Module.to` would apply changes dtype or device.

    Raises:
        ConfigError: It changes the dtype.
        BackendError: It moves to another device.
    """
    changed = fn(torch.empty(0, dtype=dtype, device=device))
    if changed.dtype != dtype:
        raise ConfigError(
            f"packed weights keep their dtype {dtype}, cannot become {changed.dtype}: load the "
            "model with from_pretrained(..., dtype=...) instead"
        )
    if changed.device != device:
        loaded = "the CPU" if device.type == "cpu" else device
        raise BackendError(
            f"packed weights were loaded for {loaded}, cannot move to {changed.device}: load the "
            "model for that device instead"
        )


def refuse_packed_keys(state_dict: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise when a state dict holds one of these packed weights, which would not be taken.

    Raises:
        ConfigError: It does.
    """
    for name in names:
        if name in state_dict:
            raise ConfigError(
                f"{name}: a state dict cannot set a packed weight; leave it out, or unpack the "
                "checkpoint (endor unpack) to change its weights"
            )


def refuse_write() -> NoReturn:
    """Raise: whatever would be written to a packed weight would be lost.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(
        "a packed weight cannot be replaced, tied, changed or merged into: unpack the checkpoint "
        "(endor unpack) and do it there; an adapter also works unmerged"
    )
