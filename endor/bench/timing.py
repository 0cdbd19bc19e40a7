"""Timing that a neighbour's load does not tilt: subjects take turns, medians are compared.

A machine's speed drifts over seconds. Measuring A a hundred times and then B a hundred times
compares two moments; here every round runs each subject once, so that a ratio of medians is a ratio
of contemporaries, and each run finds caches full of another subject's data.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from endor.errors import ConfigError

MIN_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class Subject:
    """Something to time.

    Attributes:
        name: Unique within a race.
        run: The timed work; gets the number of its turn, to rotate over buffer sets.
        prepare: Untimed work before each turn, such as dropping caches.
    """

    name: str
    run: Callable[[int], object]
    prepare: Callable[[int], object] | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per run, sorted."""

    samples: tuple[float, ...]

    @property
    def p20(self) -> float:
        return self._quantile(0.2)

    @property
    def p50(self) -> float:
        return self._quantile(0.5)

    @property
    def p80(self) -> float:
        return self._quantile(0.8)

    def _quantile(self, share: float) -> float:
        place = share * (len(self.samples) - 1)
        low = int(place)
        high = min(low + 1, len(self.samples) - 1)
        return self.samples[low] + (place - low) * (self.samples[high] - self.samples[low])


def race(
    subjects: Sequence[Subject],
    *,
    repeats: int,
    budget_s: float = 10.0,
    warmup: int = 1,
) -> dict[str, Timing]:
    """Time `subjects` in turn, `repeats` rounds, and return the timing of each by name.

    Args:
        subjects: What to time.
        repeats: Timed runs of each.
        budget_s: A subject whose timed runs exceed this leaves after `MIN_SAMPLES` of them.
        warmup: Untimed runs of each before the first round.

    Raises:
        ConfigError: `repeats` below 1, or two subjects of one name.
    """
    if repeats < 1:
        raise ConfigError(f"repeats must be at least 1, got {repeats}")
    if len({subject.name for subject in subjects}) < len(subjects):
        raise ConfigError(f"two subjects share a name: {[subject.name for subject in subjects]}")
    samples: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for turn in range(-warmup, repeats):
        for subject in subjects:
            taken = samples[subject.name]
            if len(taken) >= MIN_SAMPLES and sum(taken) > budget_s:
                continue
            if subject.prepare is not None:
                subject.prepare(turn)
            started = time.perf_counter()
            subject.run(turn)
            if turn >= 0:
                taken.append(time.perf_counter() - started)
    return {name: Timing(tuple(sorted(taken))) for name, taken in samples.items()}


def rotation(set_bytes: int, cache_bytes: int, *, most: int = 8) -> int:
    """Return how many buffer sets of `set_bytes` exceed twice the cache: at least 2."""
    return min(max(2, -(-2 * cache_bytes // max(1, set_bytes))), most)
