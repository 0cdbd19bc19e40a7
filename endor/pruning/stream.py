"""Calibrated pruning and quantisation of one decoder layer after another, in the memory of one.

A layer is loaded, sees the calibration windows as the pruned layers before it left them, gives up
the statistics of its inputs, is pruned, and passes the windows on. Only one layer, its statistics
and the hidden states exist at a time.
"""

import hashlib
import json
import math
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from torch import nn

from endor import machine
from endor.checkpoint.select import is_linear
from endor.checkpoint.sources.contract import CheckpointSource
from endor.codecs.integer import size_bits
from endor.errors import BackendError, PruningError
from endor.packed import torch_dtype
from endor.pruning.activations import Activations, batches
from endor.pruning.allocation import layer_sparsities, outlier_share
from endor.pruning.calibration import calibration_and_held_out
from endor.pruning.contract import (
    METHODS,
    NOTHING,
    Coded,
    LayerPruner,
    LayerQuantizer,
    PruneOptions,
)
from endor.pruning.finetune import Schedule, autocast, finetune
from endor.pruning.heap import reused_blocks
from endor.pruning.layer import LayerMatrices, Matrix
from endor.pruning.skeleton import Call, Skeleton
from endor.pruning.statistics import collect

BATCH_TOKENS = 2048
"""Tokens of the windows that pass through a layer together."""

SOLVER_PRODUCTS = 20
"""Products with the Gram matrix that a solver takes, for the estimate: those of ADMM."""

Progress = Callable[[int, int, str], None]
"""Called with layers done, layers in all, and what goes on."""


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
        self._progress = progress or (lambda done, total, what: None)
        self._device = _device(options.device)
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
        self.left: tuple[str, ...] = ()
        self._names = self._pruned_names(selected)
        for index in range(self.layers):
            self._matrices(index)  # what cannot be renewed is refused before any work
        ids, self._held_ids = calibration_and_held_out(source.directory, options, held_out)
        self.windows, self._tokens = ids.shape
        self._batch = max(1, BATCH_TOKENS // self._tokens)
        self.fingerprint = self._fingerprint(ids)
        self._ids = ids
        self._hidden, self._calls = self._embed(ids)
        self._dense = self._embed(ids)[0] if self._method.finetune else None
        # Hidden states of the held-out windows, behind renewed and behind dense layers.
        self._held = [self._embed(self._held_ids)[0] for _ in range(2 if held_out else 0)]
        self._sparsity = layer_sparsities(options, self.layers, self._outliers)
        self._began = time.perf_counter()
        self.done = 0
        self.errors: dict[str, float] = {}
        if quantizer is not None:
            shapes = {name: source.tensors[name].numel for name in self._names}
            quantizer.begin(shapes)
        self._announce()

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
        kept = self._kept(index)
        coded: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            if self._held:
                self._advance(layer, index, self._held[1])
            if kept is None:
                self._prune(index, layer, matrices)
                if self._quantizer is not None:
                    coded = self._quantize(index, layer, matrices)
            else:
                if self._dense is not None:
                    self._advance(layer, index, self._dense)
                matrices.load(kept)
            self._advance(layer, index, self._hidden)
            if self._held:
                self._advance(layer, index, self._held[0])
        pruned = kept or coded | {
            name: tensor.to(self._dtype(name)).cpu().contiguous()
            for name, tensor in matrices.tensors().items()
        }
        self._skeleton.drop_layer(index)
        if kept is None:
            self._keep(index, pruned)
        self.done += 1
        self._report()
        return pruned

    def divergence(self) -> float:
        """Return KL(dense || renewed) of the predictions on held-out windows, nats a token.

        Called when all layers are done. The first prediction of a window to the last but one.
        """
        assert self._held, "needs held-out windows"
        assert self.done == self.layers, "they pass all layers first"
        total, tokens = 0.0, 0
        with self._skeleton.head() as logits:
            for window in range(len(self._held_ids)):
                ids = self._held_ids[window : window + 1]
                renewed, dense = (
                    logits(ids, hidden.read(window, window + 1).to(self._device))[0].log_softmax(-1)
                    for hidden in self._held
                )
                terms = dense.exp() * (dense - renewed)
                total += float(torch.where(dense.isneginf(), 0.0, terms).double().sum())
                tokens += ids.shape[1]
        return total / tokens

    def close(self) -> None:
        """Give up the hidden states."""
        self._hidden.close()
        for held in self._held:
            held.close()
        if self._dense is not None:
            self._dense.close()

    # ---- one layer -----------------------------------------------------------------------------

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
        self, index: int, layer: nn.Module, matrices: LayerMatrices
    ) -> dict[str, torch.Tensor]:
        """Quantise all matrices and return codes and steps as they are stored."""
        quantizer = self._quantizer
        assert quantizer is not None
        found: dict[str, list[tuple[Matrix, Coded]]] = {}

        def solve(matrix: Matrix, gram: torch.Tensor) -> torch.Tensor:
            weight, dtype = matrix.weight.contiguous(), self._dtype(matrix.name)
            one = quantizer.quantize(matrix.name, weight, gram, dtype)
            found.setdefault(matrix.name, []).append((matrix, one))
            return one.values

        errors = matrices.rewrite(
            solve,
            "gram",
            lambda: self._batches(layer, index, self._hidden),
            self._room,
            sequential=self._options.sequential,
        )
        for name, error in errors.items():
            self.errors[name] = self.errors.get(name, 0.0) + error
        stored = {}
        for name, parts in found.items():
            parts.sort(key=lambda one: one[0].part.expert or 0)
            turned = parts[0][0].transposed
            codes = [one.codes.T if turned else one.codes for _, one in parts]
            steps = torch.stack([one.steps for _, one in parts])
            shape = self._source.tensors[name].shape
            stored[codes_of(name)] = torch.stack(codes).reshape(shape).cpu().contiguous()
            stored[steps_of(name)] = (steps.reshape(-1, 1) if turned else steps).cpu()
        return stored

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
        return LayerMatrices(self._skeleton.layers[index], self._skeleton.parts(index), names)

    def _dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self._source.tensors[name].dtype)

    # ---- before the first ----------------------------------------------------------------------

    def _pruned_names(self, selected: frozenset[str]) -> dict[str, int]:
        names = {}
        for index in range(len(self._skeleton.layers)):
            for parts in self._skeleton.parts(index).values():
                for part in parts:
                    if part.name in selected and self._options.selects(part.name):
                        names[part.name] = index
        stray = sorted(name for name in selected - names.keys() if self._options.selects(name))
        asked = [name for name in stray if not is_linear(self._source.tensors[name])]
        if asked or not names:
            name = (asked or stray or ["nothing chosen"])[0]
            raise PruningError(
                f"{name}: lies outside the decoder layers, where calibration does not reach; "
                f"leave it out (--exclude '{name}'), or prune with magnitude"
            )
        # A tower for images, say: calibrated by text, the language model is renewed.
        self.left = tuple(stray)
        return names

    def _embed(self, ids: torch.Tensor) -> tuple[Activations, list[Call]]:
        stored: list[Activations] = []

        def sink(start: int, hidden: torch.Tensor) -> None:
            if not stored:
                budget = self._options.memory_bytes // (2 if self._method.finetune else 1)
                shape = (len(ids), self._tokens, hidden.shape[-1])
                stored.append(Activations(shape, budget, self._scratch))
            stored[0].write(start, hidden)

        calls = self._skeleton.trace(ids, self._batch, sink)
        return stored[0], calls

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

    # ---- finished layers -----------------------------------------------------------------------

    def _fingerprint(self, ids: torch.Tensor) -> str:
        """Return a hash of everything that decides the result."""
        fields = asdict(self._options)
        # Which windows there are is hashed below.
        for key in (
            "device",
            "memory_bytes",
            "scratch",
            "calibration",
            "chat_template",
            "samples",
            "trust_remote_code",
        ):
            del fields[key]
        digest = hashlib.sha256(repr(sorted(fields.items())).encode())
        digest.update(self._source.fingerprint().encode())
        digest.update(ids.numpy().tobytes())
        digest.update("\0".join(sorted(self._names)).encode())
        if self._quantizer is not None:
            digest.update(self._quantizer.identity.encode())
        return digest.hexdigest()

    def path_of(self, index: int) -> Path:
        """Return where a finished layer is kept."""
        return self._scratch / f"layer-{index:05d}.safetensors"

    def _keep(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        errors = {name: self.errors[name] for name in tensors if name in self.errors}
        said = {"run": self.fingerprint, "errors": json.dumps(errors)}
        # A new name: a folder that others may write to could hold a link of any expected one.
        handle, partial = tempfile.mkstemp(dir=self._scratch)
        os.close(handle)
        save_file(tensors, partial, metadata=said)
        Path(partial).replace(self.path_of(index))

    def _kept(self, index: int) -> dict[str, torch.Tensor] | None:
        """Return a layer that an earlier run with the same input and options finished."""
        from safetensors import SafetensorError, safe_open

        path = self.path_of(index)
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                if said.get("run") != self.fingerprint:
                    return None
                kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                self.errors |= json.loads(said.get("errors", "{}"))
        except SafetensorError:
            return None
        if self._quantizer is not None:
            for name in [name for name in kept if codes_of(name) in kept]:
                codes, steps = kept[codes_of(name)].numpy(), kept[steps_of(name)].numpy()
                self._quantizer.adopt(name, size_bits(codes, steps))
        return kept

    def _announce(self) -> None:
        """Say how long it will take, by what this processor computes; a device is not known."""
        if self._device.type != "cpu":
            return
        found = machine.arithmetic()
        gflops = found.gflops if self._method.finetune else found.float32_gflops
        seconds = self.layers * self._layer_flops() / gflops / 1e9
        self._progress(0, self.layers, f"about {duration(seconds)} at {gflops:.0f} Gflop/s")

    def _layer_flops(self) -> float:
        """Return the operations that a layer takes, about: its products, and those of ADMM."""
        shapes = [self._source.tensors[name].shape for name in self._names]
        weights = sum(math.prod(shape) for shape in shapes) / max(1, self.layers)
        forwards = 3.5 if self._options.sequential else 2.0
        if self._method.finetune:
            forwards += 1 + 3 * self._options.passes
        flops = 2.0 * self.windows * self._tokens * weights * forwards
        if self._method.statistics == "gram":
            solved = sum(math.prod(shape) * shape[-1] for shape in shapes) / max(1, self.layers)
            flops += 2.0 * SOLVER_PRODUCTS * solved
        return flops

    def _report(self) -> None:
        spent = time.perf_counter() - self._began
        left = spent / self.done * (self.layers - self.done)
        done = {name for name, at in self._names.items() if at == self.done - 1}
        mine = [self.errors[name] for name in done & self.errors.keys()]
        error = f", output error {max(mine):.3f}" if mine else ""
        self._progress(self.done, self.layers, f"{duration(left)} left{error}")


def duration(seconds: float) -> str:
    """Return a time for a reader."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def codes_of(name: str) -> str:
    """Return the name of the codes, int16 of the tensor's shape, of a quantised tensor."""
    return f"{name}:codes"


def steps_of(name: str) -> str:
    """Return the name of the steps, float32, laid out as `codecs.integer.encode` takes them."""
    return f"{name}:steps"


def _device(name: str) -> torch.device:
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(chosen)
    except RuntimeError as error:
        raise BackendError(f"device {name!r}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {name!r}: torch sees no CUDA device; use --device cpu")
    return device
