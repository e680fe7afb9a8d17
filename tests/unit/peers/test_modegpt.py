"""MoDeGPT's parts: Nystrom, rotary pairs, joint values and outputs, budget."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.peers import load_method, modegpt


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_nystrom_is_the_least_squares_prediction():
    hidden, down = noise(300, 12) @ noise(12, 12, seed=1), noise(5, 12, seed=2)
    chosen = torch.tensor([0, 3, 4, 7, 11])
    found = modegpt.nystrom(down, hidden.T @ hidden, chosen)
    wanted = torch.linalg.lstsq(hidden[:, chosen], hidden @ down.T).solution.T
    assert torch.allclose(found[:, chosen], wanted, rtol=1e-5, atol=1e-8)
    assert int((found.abs().sum(0) > 0).sum()) == 5


def test_channels_that_others_span_go_first():
    hidden = noise(300, 8)
    hidden[:, 5] = hidden[:, 1] + 1e-3 * noise(300, seed=3)  # either of the two can go
    kept = modegpt.channels_kept(hidden.T @ hidden / 300, 7).tolist()
    assert len(kept) == 7
    assert len({1, 5} & set(kept)) == 1


def test_joint_values_lose_exactly_the_truncated_singular_values():
    d_model, d_head, kv_heads, group, rank = 24, 6, 2, 2, 4
    value, output = noise(12, d_model), noise(d_model, 24, seed=1)
    inputs = noise(200, d_model, seed=2)
    moment = inputs.T @ inputs
    new_value, new_output = modegpt.joint_values(value, output, moment, d_head, rank)
    for head in range(kv_heads):
        rows = slice(head * d_head, (head + 1) * d_head)
        maps, new = [], []
        for member in range(group):
            at = (head * group + member) * d_head
            maps.append(output[:, at : at + d_head] @ value[rows])
            new.append(new_output[:, at : at + d_head] @ new_value[rows])
        dense, low = torch.cat(maps) @ inputs.T, torch.cat(new) @ inputs.T
        tail = torch.linalg.svdvals(dense)[rank:]
        assert float((dense - low).norm()) == pytest.approx(float(tail.norm()), rel=1e-6)
    full = modegpt.joint_values(value, output, moment, d_head, d_head)
    assert torch.allclose(full[1][:, :6] @ full[0][:6], output[:, :6] @ value[:6], atol=1e-8)


def test_rotary_rows_come_in_pairs_and_by_strength():
    d_head, d_model = 8, 16
    query, key = noise(4 * d_head, d_model), noise(2 * d_head, d_model, seed=1)
    key[3] *= 100  # row 3 of the first key head, its partner is row 7
    rows = modegpt.rotary_rows(query, key, torch.eye(d_model).double(), d_head, 2)
    assert rows.shape == (2, 4)
    assert {3, 7} <= set(rows[0].tolist())
    for head in rows:
        assert torch.equal(head[:2] + d_head // 2, head[2:])


def test_dropped_pairs_leave_attention_a_sum_over_kept_pairs(tiny_case, tiny_llama):
    """All pairs, all dimensions, all channels: the model is unchanged."""
    case = tiny_case(keep=1.0)
    changed = copy.deepcopy(tiny_llama)
    for name, item in load_method("modegpt")(case):
        changed.get_submodule(name).weight.data = item.matrix
    with torch.no_grad():
        before, after = tiny_llama(case.windows).logits, changed(case.windows).logits
    # one channel pays for the indices of the rotary pairs
    assert torch.nn.functional.mse_loss(before, after) < 1e-3 * before.var()


def test_sparsities_keep_their_mean_and_their_limit():
    influence = [0.01, 0.02, 0.4, 0.5]
    found = modegpt.sparsities(influence, 0.5)
    assert sum(found) / 4 == pytest.approx(0.5)
    assert max(found) <= modegpt.MOST_SPARSE + 1e-9
    assert found[2] > found[3]


@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_the_budget_is_exact_and_counts_what_is_not_zero(tiny_case, keep):
    case = tiny_case(keep=keep)
    found = dict(load_method("modegpt")(case))
    dense = sum(item.matrix.numel() for item in found.values())
    params = sum(item.params for item in found.values())
    assert 0.97 * keep * dense < params <= keep * dense
    nonzero = sum(int((item.matrix != 0).sum()) for item in found.values())
    indices = params - nonzero
    assert 0 < indices <= 2 * 2 * 8  # rotary pairs kept: blocks x key heads x pairs
