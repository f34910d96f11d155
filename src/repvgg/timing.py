"""One timer for all: things timed in turn, round after round, so that a drift hits all alike."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
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
    for number, of_round in enumerate(rounds_in_turn(things, warmup + rounds)):
        for name, value in of_round.items():
            if number >= warmup:
                seconds[name].append(value)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def rounds_in_turn(
    things: Mapping[str, Callable[[], object]], rounds: int
) -> Iterator[dict[str, float]]:
    """Run all things once in each round, and give the seconds of each after every round."""
    for _ in range(rounds):
        yield {name: seconds_of(thing) for name, thing in things.items()}


def seconds_of(thing: Callable[[], object]) -> float:
    """What one call takes, measured by events where there is a CUDA device."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        thing()
        return time.perf_counter() - started
    # The events stand in the stream before and after all that the call launches; a call that
    # launches nothing lies between them too, since the stream is idle.
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    thing()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
