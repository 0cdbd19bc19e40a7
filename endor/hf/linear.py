"""A linear layer whose weight stays packed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from endor import kernels
from endor.hf.compiling import outside_graphs
from endor.hf.packed_layer import PackedLayer, refuse_write
from endor.hf.row_choice import RowChoice, chosen_product
from endor.offload.weight import Weight
from endor.packed import bits_of, plain_matrix

_HEAD_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = (torch.Tensor, nn.Parameter)


class EndorLinear(PackedLayer, nn.Linear):
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

    Attributes:
        choice: Says which rows of a product from the packed form are worth computing; None: all.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]
    choice: RowChoice | None

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
        self.hold((out_features, in_features), dtype)
        self.exact = exact
        self.choice = None
        self.register_parameter("bias", bias)

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
            found = (
                None if self.choice is None else chosen_product(self.choice, input, source, bias)
            )
            if found is None:
                found = fast_product(input, source)
                if found is not None and bias is not None:
                    found += bias
            if found is not None:
                return found.to(input.dtype).view(*input.shape[:-1], self.out_features)
        return F.linear(input, source.dense(), bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={self.weight_dtype}, packed"
        )


def pack_linear(model: nn.Module, name: str, dtype: torch.dtype, *, exact: bool) -> None:
    """Replace the linear layer `name` of a model by an `EndorLinear` with its bias."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = EndorLinear(old.in_features, old.out_features, old.bias, dtype, exact=exact)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


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
