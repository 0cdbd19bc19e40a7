"""A transformers model without weights, whose decoder layers are filled one at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from endor.checkpoint.sources.contract import CheckpointSource
from endor.errors import CheckpointError, PruningError, ShapeError
from endor.models.mapping import map_parameters
from endor.models.pieces import Pieces, is_whole
from endor.packed import tensor_of
from endor.pruning.activations import batches
from endor.pruning.causal import causal_model, decoder_layers
from endor.pruning.heap import map_large_blocks, return_memory


@dataclass(frozen=True, slots=True)
class Call:
    """What the model passes to one decoder layer besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    singly: bool = False
    """Whether what is passed is for one window and does not broadcast over several."""

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Return the layer's hidden states `(windows, tokens, features)`."""
        if self.singly and len(hidden) > 1:
            return torch.cat([self.run(layer, window) for window in torch.split(hidden, 1)])
        out = layer(hidden, *self.args, **self.kwargs)
        return cast(torch.Tensor, out[0] if isinstance(out, tuple) else out)

    def broadcasts(self, layer: nn.Module, hidden: torch.Tensor) -> bool:
        """Whether two windows at once give what one window gives, `hidden` being that one."""
        one = self.run(layer, hidden)
        try:
            two = self.run(layer, hidden.expand(2, *hidden.shape[1:]))
        except Exception:  # whatever the layer's code says to another number of windows
            return False
        return two.shape[1:] == one.shape[1:] and torch.allclose(two, one, rtol=1e-3, atol=1e-5)


class _StopForward(Exception):
    """What was wanted from a forward has been seen."""


class Skeleton:
    """The model of a checkpoint on the meta device; its layers compute in float32.

    Args:
        source: The checkpoint, with config.json beside it.
        device: Where layers are computed.
        trust_remote_code: Run Python code that comes with the checkpoint.

    Raises:
        CheckpointError: There is no config.json, or it does not fit the weights.
        PruningError: transformers has no causal language model for it, or no decoder layers are
            found in it.
        BackendError: transformers or accelerate is not installed.
    """

    def __init__(
        self, source: CheckpointSource, device: torch.device, *, trust_remote_code: bool = False
    ) -> None:
        map_large_blocks()
        self._source = source
        self._device = device
        self._model = causal_model(source, trust_remote_code=trust_remote_code)
        self._prefix, self.layers = decoder_layers(self._model)
        self._rest: tuple[Any, ...] | None = None  # returned besides, where layers return tuples
        self.shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
        try:
            self._mapped = map_parameters(self._model, self.shapes)
        except ShapeError as error:
            raise CheckpointError(str(error)) from None
        for name in self._mapped.otherwise:
            if name.startswith(f"{self._prefix}."):
                raise self._made_otherwise(name)

    def pieces(self, layer: int) -> dict[str, Pieces]:
        """Return the pieces of each parameter of a layer, by its name inside the layer."""
        prefix = f"{self._prefix}.{layer}."
        return {
            name.removeprefix(prefix): pieces
            for name, pieces in self._mapped.pieces.items()
            if name.startswith(prefix)
        }

    def load_layer(self, layer: int) -> nn.Module:
        """Fill a layer from the checkpoint, float32 on the device, and return it."""
        module = self.layers[layer]
        self._fill(module, f"{self._prefix}.{layer}.", "")
        return module

    def drop_layer(self, layer: int) -> None:
        """Give up the weights of a layer."""
        _drop(self.layers[layer], "")
        return_memory()

    def trace(
        self, ids: torch.Tensor, batch: int, sink: Callable[[int, torch.Tensor], None]
    ) -> list[Call]:
        """Embed all windows, and return what each layer is called with besides.

        Runs the model's own forward with every layer replaced by an identity, so that masks and
        rotary tables are those that the model itself gives to each layer: they differ between
        layers with and without a sliding window. What is recorded comes from one window and
        serves for all of them, since none has padding; other tokens are tried to be sure.

        Args:
            ids: int64 `(windows, tokens)`.
            batch: Windows at a time.
            sink: Takes the number of the first window, and the first layer's input.

        Raises:
            PruningError: Layers are called in a way that one window's arguments do not serve for.
        """
        body = cast(nn.Module, self._model.base_model)
        layers_at = self._prefix.removeprefix(f"{self._model.base_model_prefix}.") + "."
        body_at = "" if body is self._model else f"{self._model.base_model_prefix}."
        self._fill(body, body_at, layers_at)
        try:
            with torch.no_grad():
                # The first layer alone, for real: what it returns is what the stand-ins return.
                hidden, call = self._record(body, ids[:1], [0])[0]
                layer = self.load_layer(0)
                returned = layer(hidden, *call.args, **call.kwargs)
                self._rest = returned[1:] if isinstance(returned, tuple) else None
                self._check_shape(hidden, returned)
                singly = not call.broadcasts(layer, hidden)
                self.drop_layer(0)
                found = self._record(body, ids[:1], range(len(self.layers)))
                self._check_same(
                    found, self._record(body, ids[:1].flip(1), range(len(self.layers)))
                )
                for start, stop in batches(len(ids), batch):
                    sink(start, self._record(body, ids[start:stop], [0])[0][0])
        finally:
            _drop(body, layers_at)
            return_memory()
        return [replace(call, singly=singly) for _, call in found]

    def _check_shape(self, hidden: torch.Tensor, returned: Any) -> None:
        out = returned[0] if isinstance(returned, tuple) else returned
        if hidden.dim() != 3 or not isinstance(out, torch.Tensor) or out.shape != hidden.shape:
            raise self._refusal("its layers do not pass on one state for each token")

    def _check_same(
        self, one: "list[tuple[torch.Tensor, Call]]", other: "list[tuple[torch.Tensor, Call]]"
    ) -> None:
        """Raise where other tokens give a layer other arguments: one window's serve for all."""
        for (_, first), (_, second) in zip(one, other, strict=True):
            name = _difference(first.kwargs, second.kwargs) or _difference(
                dict(enumerate(first.args, 1)), dict(enumerate(second.args, 1))
            )
            if name:
                raise self._refusal(
                    f"besides the hidden states its layers are given what depends on the tokens, "
                    f"as argument {name}"
                )

    def _refusal(self, why: str) -> PruningError:
        return PruningError(
            f"{type(self._model).__name__}: cannot be run layer by layer ({why}); prune with "
            "magnitude"
        )

    def _tied(self, name: str) -> Pieces | None:
        """Return the pieces of a stored parameter that shares its weight with `name`."""
        tied: Mapping[str, str] = getattr(self._model, "all_tied_weights_keys", None) or {}
        root = tied.get(name, name)
        group = [root, *(target for target, source in tied.items() if source == root)]
        stored = self._mapped.pieces
        return next((stored[other] for other in group if name in group and other in stored), None)

    def _missing(self, name: str) -> CheckpointError | PruningError:
        """Return why a parameter has no value: the checkpoint may be that of another class."""
        kind, config = type(self._model).__name__, self._source.config() or {}
        saved = config.get("architectures")
        saved = [str(each) for each in saved] if isinstance(saved, list) else []
        if saved and kind not in saved:
            return PruningError(
                f"{self._source.path}: was saved from {saved[0]}, not from {kind}, the language "
                f"model that calibrated pruning runs, whose {name} it does not name; prune with "
                "magnitude"
            )
        return CheckpointError(
            f"{self._source.path}: lacks {name}, which {kind} needs; is the checkpoint complete?"
        )

    def _made_otherwise(self, name: str) -> PruningError:
        return PruningError(
            f"{name}: {self._mapped.otherwise[name]}, which calibrated pruning cannot undo; prune "
            "with magnitude"
        )

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Yield a function from ids and the last layer's output to logits; `trace` was run before.

        What follows the layers is in memory meanwhile: the model's own forward runs with every
        layer replaced by one that returns the given output.

        Raises:
            PruningError: A parameter outside the layers has no value in the checkpoint.
        """
        model, layers_at = self._model, f"{self._prefix}."
        self._fill(model, "", layers_at, optional=True)
        model.tie_weights()
        missing = [
            name
            for name, value in model.named_parameters()
            if value.is_meta and not name.startswith(layers_at)
        ]
        if missing:
            raise PruningError(
                f"{self._source.path}: lacks {missing[0]}, which {type(model).__name__} needs to "
                "predict tokens; give --bits"
            )

        def logits(ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
            def stand_in(*_args: Any, **_kwargs: Any) -> Any:
                return hidden if self._rest is None else (hidden, *self._rest)

            with _replaced_forwards(self.layers, stand_in), torch.no_grad():
                out = model(input_ids=ids.to(self._device), use_cache=False)
            return cast(torch.Tensor, out.logits.float())

        try:
            yield logits
        finally:
            _drop(model, layers_at)
            return_memory()

    def _record(
        self, body: nn.Module, ids: torch.Tensor, wanted: "range | list[int]"
    ) -> list[tuple[torch.Tensor, Call]]:
        """Return input and call of the first `len(wanted)` layers in one forward."""
        found: list[tuple[torch.Tensor, Call]] = []

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            found.append((hidden, Call(tuple(args[1:]), kwargs)))
            if len(found) == len(wanted):
                raise _StopForward
            return hidden if self._rest is None else (hidden, *self._rest)

        with _replaced_forwards(self.layers, stand_in):
            try:
                body(input_ids=ids.to(self._device), use_cache=False)
            except _StopForward:
                return found
        raise self._refusal(f"it calls {len(found)} of {len(self.layers)} layers")

    def _fill(self, module: nn.Module, prefix: str, skip: str, *, optional: bool = False) -> None:
        """Give every parameter and stored buffer of `module` its value, but those under `skip`.

        With `optional` a parameter that is not stored, as a tied one, is left alone.
        """
        for name, value in list(module.named_parameters()) + list(module.named_buffers()):
            if skip and name.startswith(skip):
                continue
            owner = module.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            pieces = self._mapped.pieces.get(prefix + name)
            if leaf in owner._buffers:
                filled = value if pieces is None else self._read(pieces, value)
                owner._buffers[leaf] = filled.to(self._device)
                continue
            if prefix + name in self._mapped.otherwise:
                raise self._made_otherwise(prefix + name)
            if pieces is None and optional:
                continue
            pieces = pieces or self._tied(prefix + name)
            if pieces is None:
                raise self._missing(prefix + name)
            table = isinstance(owner, nn.Embedding)
            loaded = self._read(pieces, value, keep_dtype=table).to(self._device)
            setattr(owner, leaf, nn.Parameter(loaded, requires_grad=False))

    def _read(
        self, pieces: Pieces, like: torch.Tensor, *, keep_dtype: bool = False
    ) -> torch.Tensor:
        """Return a tensor of the shape of `like`, put together from its pieces."""
        if is_whole(pieces, like.shape, self.shapes):
            stored = self._stored(pieces[0].name)
            return stored if keep_dtype else stored.to(torch.float32)
        out = torch.empty(like.shape, dtype=torch.float32)
        last, stored = "", out
        for piece in pieces:
            if piece.name != last:
                stored, last = self._stored(piece.name), piece.name
            piece.view(out).copy_(piece.stored(stored))
        return out

    def _stored(self, name: str) -> torch.Tensor:
        tensor = self._source.tensors[name]
        raw = np.empty(tensor.nbytes, dtype=np.uint8)
        self._source.read_into(name, raw)
        return tensor_of(raw.view(tensor.dtype.uint).reshape(tensor.shape), tensor.dtype)


def _difference(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> str | None:
    """Return the first key below which the two hold tensors of other values."""
    return next((str(key) for key in one if _differ(one[key], other.get(key))), None)


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return not isinstance(other, torch.Tensor) or not torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and _difference(one, other) is not None
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return any(map(_differ, one, other))
    return False


@contextmanager
def _replaced_forwards(layers: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _drop(module: nn.Module, skip: str) -> None:
    """Give up the parameters of `module` but those under `skip`; buffers stay."""
    for name, value in list(module.named_parameters()):
        if not (skip and name.startswith(skip)):
            owner = module.get_submodule(name.rpartition(".")[0])
            empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
            setattr(owner, name.rpartition(".")[2], nn.Parameter(empty, requires_grad=False))
