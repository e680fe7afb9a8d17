"""ASVD (Yuan et al. 2023, arXiv 2312.05821): columns scaled by their activations before the SVD.

s_j = (mean |x_j|)^alpha, alpha = 0.5; W~ = SVD_r(W diag(s)) diag(s)^-1. Ranks are uniform: its
search for ranks of each layer, by the perplexity at nine ranks of every matrix, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float64
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.peers.case import Case, Replacement, linears, pair_params, pair_rank, stored
from qll.calibrate.moments import INPUTS
from qll.model import build_block, embed, run_block

ALPHA = 0.5
# added to every scale, as in the published code, so that a dead channel can be undone
FLOOR = 1e-6


def convert(case: Case) -> Iterator[tuple[str, Replacement]]:
    """Every matrix at its share, scaled by the mean activations of the calibration windows."""
    means = input_means(case)
    for name, weight, _ in linears(case):
        rank = pair_rank(weight.shape, case.keep)
        matrix = truncate(weight, means[name].double() ** ALPHA + FLOOR, rank)
        yield name, stored(matrix, pair_params(weight.shape, rank))


def truncate(
    weight: Float64[Tensor, "out into"], scale: Float64[Tensor, " into"], rank: int
) -> Float64[Tensor, "out into"]:
    """The truncated SVD of W diag(scale), the scale undone."""
    left, values, right = torch.linalg.svd(weight * scale, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank] / scale


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
