"""Calibrated pruning and quantisation of one decoder layer after another, in the memory of one.

A layer is loaded, sees the calibration windows as the pruned layers before it left them, gives up
the statistics of its inputs, is pruned, and passes the windows on. Only one layer, its statistics
and the hidden states exist at a time.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import nn

from endor import machine
from endor.checkpoint.sources.contract import CheckpointSource
from endor.codecs.integer import size_bits
from endor.dtypes import torch_dtype
from endor.pruning.activations import Activations, batches
from endor.pruning.allocation import layer_sparsities, outlier_share
from endor.pruning.calibration import calibration_and_held_out
from endor.pruning.coding import LayerCoder, check_codable, codes_of, steps_of
from endor.pruning.contract import (
    METHODS,
    NOTHING,
    LayerPruner,
    LayerQuantizer,
    Progress,
    PruneOptions,
)
from endor.pruning.devices import torch_device
from endor.pruning.divergence import divergence
from endor.pruning.estimate import Teller
from endor.pruning.finetune import Schedule, autocast, finetune
from endor.pruning.finished import FinishedLayers, fingerprint
from endor.pruning.heap import reused_blocks
from endor.pruning.layer import LayerMatrices
from endor.pruning.passes import batch_windows, embedded
from endor.pruning.renewed import renewed
from endor.pruning.sensitivity import probe
from endor.pruning.skeleton import Call, Skeleton
from endor.pruning.statistics import collect


class LayerStream:
    """Prunes the layers of a checkpoint in order.

    Args:
        source: The dense checkpoint.
        options: Method, sparsity, calibration.
        selected: Checkpoint names of the tensors to prune.
        scratch: An existing folder for hidden states and finished layers.
        progress: See `Progress`.
        quantizer: Turns the matrices of each layer, pruned or not, into codes.
        held_out: Windows beyond those of the calibration, on which `divergence` is measured.

    Raises:
        PruningError: The model cannot be run layer by layer.
        ConfigError: The calibration text is too short.
        BackendError: A library or device is missing.
    """

    def __init__(
        self,
        source: CheckpointSource,
        options: PruneOptions,
        selected: frozenset[str],
        scratch: Path,
        progress: Progress | None = None,
        quantizer: LayerQuantizer | None = None,
        held_out: int = 0,
    ) -> None:
        self._quantizer = quantizer
        self._options = options
        self._scratch = scratch
        self._device = torch_device(options.device)
        self._skeleton = Skeleton(source, self._device, trust_remote_code=options.trust_remote_code)
        self._source = source
        self._method = METHODS.get(options.method, NOTHING)
        assert self._method.calibrated or quantizer, "only calibrated methods are streamed"
        self._solver: LayerPruner | None = None
        if self._method.calibrated:
            self._solver = cast(LayerPruner, self._method.create(options))
        # Statistics without re-training afterwards were always of float32 forwards.
        self._compute = (
            machine.compute_dtype(self._device) if self._method.finetune else torch.float32
        )
        # `left`: a tower for images, say; calibrated by text, the language model is renewed.
        self._names, self.left = renewed(self._skeleton, source, options, selected)
        for index in range(self.layers):
            matrices = self._matrices(index)  # what cannot be renewed is refused before any work
            if quantizer is not None:
                check_codable(matrices)
        ids, self._held_ids = calibration_and_held_out(source.directory, options, held_out)
        self.windows, self._tokens = ids.shape
        self._batch = batch_windows(self._tokens)
        identity = "" if quantizer is None else quantizer.identity
        self.fingerprint = fingerprint(options, source.fingerprint(), ids, self._names, identity)
        self._finished = FinishedLayers(scratch, self.fingerprint)
        self._ids = ids
        self._hidden, self._calls = self._embed(ids)
        self._dense = self._embed(ids)[0] if self._method.finetune else None
        # Hidden states of the held-out windows, behind renewed and behind dense layers.
        self._held = [self._embed(self._held_ids)[0] for _ in range(2 if held_out else 0)]
        self._sparsity = layer_sparsities(options, self.layers, self._outliers)
        self._teller = Teller(self.layers, progress)
        self.done = 0
        self.errors: dict[str, float] = {}
        if quantizer is not None:
            shapes = {name: source.tensors[name].numel for name in self._names}
            quantizer.begin(shapes)
        if self._device.type == "cpu":  # what a device computes is not known
            sizes = [source.tensors[name].shape for name in self._names]
            tokens = self.windows * self._tokens
            self._teller.announce(sizes, tokens, options, self._method, quantizer)

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return len(self._skeleton.layers)

    def layer_of(self, name: str) -> int | None:
        """Return the layer that prunes checkpoint tensor `name`; None when none does."""
        return self._names.get(name)

    def next_layer(self) -> dict[str, torch.Tensor]:
        """Renew the next layer and return its tensors by checkpoint name, on the CPU.

        Of a quantised tensor NAME there are also `codes_of(NAME)` and `steps_of(NAME)`.
        """
        index = self.done
        layer = self._skeleton.load_layer(index)
        matrices = self._matrices(index)
        kept = self._restored(index)
        coded: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            if self._held:
                self._advance(layer, index, self._held[1])
            if kept is None:
                self._prune(index, layer, matrices)
                if self._quantizer is not None:
                    coded = self._quantize(index, layer, matrices, self._quantizer)
            else:
                if self._dense is not None:
                    self._advance(layer, index, self._dense)
                matrices.load(kept)
            self._advance(layer, index, self._hidden)
            if self._held:
                self._advance(layer, index, self._held[0])
        pruned = kept or coded | {
            name: tensor.to(self._dtype(name)).cpu().contiguous()
            for name, tensor in matrices.tensors()
        }
        self._skeleton.drop_layer(index)
        if kept is None:
            errors = {name: self.errors[name] for name in pruned if name in self.errors}
            self._finished.write(index, pruned, errors)
        self.done += 1
        mine = {name for name, at in self._names.items() if at == index} & self.errors.keys()
        self._teller.report(self.done, [self.errors[name] for name in mine])
        return pruned

    def divergence(self) -> float:
        """Return KL(dense || renewed) of the predictions on held-out windows, nats a token.

        Called when all layers are done. The first prediction of a window to the last but one.
        """
        assert self._held, "needs held-out windows"
        assert self.done == self.layers, "they pass all layers first"
        renewed, dense = self._held
        return divergence(self._skeleton, self._held_ids, renewed, dense, self._device)

    def close(self) -> None:
        """Give up the hidden states."""
        self._hidden.close()
        for held in self._held:
            held.close()
        if self._dense is not None:
            self._dense.close()

    def stored(self, index: int, name: str) -> torch.Tensor:
        """Return a tensor of a layer that is done."""
        return self._finished.read(index, name)

    # ---- one layer -----------------------------------------------------------------------------

    def _restored(self, index: int) -> dict[str, torch.Tensor] | None:
        """Return a layer that an earlier run with the same input and options finished."""
        found = self._finished.load(index)
        if found is None:
            return None
        kept, errors = found
        self.errors |= errors
        if self._quantizer is not None:
            for name in [name for name in kept if codes_of(name) in kept]:
                codes, steps = kept[codes_of(name)].numpy(), kept[steps_of(name)].numpy()
                self._quantizer.adopt(name, size_bits(codes, steps))
        return kept

    def _prune(self, index: int, layer: nn.Module, matrices: LayerMatrices) -> None:
        if self._dense is not None:
            self._advance(layer, index, self._dense)
        if self._solver is None:
            return
        solver, sparsity = self._solver, self._sparsity[index]
        self.errors |= matrices.rewrite(
            lambda matrix, found: solver.solve(matrix.weight.contiguous(), found, sparsity),
            self._method.statistics,
            lambda: self._batches(layer, index, self._hidden),
            self._room,
            sequential=self._options.sequential,
        )
        if self._dense is not None and matrices.all:
            finetune(
                layer,
                self._calls[index],
                self._hidden,
                self._dense,
                self.windows,
                matrices.all,
                self._options.seed + index,
                Schedule(passes=self._options.passes),
                self._compute,
            )
        for matrix in matrices.all:
            # What is stored is what the layers behind must see.
            rounded = matrix.weight.to(self._dtype(matrix.name)).float()
            matrix.weight.copy_(torch.where(rounded == 0, 0.0, rounded))

    def _quantize(
        self, index: int, layer: nn.Module, matrices: LayerMatrices, quantizer: LayerQuantizer
    ) -> dict[str, torch.Tensor]:
        """Quantise all matrices and return codes and steps as they are stored."""
        coder = LayerCoder(self._source, quantizer)
        if len(matrices.all) > 1:
            self._survey(index, layer, matrices, coder)
            quantizer.share_out()
        errors = matrices.rewrite(
            coder.solve,
            "gram",
            lambda: self._batches(layer, index, self._hidden),
            self._room,
            sequential=self._options.sequential,
        )
        for name, error in errors.items():
            self.errors[name] = self.errors.get(name, 0.0) + error
        return coder.stored()

    def _survey(
        self, index: int, layer: nn.Module, matrices: LayerMatrices, coder: LayerCoder
    ) -> None:
        """Show all matrices to the quantizer: what bits buy in each, and how much it counts."""
        call, seed = self._calls[index], self._options.seed + index
        probed = layer, call, self._hidden, self.windows, matrices.all, seed, self._compute
        gradients = probe(*probed)
        matrices.rewrite(
            lambda matrix, gram: coder.survey(matrix, gram, gradients),
            "gram",
            lambda: self._batches(layer, index, self._hidden),
            self._room,
            sequential=False,
        )

    def _batches(
        self, layer: nn.Module, index: int, hidden: Activations
    ) -> Iterator[Callable[[], None]]:
        """Yield functions that run the layer on one batch each and drop the result."""
        for start, stop in batches(self.windows, self._batch):
            given = hidden.read(start, stop).to(self._device)

            def run(given: torch.Tensor = given) -> None:
                self._forward(layer, index, given)

            yield run

    def _advance(self, layer: nn.Module, index: int, hidden: Activations) -> None:
        """Replace hidden states before the layer by those after it."""
        with reused_blocks():
            for start, stop in batches(hidden.shape[0], self._batch):
                out = self._forward(layer, index, hidden.read(start, stop).to(self._device))
                hidden.write(start, out)

    def _forward(self, layer: nn.Module, index: int, given: torch.Tensor) -> torch.Tensor:
        """Run a layer, in the type that its survivors are re-trained in."""
        with autocast(self._device, self._compute):
            return self._calls[index].run(layer, given)

    def _matrices(self, index: int) -> LayerMatrices:
        names = frozenset(name for name, layer in self._names.items() if layer == index)
        skeleton = self._skeleton
        return LayerMatrices(skeleton.layers[index], skeleton.pieces(index), names, skeleton.shapes)

    def _dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self._source.tensors[name].dtype)

    # ---- before the first ----------------------------------------------------------------------

    def _embed(self, ids: torch.Tensor) -> tuple[Activations, list[Call]]:
        budget = self._options.memory_bytes // (2 if self._method.finetune else 1)
        return embedded(self._skeleton, ids, budget, self._scratch)

    def _room(self, features: int) -> Activations:
        """Return room for what a module of every token is given, batch by batch."""
        count = -(-self.windows // self._batch)
        return Activations((count, self._batch * self._tokens, features), 0, self._scratch)

    def _outliers(self) -> list[float]:
        """Return each dense layer's share of outliers: one forward through the whole model."""
        hidden, _ = self._embed(self._ids)
        shares = []
        with torch.no_grad():
            for index in range(self.layers):
                layer = self._skeleton.load_layer(index)
                linears = self._matrices(index).linears
                modules = {name: layer.get_submodule(name) for name in linears}
                runs = self._batches(layer, index, hidden)
                found = collect(modules, list(modules), runs, "diagonal", stop=False)
                scores = [
                    matrix.weight.abs() * found[name].sqrt()
                    for name, matrices in linears.items()
                    for matrix in matrices
                    if name in found
                ]
                shares.append(outlier_share(scores))
                self._advance(layer, index, hidden)
                self._skeleton.drop_layer(index)
        hidden.close()
        return shares
