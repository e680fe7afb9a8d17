"""When the converted model pays as a draft of the dense one (speculative decoding).

Leviathan, Kalman, Matias 2023, Fast Inference from Transformers via Speculative Decoding, theorem
3.8 (https://arxiv.org/abs/2211.17192): with acceptance a per token, a draft that costs c of the
dense model, and g drafted tokens, a round yields (1 - a^(g+1)) / (1 - a) tokens for g c + 1.
"""

from __future__ import annotations

MOST_DRAFTED = 16


def speedup(acceptance: float, cost: float, drafted: int) -> float:
    """Tokens a second over those of the dense model alone.

    >>> round(speedup(0.8, 0.1, 4), 2), round(speedup(0.8, 0.65, 4), 2)
    (2.4, 0.93)
    """
    if acceptance == 1.0:
        return (drafted + 1) / (drafted * cost + 1)
    return (1 - acceptance ** (drafted + 1)) / ((1 - acceptance) * (drafted * cost + 1))


def best_draft(acceptance: float, cost: float) -> tuple[int, float]:
    """The number of drafted tokens that gains most, and the gain; (0, 1.0) when none does.

    It pays exactly when the acceptance is above the cost.

    >>> best_draft(0.6, 0.65), best_draft(0.7, 0.65)[0]
    ((0, 1.0), 1)
    """
    gains = [(speedup(acceptance, cost, count), count) for count in range(1, MOST_DRAFTED + 1)]
    gain, count = max(gains)
    return (count, gain) if gain > 1 else (0, 1.0)
