"""Swift-SVD (arXiv 2604.01609, code hiahei/Swift-SVD): the optimum of SVD-LLM from the second
moment of the outputs, ranks by the importance of blocks and the errors of matrices.

C = sum y y^T = W G W^T; with V the eigenvectors of its r largest eigenvalues W~ = V V^T W. No root
of G is needed, so a singular G is no trouble, and one decomposition serves every rank. With uniform
ranks it is SVD-LLM, whose row stands for it. Here is its dynamic allocation, algorithm 2: among the
matrices of a kind, half the uniform rank for each, the rest in proportion to
beta^alpha log(e + error)^(1 - alpha), beta the block's influence (1 - cos of input and output)
brought to [1, 2], the error the root of the discarded eigenvalues at the uniform rank. alpha is the
best of 0, 0.1 .. 1 on a validation set: here the first tokens of two calibration windows.

Where the rank would pass break-even the matrix is left dense, which is smaller and exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import e, log

import torch
from jaxtyping import Float64
from torch import Tensor

from benchmarks.peers.case import Case, Factors, Replacement, linears, pair_rank, truncated
from benchmarks.peers.watch import Watch

ALPHAS = tuple(step / 10 for step in range(11))
# of the uniform rank
GUARANTEED = 0.5
TOKENS = 1024


def convert(case: Case) -> Iterator[tuple[str, Replacement]]:
    """The best of the allocations of ALPHAS."""
    found = {name: projected(weight, moments.input) for name, weight, moments in linears(case)}
    yield from truncated(case, found, search(case, found))


def projected(weight: Float64[Tensor, "out into"], moment: Float64[Tensor, "into into"]) -> Factors:
    """V V^T W for the strongest directions V of the outputs, strongest first."""
    covariance = weight @ moment @ weight.T
    energies, directions = torch.linalg.eigh((covariance + covariance.T) / 2)
    energies, directions = energies.flip(0)[: min(weight.shape)], directions.flip(1)
    directions = directions[:, : len(energies)]
    return Factors(directions.float(), (directions.T @ weight).float(), energies.clamp(min=0))


def search(case: Case, found: dict[str, Factors]) -> dict[str, int | None]:
    """The ranks of least measured cross-entropy."""
    watch = Watch(case, TOKENS)
    best: tuple[float, dict[str, int | None]] | None = None
    for alpha in ALPHAS:
        ranks = allocate(found, case.moments.block_influence, case.keep, alpha)
        replaced = {name: found[name].at(rank) for name, rank in ranks.items() if rank is not None}
        loss = watch.cross_entropy(replaced)
        if best is None or loss < best[0]:
            best = (loss, ranks)
    return best[1]


def allocate(
    found: dict[str, Factors], influence: Sequence[float], keep: float, alpha: float
) -> dict[str, int | None]:
    """A rank, or None for dense, for every matrix; kind by kind the sum of the uniform ranks."""
    least, most = min(influence), max(influence)
    importance = [1 + (value - least) / max(most - least, 1e-12) for value in influence]
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in found:
        kinds[name.split(".", 3)[3]].append(name)
    ranks: dict[str, int | None] = {}
    for names in kinds.values():
        uniform = pair_rank(found[names[0]].shape, keep)
        scores = []
        for name in names:
            block, error = int(name.split(".")[2]), found[name].tail(uniform) ** 0.5
            scores.append(importance[block] ** alpha * log(e + error) ** (1 - alpha))
        for name, rank in zip(names, spread(uniform, scores), strict=True):
            ranks[name] = rank if rank <= found[name].break_even else None
    return {name: ranks[name] for name in found}


def spread(uniform: int, scores: Sequence[float]) -> list[int]:
    """GUARANTEED of `uniform` each, the rest in proportion to the scores, what rounding down leaves
    one by one to the highest.

    >>> spread(10, [1.0, 3.0])
    [7, 13]
    """
    least = int(GUARANTEED * uniform)
    pool = (uniform - least) * len(scores)
    ranks = [least + int(pool * score / sum(scores)) for score in scores]
    highest = sorted(range(len(scores)), key=lambda place: -scores[place])
    for place in highest[: uniform * len(scores) - sum(ranks)]:
        ranks[place] += 1
    return ranks
