"""A linear layer whose weight stays packed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from endor import kernels
from endor.errors import BackendError, ConfigError
from endor.hf.compiling import outside_graphs
from endor.offload.store import Weight
from endor.packed import bits_of, plain_matrix

_CPU = torch.device("cpu")
_HEAD_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = (torch.Tensor, nn.Parameter)


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


class EndorLinear(nn.Linear):
    """`nn.Linear` without a weight parameter: the store expands the weight when it is needed.

    It is a subclass for those who look for linear layers, such as the adapters of PEFT. There is
    nothing to initialise, tie, move or save, so transformers loads and places the model as if the
    weight did not exist. With `exact` the result has the bits of `nn.Linear` on the unpacked
    weight. Without it, up to eight rows may be multiplied straight from the packed form, and many
    rows in float32, whichever is fastest here: sums of another order.

    Gradients flow to the input and the bias; the weight has none, and cannot be written.

    Args:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        bias: Its bias, or None.
        dtype: Element type that the weight has for callers.
        exact: See above.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        *,
        exact: bool = True,
    ) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would allocate a weight
        self.in_features = in_features
        self.out_features = out_features
        self.weight_dtype = dtype
        self.exact = exact
        self.register_parameter("bias", bias)
        self._source: Weight | None = None
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
            raise unbound()
        return self._source

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight in memory of its own, read-only: every access expands it again.

        While transformers builds the model it is an empty tensor on the meta device, marked as
        initialised: many an architecture's `_init_weights` looks at the weights of its children.
        """
        if self._source is None:
            return initialised((self.out_features, self.in_features), self.weight_dtype)
        return self.source.fresh().as_subclass(PackedWeight)

    @weight.setter
    def weight(self, value: Any) -> None:
        refuse_write()

    def reset_parameters(self) -> None:
        """Refuse: there is no weight to draw anew.

        Raises:
            ConfigError: Always.
        """
        refuse_write()

    @outside_graphs
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        source = self._source or self.source
        bias = self.bias
        if torch.is_grad_enabled() and (
            input.requires_grad or (bias is not None and bias.requires_grad)
        ):
            out: torch.Tensor = _Linear.apply(input, bias, source)  # type: ignore[no-untyped-call]
            return out
        if not self.exact and input.dtype == self.weight_dtype:
            found = fast_product(input, source)
            if found is not None:
                if bias is not None:
                    found += bias
                return found.to(input.dtype).view(*input.shape[:-1], self.out_features)
        return F.linear(input, source.dense(), bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={self.weight_dtype}, packed"
        )

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


class FastHead(nn.Linear):
    """An output head that is not packed, which multiplies few rows by Endor's own product.

    Torch's product of one row is far from the speed of memory where the CPU only emulates the
    weight's type. Sums in float32 in an order of their own. It is a linear layer otherwise: its
    weight may be tied, replaced, trained and saved, since nothing of it is kept between products.
    """

    product_rows: int

    @staticmethod
    def adopt(module: nn.Module | None, rows: int) -> None:
        """Have `module`, when it is a plain `nn.Linear`, multiply up to `rows` rows that way."""
        if rows and type(module) is nn.Linear:
            module.__class__ = FastHead
            module.product_rows = rows  # type: ignore[assignment]

    @outside_graphs
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self._applies(input):
            return super().forward(input)
        x = input.detach().reshape(-1, self.in_features).contiguous()
        out = torch.empty((x.shape[0], self.out_features), dtype=torch.float32)
        kernels.matvec(plain_matrix(self.weight), bits_of(x), out.numpy())
        if self.bias is not None:
            out += self.bias
        return out.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def _applies(self, input: torch.Tensor) -> bool:
        weight = self.weight
        tensors = [input, weight] if self.bias is None else [input, weight, self.bias]
        return (
            0 < input.numel() <= self.product_rows * self.in_features
            and input.shape[-1] == self.in_features
            and input.dtype == weight.dtype in _HEAD_DTYPES
            and weight.is_contiguous()
            and weight.shape == (self.out_features, self.in_features)
            and all(type(each) in _PLAIN and each.device.type == "cpu" for each in tensors)
            and not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))
            and not torch.is_autocast_enabled("cpu")
        )


def fast_product(input: torch.Tensor, source: Weight, *, hold: bool = False) -> torch.Tensor | None:
    """Return `input` times the weight as the plan says, float32 `(rows, out_features)`.

    None when torch's own product with the expanded weight is the way to take.
    """
    cols = source.shape[1]
    rows = input.numel() // cols
    if 0 < rows <= source.product_rows:
        return source.product(input.reshape(-1, cols).contiguous(), hold=hold)
    if rows >= source.wide_rows:
        return source.wide(input.reshape(-1, cols), hold=hold)
    return None


class _Linear(torch.autograd.Function):
    """`F.linear` that expands the weight again for the gradient, since its scratch is reused."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, bias: torch.Tensor | None, source: Weight
    ) -> torch.Tensor:
        ctx.source = source
        return F.linear(input, source.dense(), bias)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        to_input = grad @ ctx.source.dense() if ctx.needs_input_grad[0] else None
        to_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return to_input, to_bias, None


def unbound() -> ConfigError:
    """Return the error of a layer that was built without a packed checkpoint."""
    return ConfigError(
        "this layer has no weights: build the model with from_pretrained or endor.load_model, not "
        "from its config"
    )


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
