"""Groups with fewer channels in a Llama: exact at full rank, narrow inside, saved, exported."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from qll.evaluate import cost
from qll.model import export_dense, load
from qll.model.dense import CACHE_ARGUMENT
from qll.tn import JOINTS, tensor_shapes
from qll.tn.network import NetworkSpec
from tests.conftest import make_tiny_llama
from tests.unit.model.conftest import write_folder

D, F, Q, KV, HEAD = 64, 128, 4, 2, 16
HEADS = {"heads": (Q, KV), "d_head": (HEAD,)}


def entries_of(layers: int, ranks: dict[str, tuple[int, ...]] | None, gauge: str):
    """Every block as the three inner formats; ranks None: full."""
    specs = {
        ("mlp", ("gate_proj", "up_proj", "down_proj")): NetworkSpec(
            "joint_channels", (2 * F + D, D), gauge=gauge, members=((F, D), (F, D), (D, F))
        ),
        ("self_attn", ("v_proj", "o_proj")): NetworkSpec(
            "joint_value_output",
            (KV * HEAD + D, D),
            modes=HEADS,
            gauge=gauge,
            members=((KV * HEAD, D), (D, Q * HEAD)),
        ),
        ("self_attn", ("q_proj", "k_proj")): NetworkSpec(
            "joint_query_key",
            ((Q + KV) * HEAD, D),
            modes=HEADS,
            gauge=gauge,
            members=((Q * HEAD, D), (KV * HEAD, D)),
        ),
    }
    entries = {}
    for block in range(layers):
        for (parent, names), spec in specs.items():
            members = tuple(f"model.layers.{block}.{parent}.{name}" for name in names)
            chosen = JOINTS[spec.format].max_ranks(spec) if ranks is None else ranks[spec.format]
            entries[members] = spec.with_ranks(chosen)
    return entries


SMALL = {
    "joint_channels": (40, 24, 40, 16),
    "joint_value_output": (8, 20),
    "joint_query_key": (5,),
}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("gauge", ["none", "interpolative"])
def test_full_rank_gives_the_dense_logits(gauge, tmp_path, ids):
    dense = make_tiny_llama(seed=6)
    folder = write_folder(tmp_path / "full", dense, entries=entries_of(2, None, gauge))
    model = load(folder)
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), atol=1e-5, rtol=1e-5)
    # a cache of keys and values sees the same
    with torch.no_grad():
        first = model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], **{CACHE_ARGUMENT: first.past_key_values}).logits
    torch.testing.assert_close(last, logits(dense, ids)[:, -1:], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    entries = entries_of(2, SMALL, "interpolative")
    return write_folder(
        tmp_path_factory.mktemp("inner") / "small", make_tiny_llama(seed=7), entries=entries
    )


def test_the_mlp_is_narrow_and_costs_what_it_stores(small):
    model = load(small)
    mlp = model.model.layers[0].mlp
    assert (mlp.gate_proj.out_features, mlp.up_proj.out_features) == (40, 40)
    assert (mlp.down_proj.in_features, mlp.down_proj.out_features) == (40, D)
    assert mlp.gate_proj.weight.shape == (F, D)
    assert mlp.up_proj(torch.zeros(1, 3, D)).shape == (1, 3, 40)
    stored = sum(tensor_shapes(spec).num_params for spec in model.config.entries.values())
    assert cost.count_params(model).blocks == stored


def test_a_dense_export_is_a_plain_llama_with_the_same_logits(small, tmp_path, ids):
    model = load(small)
    plain = LlamaForCausalLM.from_pretrained(export_dense(small, tmp_path / "dense")).eval()
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), atol=1e-4, rtol=1e-4)
    zero = (plain.model.layers[0].mlp.gate_proj.weight == 0).all(1)
    assert int(zero.sum()) == F - 40


def test_factors_can_be_trained(small, ids):
    model = load(small)
    model(ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if ".cores." in name]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
