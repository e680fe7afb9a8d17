"""How much of a run is done, by steps or by seconds, and the learning rate that goes with it.

A run has a number of steps, a number of seconds, or both, and ends with the first that is used up.
With steps alone everything depends on the step: an interrupted run ends with the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WARM_UP = 0.02  # share of the run
LAST_SHARE = 0.02  # learning rate at the end, of that at the top


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then half a cosine.

    >>> schedule = Schedule(steps=100)
    >>> [round(schedule.rate(step, 0.0), 2) for step in (0, 1, 51, 100)]
    [0.5, 1.0, 0.51, 0.02]
    >>> Schedule(steps=100, seconds=10.0).done(step=20, seconds=5.0)
    0.5
    >>> Schedule(steps=10_000, seconds=10.0).rate(step=5, seconds=0.2)  # time is used up first
    1.0
    """

    steps: int | None = None
    seconds: float | None = None
    warm_up_steps: int | None = None
    """Default: a fiftieth of the run."""

    def done(self, step: int, seconds: float) -> float:
        """Share of the run that is done after `step` steps and `seconds` seconds, at most 1."""
        by_step = step / self.steps if self.steps else 0.0
        by_time = seconds / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_step, by_time))

    def rate(self, step: int, seconds: float) -> float:
        """Learning rate of the step after that, as a share of the highest."""
        done = self.done(step, seconds)
        if self.warm_up_steps is not None:
            warm = (step + 1) / max(1, self.warm_up_steps)
        else:
            warm = max(0.05, done / WARM_UP) if self.seconds else 0.0
            if self.steps:
                warm = max(warm, (step + 1) / max(1, round(WARM_UP * self.steps)))
        after = max(0.0, (done - WARM_UP) / (1 - WARM_UP))
        fall = LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * after))
        return min(1.0, warm) * fall

    def seconds_left(self, step: int, seconds: float) -> float | None:
        """Estimate of the seconds until the end, None before anything is known."""
        done = self.done(step, seconds)
        return seconds * (1 - done) / done if done > 0 else None
