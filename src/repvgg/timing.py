"""One timer for all: things timed in turn, round after round, so that a drift hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of each round of one thing."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, over the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def time_in_turn(
    things: Mapping[str, Callable[[], object]], rounds: int = 20, warmup: int = 3
) -> dict[str, Times]:
    """Run all things once in each round; the first `warmup` rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for number in range(warmup + rounds):
        for name, thing in things.items():
            _wait_for_gpu()
            started = time.perf_counter()
            thing()
            _wait_for_gpu()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
