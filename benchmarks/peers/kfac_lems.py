"""K-FAC SVD with the LEMS allocation (ICML 2026): truncate in the loss's metric, spend by measured
sensitivity.

Both sides are whitened: M = L_out^T W L_in with L_in L_in^T and L_out L_out^T the shrunk second
moments of inputs (0.1) and output gradients (0.3), trimmed and clipped as `qll.calibrate.probe`
does. Sensitivity: each matrix alone at a tenth of its break-even rank r* = m n / (m + n), the KL
of the whole model measured on calibration tokens. Then error(r) = KL (1 - E(r)) / (1 - E(r_ref)),
E the cumulated squared singular values of M, times a depth weight 1 + gamma d_l, d_l proportional
to sum_{k>=l} (k + 1)^-alpha and 1 at its largest. An integer programme picks dense or a rank of at
least 0.3 r* in steps of 8 for each matrix. (alpha, gamma) in [0, 3] x [0, 7]: the best of ten
draws by KL on the same tokens (drawn at random; the authors use a TPE sampler), (0, 0) among them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.peers.case import Case, Replacement, cholesky, linears, pair_params, stored
from qll.calibrate import LinearMoments
from qll.model import load_dense, run_block

SHRINK_INPUT, SHRINK_GRADIENT = 0.1, 0.3
REFERENCE_SHARE, LEAST_SHARE, STEP = 0.1, 0.3, 8
TRIALS = 10
# texts take turns in the calibration windows, so that the first two are of two texts
SENSITIVITY_WINDOWS, SENSITIVITY_TOKENS = 2, 512


@dataclass(frozen=True)
class Whitened:
    """A matrix as left[:, :r] @ right[:r] for every rank r, with the squared singular values."""

    left: Float32[Tensor, "out k"]
    right: Float32[Tensor, "k into"]
    energies: Float64[Tensor, " k"]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, into)."""
        return self.left.shape[0], self.right.shape[1]

    def at(self, rank: int) -> Float32[Tensor, "out into"]:
        """The matrix of rank `rank`."""
        return self.left[:, :rank] @ self.right[:rank]

    def tail(self, rank: int) -> float:
        """Sum of the squared singular values after the first `rank`."""
        return float(self.energies[rank:].flip(0).sum())

    @property
    def break_even(self) -> float:
        """The rank at which two factors hold as many numbers as the matrix."""
        return self.shape[0] * self.shape[1] / sum(self.shape)

    @property
    def reference(self) -> int:
        """The rank of the sensitivity measurement."""
        return max(1, int(REFERENCE_SHARE * self.break_even))


def convert(case: Case) -> Iterator[tuple[str, Replacement]]:
    """The best of TRIALS allocations."""
    found = {name: whiten(weight, moments) for name, weight, moments in linears(case)}
    watch = Watch(case)
    sensitivity = sensitivities(case, found, watch)
    ranks = search(found, sensitivity, case, watch)
    for name, whitened in found.items():
        out, into = whitened.shape
        rank = ranks[name]
        if rank is None:
            yield name, stored(case.source.read(f"{name}.weight"), out * into)
        else:
            yield name, stored(whitened.at(rank), pair_params(whitened.shape, rank))


def whiten(weight: Float64[Tensor, "out into"], moments: LinearMoments) -> Whitened:
    """The singular value decomposition in the K-FAC metric, both factors undone."""
    into = cholesky(shrunk(moments.input / moments.tokens, SHRINK_INPUT))
    out = cholesky(shrunk(moments.grad / moments.grad_tokens, SHRINK_GRADIENT))
    left, values, right = torch.linalg.svd(out.T @ weight @ into, full_matrices=False)
    undone = torch.linalg.solve_triangular(out.T, left * values, upper=True)
    right = torch.linalg.solve_triangular(into, right, upper=False, left=False)
    return Whitened(undone.float(), right.float(), values.square())


def shrunk(moment: Float64[Tensor, "n n"], share: float) -> Float64[Tensor, "n n"]:
    """(1 - share) G + share mean(diag G) I."""
    identity = torch.eye(len(moment), dtype=moment.dtype)
    return (1 - share) * moment + share * moment.diagonal().mean() * identity


class Watch:
    """The dense model with its hidden states and next-token distributions on a few tokens."""

    @torch.no_grad()
    def __init__(self, case: Case) -> None:
        tokens = min(SENSITIVITY_TOKENS, case.windows.shape[1])
        self.model: LlamaForCausalLM = load_dense(case.source)
        self.hidden = [self.model.model.embed_tokens(case.windows[:SENSITIVITY_WINDOWS, :tokens])]
        for block in self.model.model.layers:
            self.hidden.append(run_block(block, self.hidden[-1]))
        self.log_probs = self._log_probs(self.hidden[-1])

    @torch.no_grad()
    def divergence(self, replaced: dict[str, Float[Tensor, "out into"]]) -> float:
        """Mean KL(dense || changed) in nats per token with some weights replaced."""
        linears = {name: self.model.get_submodule(name) for name in replaced}
        before = {name: linear.weight for name, linear in linears.items()}
        for name, matrix in replaced.items():
            linears[name].weight = nn.Parameter(matrix, requires_grad=False)
        first = min(int(name.split(".")[2]) for name in replaced)
        state = self.hidden[first]
        for block in self.model.model.layers[first:]:
            state = run_block(block, state)
        for name, weight in before.items():
            linears[name].weight = weight
        return self._divergence(state)

    def _divergence(self, state: Tensor) -> float:
        total, rows = 0.0, state.flatten(0, -2)
        for start in range(0, len(rows), 256):
            stop = min(start + 256, len(rows))
            dense = self.log_probs[start:stop]
            total += float((dense.exp() * (dense - self._log_probs(rows[start:stop]))).sum())
        return total / len(rows)

    def _log_probs(self, state: Tensor) -> Tensor:
        logits = self.model.lm_head(self.model.model.norm(state.flatten(0, -2)))
        return logits.log_softmax(-1)


def sensitivities(case: Case, found: dict[str, Whitened], watch: Watch) -> dict[str, float]:
    """KL of each matrix alone at its reference rank; kept in the cache."""
    path = case.cache / "kfac_sensitivity.json"
    if path.exists():
        return json.loads(path.read_text())
    measured = {
        name: watch.divergence({name: whitened.at(whitened.reference)})
        for name, whitened in found.items()
    }
    case.cache.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured))
    return measured


def search(
    found: dict[str, Whitened], sensitivity: dict[str, float], case: Case, watch: Watch
) -> dict[str, int | None]:
    """The allocation of least measured KL among TRIALS depth weightings."""
    generator = np.random.default_rng(case.seed)
    draws = [(0.0, 0.0), *generator.uniform((0, 0), (3, 7), (TRIALS - 1, 2)).tolist()]
    best: tuple[float, dict[str, int | None]] | None = None
    for alpha, gamma in draws:
        ranks = allocate(found, sensitivity, case.keep, alpha, gamma)
        replaced = {name: found[name].at(rank) for name, rank in ranks.items() if rank is not None}
        loss = watch.divergence(replaced) if replaced else 0.0
        if best is None or loss < best[0]:
            best = (loss, ranks)
    return best[1]


def allocate(
    found: dict[str, Whitened],
    sensitivity: dict[str, float],
    keep: float,
    alpha: float,
    gamma: float,
) -> dict[str, int | None]:
    """A rank, or None for dense, for every matrix: least summed error within `keep`."""
    depth = 1 + max(int(name.split(".")[2]) for name in found)
    weight = 1 + gamma * depth_profile(depth, alpha)
    rows, options = [], []
    for row, (name, whitened) in enumerate(found.items()):
        scale = weight[int(name.split(".")[2])] * sensitivity[name]
        scale = float(scale) / max(whitened.tail(whitened.reference), 1e-300)
        out, into = whitened.shape
        choices = [(name, None, out * into, 0.0)]
        least = max(1, int(np.ceil(LEAST_SHARE * whitened.break_even)))
        for rank in range(STEP * int(np.ceil(least / STEP)), int(whitened.break_even), STEP):
            size = pair_params(whitened.shape, rank)
            choices.append((name, rank, size, scale * whitened.tail(rank)))
        rows += [row] * len(choices)
        options += choices
    total = sum(out * into for out, into in (whitened.shape for whitened in found.values()))
    chosen = _solve(rows, options, keep * total)
    return {name: rank for name, rank, _, _ in chosen}


def depth_profile(depth: int, alpha: float) -> Float64[np.ndarray, " depth"]:
    """sum_{k >= l} (k + 1)^-alpha for l = 0 .. depth - 1, over its largest.

    >>> depth_profile(2, 0.0).tolist()
    [1.0, 0.5]
    """
    powers = np.arange(1, depth + 1, dtype=float) ** -alpha
    sums = powers[::-1].cumsum()[::-1]
    return sums / sums[0]


def _solve(rows: list[int], options: list[tuple], budget: float) -> list[tuple]:
    """One option a row, least error, sizes within the budget."""
    sizes = np.array([option[2] for option in options]) / budget
    errors = np.array([option[3] for option in options])
    cover = csr_matrix((np.ones(len(rows)), (rows, range(len(rows)))))
    result = milp(
        errors / max(errors.max(), 1e-300),
        constraints=[
            LinearConstraint(cover, 1, 1),
            LinearConstraint(csr_matrix(sizes), 0, 1),
        ],
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-3, "time_limit": 60},
    )
    if result.x is None:
        raise ValueError("no allocation fits the budget")
    return [option for option, taken in zip(options, result.x, strict=True) if taken > 0.5]
