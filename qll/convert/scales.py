"""Predicted losses brought to measured ones: one positive factor per kind of unit and depth.

log(measured / predicted) of the groups is read as a common level + an effect of the kind + one of
the depth + a rest of its own, fitted by least squares with a penalty on all but the level (ridge,
the posterior mean of a mixed model): noise does not rule, and a format that no group has used is
corrected by what is known of its depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qll.convert.candidates import Candidate
from qll.convert.sensitivity import Sensitivity, kind_of

# variance of the noise of a log ratio over the variance of an effect, of a rest
PENALTY_EFFECT, PENALTY_REST = 0.1, 0.5
# a divergence below this is the rounding of float32 logits
NOTHING = 1e-7
DEPTH_GAIN, DEPTH_POWER = 1.0, 1.0


@dataclass(frozen=True)
class Scales:
    """What to multiply a candidate's predicted loss with."""

    level: float
    kinds: dict[str, float]
    depths: dict[tuple[int, int], float]
    rests: dict[tuple[str, int, int], float]

    def of(self, kind: str, block: int) -> float:
        """The factor of a kind of unit in a block; effects that are not known are left out.

        >>> Scales(0.0, {"lowrank q_proj": math.log(2)}, {(0, 1): 0.0}, {}).of("lowrank q_proj", 1)
        2.0
        """
        depth = next((ends for ends in self.depths if ends[0] <= block <= ends[1]), (-1, -1))
        return math.exp(
            self.level
            + self.kinds.get(kind, 0.0)
            + self.depths.get(depth, 0.0)
            + self.rests.get((kind, *depth), 0.0)
        )


def fit_scales(lines: Sequence[Sensitivity]) -> Scales:
    """The factors that bring the predictions of `lines` near what was measured.

    >>> lines = [Sensitivity("a", 0, 0, 1.0, 2.0), Sensitivity("a", 1, 1, 3.0, 6.0)]
    >>> round(fit_scales(lines).of("a", 1), 3)
    2.0
    """
    used = [line for line in lines if line.predicted > NOTHING and line.measured > NOTHING]
    if not used:
        return Scales(0.0, {}, {}, {})
    kinds = sorted({line.kind for line in used})
    depths = sorted({(line.first, line.last) for line in used})
    ends = 1 + len(kinds), 1 + len(kinds) + len(depths)
    design = np.zeros((len(used), ends[1] + len(used)))
    design[:, 0] = 1
    for row, line in enumerate(used):
        design[row, 1 + kinds.index(line.kind)] = 1
        design[row, ends[0] + depths.index((line.first, line.last))] = 1
        design[row, ends[1] + row] = 1
    penalty = np.diag([0.0, *[PENALTY_EFFECT] * (ends[1] - 1), *[PENALTY_REST] * len(used)])
    ratios = np.log([line.measured / line.predicted for line in used])
    found = np.linalg.solve(design.T @ design + penalty, design.T @ ratios).tolist()
    rests = zip(used, found[ends[1] :], strict=True)
    return Scales(
        found[0],
        dict(zip(kinds, found[1 : ends[0]], strict=True)),
        dict(zip(depths, found[ends[0] : ends[1]], strict=True)),
        {(line.kind, line.first, line.last): rest for line, rest in rests},
    )


def rescaled(
    candidates: Sequence[Candidate], scales: Scales, measured: Sequence[Candidate]
) -> list[Candidate]:
    """The candidates with the losses that the `measured` ones lead to expect.

    A surcharge holds for all sizes. A discount holds up to the loss at which the unit was measured
    in this format; what is beyond counts as predicted, since errors cost more the larger they are.
    """
    trusted = {_menu(item): item.loss for item in measured}
    found = []
    for item in candidates:
        scale = scales.of(kind_of(item), item.unit.block)
        inside = min(item.loss, trusted.get(_menu(item), 0.0))
        loss = scale * inside + max(scale, 1.0) * (item.loss - inside)
        found.append(replace(item, loss=loss))
    return found


def _menu(item: Candidate) -> tuple[tuple[str, ...], str | None]:
    return item.unit.members, item.spec and item.spec.format


def weighted_by_depth(candidates: Sequence[Candidate], layers: int) -> list[Candidate]:
    """The candidates with the losses of early blocks weighed up, without measuring: what they do to
    the stream is changed by all blocks above (LEMS, compression.md 2A)."""
    weights = depth_weights(layers)
    return [replace(item, loss=item.loss * weights[item.unit.block]) for item in candidates]


def depth_weights(layers: int) -> list[float]:
    """1 + DEPTH_GAIN sum_{k >= l} (k + 1)^-DEPTH_POWER / the same of l = 0, per block l.

    >>> depth_weights(3)[0] == 1 + DEPTH_GAIN
    True
    """
    powers = [(k + 1) ** -DEPTH_POWER for k in range(layers)]
    return [1 + DEPTH_GAIN * sum(powers[block:]) / sum(powers) for block in range(layers)]
