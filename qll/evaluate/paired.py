"""Times that can be compared on a machine that others use too.

What is compared takes turns, round after round, so a neighbour that comes and goes meets all alike.
The least time is nearest to what an idle machine would need; the ratio of two is the median over
rounds of the ratio within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qll.runtime.costs import synchronise

Times = dict[str, list[float]]


def race(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str | torch.device = "cpu",
    inner: int = 1,
) -> Times:
    """Seconds of every run, once per round; one more round before that warms up.

    inner: runs one behind another that a time is the sum of. The order changes from round to round.

    >>> times = race({"a": lambda: sum(range(10)), "b": lambda: sum(range(20000))}, rounds=3)
    >>> len(times["a"]), ratio(times, "a", "b") > 1
    (3, True)
    """
    device, times = torch.device(device), {name: [] for name in runs}
    for turn in range(rounds + 1):
        order = list(runs) if turn % 2 else list(reversed(runs))
        for name in order:
            synchronise(device)
            start = time.perf_counter()
            for _ in range(inner):
                runs[name]()
            synchronise(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Times, fast: str, slow: str) -> float:
    """How many times faster `fast` is than `slow`: median over rounds.

    >>> ratio({"a": [1.0, 1.0, 2.0], "b": [2.0, 3.0, 2.0]}, "a", "b")
    2.0
    """
    pairs = zip(times[fast], times[slow], strict=True)
    return statistics.median(other / own for own, other in pairs)


def best_ratio(times: Times, fast: str, slow: str) -> float:
    """The same for the least times of both.

    >>> best_ratio({"a": [1.0, 3.0], "b": [2.5, 2.0]}, "a", "b")
    2.0
    """
    return min(times[slow]) / min(times[fast])
