"""ASVD (Yuan et al. 2023, arXiv 2312.05821, code hahnyuan/ASVD4LLM): columns scaled by their
activations before the SVD, ranks by measured sensitivity.

s_j = (mean |x_j|)^alpha, alpha = 0.5; W~ = SVD_r(W diag(s)) diag(s)^-1. Each matrix alone is
truncated to six shares of its parameters and the perplexity of the whole model measured. Every
(matrix, share) up to a perplexity is taken, of each matrix the smallest such share; that perplexity
is the lowest at which the budget is met. A matrix without any share stays dense.

Less than published: the perplexity is on two windows of 256 tokens, not 32 of 2048.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from jaxtyping import Float64
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.peers.case import (
    Case,
    Factors,
    Replacement,
    pair_params,
    pair_rank,
    truncated,
    weights,
)
from benchmarks.peers.watch import Watch
from qll.calibrate.moments import INPUTS
from qll.model import build_block, embed, run_block

ALPHA = 0.5
# added to every scale, as in the published code, so that a dead channel can be undone
FLOOR = 1e-6
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TOKENS = 256

# nats per token of the whole model, by matrix and by share of its parameters
Sensitivity = dict[str, dict[float, float]]


def convert(case: Case) -> Iterator[tuple[str, Replacement]]:
    """The allocation of the published search."""
    means = input_means(case)
    found = {
        name: scaled(weight, means[name].double() ** ALPHA + FLOOR)
        for name, weight in weights(case)
    }
    shares = search(found, sensitivities(case, found), case.keep)
    ranks = {name: rank_at(found[name], share) for name, share in shares.items()}
    yield from truncated(case, found, ranks)


def scaled(weight: Float64[Tensor, "out into"], scale: Float64[Tensor, " into"]) -> Factors:
    """The SVD of W diag(scale), the scale undone."""
    left, values, right = torch.linalg.svd(weight * scale, full_matrices=False)
    return Factors((left * values).float(), (right / scale).float(), values.square())


def rank_at(factors: Factors, share: float) -> int | None:
    """The rank of a share of the parameters, None (dense) for all of them."""
    return None if share == 1 else pair_rank(factors.shape, share)


def sensitivities(case: Case, found: dict[str, Factors]) -> Sensitivity:
    """Mean nats per token with one matrix alone at each share; kept in the cache."""
    path = case.cache / "asvd_sensitivity.json"
    if not path.exists():
        watch = Watch(case, TOKENS)
        measured = {
            name: [
                watch.cross_entropy({name: factors.at(rank_at(factors, share))}) for share in SHARES
            ]
            for name, factors in found.items()
        }
        case.cache.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured))
    return {
        name: dict(zip(SHARES, losses, strict=True))
        for name, losses in json.loads(path.read_text()).items()
    }


def search(found: dict[str, Factors], sensitivity: Sensitivity, keep: float) -> dict[str, float]:
    """A share for every matrix: the least harmful are taken until the budget is met."""
    steps = sorted(
        (loss, name, share)
        for name, losses in sensitivity.items()
        for share, loss in losses.items()
    )
    full = {name: factors.shape[0] * factors.shape[1] for name, factors in found.items()}
    shares, sizes = dict.fromkeys(found, 1.0), dict(full)
    for _, name, share in steps:
        if share < shares[name]:
            shape = found[name].shape
            shares[name], sizes[name] = share, pair_params(shape, pair_rank(shape, share))
        if sum(sizes.values()) <= keep * sum(full.values()):
            return shares
    raise ValueError("no allocation fits the budget")


def input_means(case: Case) -> dict[str, Tensor]:
    """Mean |x| of every input of every linear over the calibration windows; kept in the cache."""
    path = case.cache / "input_means.safetensors"
    if not path.exists():
        case.cache.mkdir(parents=True, exist_ok=True)
        save_file(_measure(case), path)
    return load_file(path)


@torch.no_grad()
def _measure(case: Case) -> dict[str, Tensor]:
    means: dict[str, Tensor] = {}
    hidden = embed(case.source, case.windows)
    for index in range(case.source.config.num_hidden_layers):
        block = build_block(case.source, index)
        sums: dict[str, Tensor] = {}
        hooks = [
            block.get_submodule(members[0]).register_forward_pre_hook(_summing(sums, group))
            for group, members in INPUTS.items()
        ]
        hidden = torch.cat([run_block(block, window[None]) for window in hidden])
        for hook in hooks:
            hook.remove()
        for group, members in INPUTS.items():
            for member in members:
                mean = (sums[group] / case.windows.numel()).float().clone()
                means[f"model.layers.{index}.{member}"] = mean
    return means


def _summing(sums: dict[str, Tensor], group: str):
    def add(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        total = arguments[0].flatten(0, -2).abs().double().sum(0)
        sums[group] = sums.get(group, 0) + total

    return add
