"""What a comparison of generation is asked, and what it returns of each system."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from endor.bench.records import Environment
from endor.errors import ConfigError

PEERS = ("accelerate-disk", "accelerate-cpu", "airllm", "dense")


@dataclass(frozen=True, slots=True)
class GenerateCase:
    """Settings of the comparison.

    Attributes:
        packed: The packed checkpoint.
        dense: The same weights as an ordinary checkpoint; needed by the peers.
        ram_bytes: Memory budget of every system.
        against: Peers to run.
        fast: Also run Endor with the direct product, which is not bit-exact.
        cold: Drop the files from the page cache before each step.
        prompt_tokens: Length of the prompt, random tokens.
        tokens: Tokens to generate.
        batch: Sequences, all the same.
        rounds: Processes per system.
        threads: CPU threads of every system.
        verify: Let Endor check each record whenever it is read.
        work: Directory for what peers write (AirLLM its split copy of the checkpoint).
        airllm_python: Interpreter that has AirLLM; this one when omitted.
        trust_remote_code: Run Python code that comes with the checkpoints.
        report: Where Endor's last round writes its HTML report.
        remeasure: Measure machine and disk first, so that predictions are made of today's speeds.
    """

    packed: Path
    dense: Path | None
    ram_bytes: int
    against: tuple[str, ...] = ()
    fast: bool = True
    cold: bool = True
    prompt_tokens: int = 16
    tokens: int = 6
    batch: int = 1
    rounds: int = 3
    threads: int = 0
    verify: bool = True
    work: Path | None = None
    airllm_python: str | None = None
    trust_remote_code: bool = False
    report: Path | None = None
    remeasure: bool = True

    def check(self) -> None:
        """Raise `ConfigError` unless the settings make sense."""
        unknown = [name for name in self.against if name not in PEERS]
        if unknown:
            raise ConfigError(
                f"--against: unknown {', '.join(unknown)}; known are {', '.join(PEERS)}"
            )
        if self.against and self.dense is None:
            raise ConfigError(
                "--against needs --dense DIR, the same weights as an ordinary checkpoint: "
                "make it with `endor unpack`"
            )
        if min(self.prompt_tokens, self.batch, self.rounds) < 1 or self.tokens < 2:
            raise ConfigError("prompt, batch and rounds must be at least 1, tokens at least 2")


@dataclass(frozen=True, slots=True)
class GenerateRecord:
    """One system's generation.

    Attributes:
        system: `endor`, `endor-direct`, `raw` (plain reads of the streamed bytes), or a peer.
        model: Name of the packed checkpoint.
        page_cache: `cold` or `warm`.
        cached_share: Largest part of the files found in the page cache before a decode step.
        ram_bytes: Budget.
        batch, prompt_tokens, tokens, threads, rounds: As in `GenerateCase`.
        load_s: Median time to load.
        prefill_s: Median first step.
        decode_s: Median decode step, over all rounds.
        decode_p20, decode_p80: Percentiles of the same.
        predicted_decode_s, predicted_prefill_s: Of the plan; 0 for the peers.
        disk_bytes_per_step: What the system asked the disk for, per step.
        anonymous_peak_bytes: Largest private memory in use.
        equal: Whether tokens and all logits have the bits of the reference: the first exact system.
        same_tokens: Whether the tokens are those of the reference.
        missing: Why there are no figures; empty when there are.
        note: A condition that the reader must know.
        environment: Where it was measured.
    """

    system: str
    model: str
    page_cache: str
    ram_bytes: int
    batch: int
    prompt_tokens: int
    tokens: int
    threads: int
    rounds: int
    environment: Environment
    cached_share: float = 0.0
    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_p20: float = 0.0
    decode_p80: float = 0.0
    predicted_decode_s: float = 0.0
    predicted_prefill_s: float = 0.0
    disk_bytes_per_step: float = 0.0
    anonymous_peak_bytes: int = 0
    equal: bool | None = None
    same_tokens: bool | None = None
    missing: str = ""
    note: str = ""

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.decode_s if self.decode_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return every field and the derived rate, ready for JSON."""
        return asdict(self) | {"tokens_per_s": self.tokens_per_s}
