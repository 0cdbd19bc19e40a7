"""What a pruning method is, what it is told, and the table of methods.

Importable without torch: the methods themselves are loaded when they are created.

Two kinds of method exist, told apart by `Method.statistics`:

- "none": the weight alone decides. `WeightPruner.prune(name, weight)`.
- "diagonal", "gram": the inputs of the layer decide as well. `LayerPruner.solve(weight, statistic)`
  gets float32 weights `(rows, cols)` = (outputs, inputs) and the mean over calibration tokens of
  x² (`(cols,)`) or of x xᵀ (`(cols, cols)`).

Both return the pruned weight, same shape and dtype, absent weights exactly +0.0.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from endor.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from endor.checkpoint.reading import WeightPruner

Statistics = Literal["none", "diagonal", "gram"]

Progress = Callable[[int, int, str], None]
"""Called with layers done, layers in all, and what goes on."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Where zeros may fall: anywhere, or `kept` survivors in every `group` along the inputs.

    `kept == group == 0` stands for unstructured.
    """

    kept: int = 0
    group: int = 0

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Return the pattern that "unstructured" or "N:M" (N survivors of every M) names.

        Raises:
            ConfigError: another text, or N not in 1..M-1.
        """
        if text == "unstructured":
            return cls()
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 0 < int(found[1]) < int(found[2]):
            raise ConfigError(
                f"pattern: must be 'unstructured' or 'N:M' with 0 < N < M, got {text!r}; "
                "for example 2:4 keeps two of every four weights"
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def structured(self) -> bool:
        """Whether survivors are counted in groups along the inputs."""
        return self.group > 0

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.structured else "unstructured"


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions:
    """Everything a pruning run is told. Checked on creation.

    Attributes:
        method: A name of `METHODS`, or "none" where a stream only quantises.
        sparsity: Share of zeros in every pruned matrix, in [0, 1). Ignored under an N:M pattern.
        pattern: "unstructured" or "N:M".
        samples: Calibration windows.
        seq_len: Tokens of a window.
        seed: Chooses and orders the windows.
        dampening: Ridge added to the Gram matrix, as a share of its mean diagonal.
        block_size: Columns that SparseGPT decides at a time.
        passes: How often "auto" goes over the windows while it re-trains a layer's survivors.
        calibration: Text or JSONL files, which take turns window by window; empty means the texts
            shipped with the package. `endor.pruning.calibration.shipped_texts` names one of them.
        chat_template: Render JSONL conversations with the tokenizer's chat template.
        device: "auto", "cpu" or a torch device such as "cuda:0".
        layer_sparsity: "uniform", "linear[:SPREAD]", "owl[:SPREAD]" or a JSON file
            `{layer index: sparsity}`; see `endor.pruning.allocation`.
        memory_bytes: Most bytes of activations to keep in RAM; the rest goes to disk.
        skip: Regular expression: tensors whose name it finds stay dense.
        only: Regular expression: tensors whose name it does not find stay dense.
        scratch: Folder for activations that do not fit, and for finished layers: a run with the
            same input and options goes on from them.
        trust_remote_code: Run Python code that comes with the checkpoint, where its model or its
            tokenizer needs that; without, it is refused.
        sequential: Prune the matrices of a layer in order, each on what the pruned ones before it
            yield; otherwise all on what the dense layer yields, which is faster.
    """

    method: str = "auto"
    sparsity: float = 0.5
    pattern: str = "unstructured"
    samples: int = 192
    seq_len: int = 512
    seed: int = 0
    dampening: float = 0.01
    block_size: int = 128
    passes: int = 2
    calibration: tuple[Path, ...] = ()
    chat_template: bool = False
    device: str = "auto"
    layer_sparsity: str = "uniform"
    memory_bytes: int = 4 << 30
    skip: str | None = None
    only: str | None = None
    scratch: Path | None = None
    sequential: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS and self.method != NOTHING.name:
            raise ConfigError(f"method: must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not 0.0 <= self.sparsity < 1.0:
            raise ConfigError(
                f"sparsity: must be in [0, 1), got {self.sparsity}; 0.5 means half zeros"
            )
        Pattern.parse(self.pattern)
        for field in ("samples", "seq_len", "block_size", "passes"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}: must be at least 1, got {getattr(self, field)}")
        if not self.dampening >= 0.0:
            raise ConfigError(f"dampening: must not be negative, got {self.dampening}")
        if not isinstance(self.calibration, tuple):
            raise ConfigError(
                f"calibration: must be a tuple of paths, got {self.calibration!r}; give (path,)"
            )
        for field in ("skip", "only"):
            value = getattr(self, field)
            try:
                re.compile(value or "")
            except re.error as error:
                raise ConfigError(
                    f"{field}: must be a regular expression, got {value!r}: {error}"
                ) from None

    @property
    def parsed_pattern(self) -> Pattern:
        """`pattern`, parsed."""
        return Pattern.parse(self.pattern)

    @property
    def target_sparsity(self) -> float:
        """Share of zeros asked for: `sparsity`, or what the N:M pattern implies."""
        pattern = self.parsed_pattern
        return 1 - pattern.kept / pattern.group if pattern.structured else self.sparsity

    def selects(self, name: str) -> bool:
        """Whether `skip` and `only` leave tensor `name` to be pruned."""
        if self.skip is not None and re.search(self.skip, name):
            return False
        return self.only is None or re.search(self.only, name) is not None


class LayerPruner(Protocol):
    """A method that weighs the weights by the inputs they meet."""

    def solve(
        self, weight: "torch.Tensor", statistic: "torch.Tensor", sparsity: float
    ) -> "torch.Tensor":
        """Return the pruned float32 weight `(rows, cols)`, on the device of `weight`.

        Args:
            weight: float32 `(rows, cols)`, not modified.
            statistic: float32 mean of x² `(cols,)` or of x xᵀ `(cols, cols)`, not modified.
            sparsity: Share of zeros for this matrix; an N:M pattern of the options overrides it.

        Raises:
            PruningError: the statistic is unusable (not finite, or not positive definite at any
                dampening).
        """
        ...


class LayerQuantizer(Protocol):
    """What a stream hands each matrix of a layer to once it is pruned, if it is to be pruned.

    Attributes:
        identity: Changes when the result does.
    """

    identity: str

    def begin(self, numel: Mapping[str, int]) -> None:
        """Learn what is to come: weights of each matrix, by its name, in no order."""
        ...

    def quantize(
        self, name: str, weight: "torch.Tensor", gram: "torch.Tensor", dtype: "torch.dtype"
    ) -> "Coded":
        """Return float32 `weight` `(outputs, inputs)` in codes; values are rounded to `dtype`."""
        ...

    def survey(
        self,
        name: str,
        weight: "torch.Tensor",
        gram: "torch.Tensor",
        gradient: "torch.Tensor | None",
        dtype: "torch.dtype",
    ) -> None:
        """Learn what bits buy in a matrix of the layer that comes next.

        Args:
            name: The stored tensor.
            weight: As for `quantize`.
            gram: Of its inputs in the layer as it was.
            gradient: Of random probes of the layer's output, of the shape of `weight`; None where
                no probe reached it.
            dtype: As for `quantize`.
        """
        ...

    def share_out(self) -> None:
        """Decide on the bits of all matrices surveyed."""
        ...

    def seconds(self, shapes: Sequence[tuple[int, ...]]) -> float:
        """Return about how long matrices of `shapes` take on this processor."""
        ...

    def adopt(self, name: str, bits: float) -> None:
        """Count a matrix that an earlier run has quantised, at so many bits a weight."""
        ...


@dataclass(frozen=True, slots=True)
class Coded:
    """A quantised matrix.

    Attributes:
        codes: int16 `(rows, cols)`.
        steps: float32 `(cols,)`, as they are stored.
        values: float32 `(rows, cols)`: codes times steps, rounded to the stored type, no -0.0.
        bits: What a weight takes in all, predicted from the codes.
    """

    codes: "torch.Tensor"
    steps: "torch.Tensor"
    values: "torch.Tensor"
    bits: float


@dataclass(frozen=True, slots=True)
class Method:
    """One way to prune.

    Attributes:
        name: Key of `METHODS`.
        help: One line for `--help`.
        statistics: What of the layer inputs it needs.
        target: "module:attribute" of a factory that takes the `PruneOptions`.
        paper: Where it is from.
        finetune: Whether the streaming driver re-trains each layer's survivors afterwards.
    """

    name: str
    help: str
    statistics: Statistics
    target: str
    paper: str = ""
    finetune: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether a run needs calibration text, and therefore the streaming driver."""
        return self.statistics != "none"

    def create(self, options: PruneOptions) -> "WeightPruner | LayerPruner":
        """Return the method set up for `options`; a `WeightPruner` iff not `calibrated`."""
        module, _, attribute = self.target.partition(":")
        factory = getattr(importlib.import_module(module), attribute)
        return cast("WeightPruner | LayerPruner", factory(options))


NOTHING = Method("none", "keeps every weight", "none", "")
"""What a stream prunes by whose weights are only quantised; no method to choose."""

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "auto",
            "ADMM, then each layer re-trained against the dense one (best quality)",
            "gram",
            "endor.pruning.methods.admm:Admm",
            finetune=True,
        ),
        Method(
            "magnitude",
            "smallest weights of each matrix; needs no calibration",
            "none",
            "endor.pruning.methods.magnitude:Magnitude",
        ),
        Method(
            "magnitude-row",
            "the same in each row by itself",
            "none",
            "endor.pruning.methods.magnitude:RowMagnitude",
        ),
        Method(
            "wanda",
            "smallest |weight| times input norm of each row; fast",
            "diagonal",
            "endor.pruning.methods.wanda:Wanda",
            "arXiv 2306.11695",
        ),
        Method(
            "sparsegpt",
            "column by column with second-order updates of the survivors",
            "gram",
            "endor.pruning.methods.sparsegpt:SparseGpt",
            "arXiv 2301.00774",
        ),
        Method(
            "admm",
            "mask and survivors found together by ADMM",
            "gram",
            "endor.pruning.methods.admm:Admm",
            "arXiv 2401.02938",
        ),
        Method(
            "alps",
            "ADMM with a growing penalty, survivors re-fitted exactly",
            "gram",
            "endor.pruning.methods.alps:Alps",
            "arXiv 2406.07831",
        ),
    )
}
