"""MoDeGPT (Lin et al. 2024, arXiv 2408.09632): shrink the inner dimensions that matrices share.

MLP: the Nystrom approximation keeps some channels of gate and up and corrects down. Queries and
keys: CR keeps some rotary pairs of each key head. Values and outputs: a joint SVD per value head.
Blocks that change the stream little (1 - cos of input and output) lose more. Grouped queries as the
paper's appendix has them: scores and stacked outputs are summed over the heads of a group.

The paper tunes the temperature and the ridge by model; here they are fixed: see the constants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.peers.case import Case, Replacement, stored
from qll.calibrate import LinearMoments

TEMPERATURE = 0.1
MOST_SPARSE = 0.8
# of the mean diagonal of the channels' second moment
RIDGE = 1e-2

Moments = dict[str, LinearMoments]


def convert(case: Case) -> Iterator[tuple[str, Replacement]]:
    """Every block at the share its influence gives it."""
    config = case.source.config
    for index, sparsity in enumerate(sparsities(case.moments.block_influence, 1 - case.keep)):
        prefix = f"model.layers.{index}."
        moments = {
            name.removeprefix(prefix): value for name, value in case.moments.block(index).items()
        }
        weights = {name: case.source.read(f"{prefix}{name}.weight").double() for name in moments}
        for name, replacement in compress_block(weights, moments, config, 1 - sparsity):
            yield prefix + name, replacement


def sparsities(influence: Sequence[float], mean: float) -> list[float]:
    """L mean softmax(-influence / temperature), what is above MOST_SPARSE given to the others.

    >>> [round(value, 3) for value in sparsities([0.1, 0.1], 0.2)]
    [0.2, 0.2]
    """
    weights = torch.softmax(-torch.tensor(influence, dtype=torch.float64) / TEMPERATURE, dim=0)
    shares = weights * mean * len(influence)
    while (over := shares > MOST_SPARSE + 1e-12).any():
        excess = (shares[over] - MOST_SPARSE).sum()
        shares[over] = MOST_SPARSE
        free = shares < MOST_SPARSE
        shares[free] += excess * weights[free] / weights[free].sum()
    return shares.tolist()


def compress_block(
    weights: dict[str, Tensor], moments: Moments, config: LlamaConfig, keep: float
) -> Iterator[tuple[str, Replacement]]:
    """The seven linears of a block within `keep` of their parameters: rotary pairs and value
    dimensions rounded down, the MLP's channels what the rest pays for."""
    d_model, d_head, kv_heads = config.hidden_size, config.head_dim, config.num_key_value_heads
    group = config.num_attention_heads // kv_heads
    budget = keep * sum(weight.numel() for weight in weights.values())
    pairs, rank = max(1, int(keep * d_head / 2)), max(1, int(keep * d_head))

    query, key = weights["self_attn.q_proj"], weights["self_attn.k_proj"]
    moment = moments["self_attn.q_proj"].input
    kept = rotary_rows(query, key, moment, d_head, pairs)
    for name, weight, repeats in (("q_proj", query, group), ("k_proj", key, 1)):
        rows = torch.cat([head.repeat(repeats, 1) for head in kept.split(1)])
        matrix = _rows_kept(weight, rows, d_head)
        # which pairs are kept is stored once, beside the keys
        indices = pairs * kv_heads if name == "k_proj" else 0
        params = 2 * pairs * len(rows) * d_model + indices
        budget -= params
        yield f"self_attn.{name}", stored(matrix, params)

    value, output = weights["self_attn.v_proj"], weights["self_attn.o_proj"]
    value, output = joint_values(value, output, moments["self_attn.v_proj"].input, d_head, rank)
    for name, matrix, heads in (("v_proj", value, kv_heads), ("o_proj", output, group * kv_heads)):
        params = rank * heads * d_model
        budget -= params
        yield f"self_attn.{name}", stored(matrix, params)

    channels = max(1, min(config.intermediate_size, int(budget / (3 * d_model))))
    moment = moments["mlp.down_proj"].input / moments["mlp.down_proj"].tokens
    chosen = channels_kept(moment, channels)
    mask = torch.zeros(len(moment), 1, dtype=torch.float64).index_fill(0, chosen, 1.0)
    for name in ("gate_proj", "up_proj"):
        yield f"mlp.{name}", stored(weights[f"mlp.{name}"] * mask, channels * d_model)
    down = nystrom(weights["mlp.down_proj"], moment, chosen)
    yield "mlp.down_proj", stored(down, channels * d_model)


def rotary_rows(
    query: Float64[Tensor, "q d_model"],
    key: Float64[Tensor, "k d_model"],
    moment: Float64[Tensor, "d_model d_model"],
    d_head: int,
    pairs: int,
) -> Int64[Tensor, "kv_heads two_pairs"]:
    """Rows of a head to keep, per key head: the pairs (i, i + d_head / 2) of largest score.

    A row's score is the product of its second moments in the query and in the key,
    ||C_q^1/2 e_i||^2 ||C_k^1/2 e_i||^2, summed over the pair and the query heads of the group.
    """
    strength = ((query @ moment) * query).sum(1).reshape(-1, d_head)
    heads = ((key @ moment) * key).sum(1).reshape(-1, d_head)
    scores = strength.reshape(len(heads), -1, d_head).sum(1) * heads
    best = scores.reshape(len(heads), 2, -1).sum(1).topk(pairs, dim=1).indices
    return torch.cat([best, best + d_head // 2], dim=1)


def joint_values(
    value: Float64[Tensor, "v d_model"],
    output: Float64[Tensor, "d_model q"],
    moment: Float64[Tensor, "d_model d_model"],
    d_head: int,
    rank: int,
) -> tuple[Float64[Tensor, "v d_model"], Float64[Tensor, "d_model q"]]:
    """The values and outputs of every group at inner dimension `rank` with least output error.

    For a value head W_v with W_v G^1/2 = P S Q^T, the stacked outputs of its group times P S are
    truncated by SVD; directions V_r give S^-1 P^T W_v projected on V_r, and W_o P S V_r.
    """
    new_value, new_output = torch.zeros_like(value), torch.zeros_like(output)
    kv_heads = len(value) // d_head
    group = output.shape[1] // len(value)
    heads = output.reshape(len(output), kv_heads, group, d_head)
    for head in range(kv_heads):
        rows = slice(head * d_head, (head + 1) * d_head)
        covariance = value[rows] @ moment @ value[rows].T
        energies, left = torch.linalg.eigh((covariance + covariance.T) / 2)
        scale = energies.clamp(min=1e-12 * float(energies[-1])).sqrt()
        stacked = torch.cat([heads[:, head, member] for member in range(group)]) @ (left * scale)
        directions = torch.linalg.svd(stacked, full_matrices=False)[2][:rank]
        start = head * d_head
        new_value[start : start + rank] = (directions / scale) @ left.T @ value[rows]
        folded = (stacked @ directions.T).reshape(group, len(output), rank)
        for member in range(group):
            column = (head * group + member) * d_head
            new_output[:, column : column + rank] = folded[member]
    return new_value, new_output


def channels_kept(moment: Float64[Tensor, "n n"], channels: int) -> Int64[Tensor, " channels"]:
    """The channels of largest ridge leverage score [C (C + l I)^-1]_ii, ascending."""
    ridge = RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment + ridge))
    return inverse.diagonal().topk(channels, largest=False).indices.sort().values


def nystrom(
    down: Float64[Tensor, "d_model n"],
    moment: Float64[Tensor, "n n"],
    chosen: Int64[Tensor, " channels"],
) -> Float64[Tensor, "d_model n"]:
    """The output matrix on the chosen channels, W C[:, k] C[k, k]^-1: the least squares prediction
    of what all channels would have given; the columns of the others are zero."""
    some = moment[chosen][:, chosen]
    some = some + 1e-9 * some.diagonal().mean() * torch.eye(len(chosen), dtype=some.dtype)
    result = torch.zeros_like(down)
    result[:, chosen] = torch.linalg.solve(some, down @ moment[:, chosen], left=False)
    return result


def _rows_kept(weight: Tensor, rows: Tensor, d_head: int) -> Tensor:
    """`weight` with zero rows outside `rows` (per head)."""
    mask = torch.zeros(len(rows), d_head, dtype=weight.dtype).scatter(1, rows, 1.0)
    return weight * mask.reshape(-1, 1)
