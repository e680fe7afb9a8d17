"""Names, shapes and row order of the three layouts."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qll.load.names import (
    expected_specs,
    gguf_name,
    half_split_rows,
    hf_name_of_gguf,
    hf_name_of_meta,
    is_skipped,
    meta_name,
)
from tests.checkpoints import GGUF_INNER, META_INNER, interleaved
from tests.conftest import make_tiny_llama


@pytest.mark.parametrize("tied", [False, True])
def test_expected_specs_are_those_of_transformers(tied):
    model = make_tiny_llama(tied=tied, num_key_value_heads=1, head_dim=24)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        state.pop("lm_head.weight")
    assert expected_specs(model.config) == state
    assert list(expected_specs(model.config)) == list(state)  # model order


def test_expected_specs_of_llama_3_8b():
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    specs = expected_specs(config)
    total = sum(torch.Size(shape).numel() for shape in specs.values())
    assert len(specs) == 291
    assert total == 8_030_261_248  # the published parameter count


@pytest.mark.parametrize("inner", META_INNER)
def test_names_go_there_and_back(inner):
    name = f"model.layers.12.{inner}.weight"
    assert meta_name(name) == f"layers.12.{META_INNER[inner]}.weight"
    assert gguf_name(name) == f"blk.12.{GGUF_INNER[inner]}.weight"
    assert hf_name_of_meta(meta_name(name)) == name
    assert hf_name_of_gguf(gguf_name(name)) == name


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm", "lm_head"])
def test_outer_names_go_there_and_back(name):
    assert hf_name_of_meta(meta_name(f"{name}.weight")) == f"{name}.weight"
    assert hf_name_of_gguf(gguf_name(f"{name}.weight")) == f"{name}.weight"


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attention.wq.bias",
        "layers.x.attention.wq.weight",
        "layers.00.attention.wq.weight",
        "blk.\u0663.attn_q.weight",
        f"blk.{'9' * 5000}.attn_q.weight",
        "",
    ],
)
def test_foreign_names_are_left_alone(name):
    assert hf_name_of_meta(name) == name
    assert hf_name_of_gguf(name) == name


def test_only_rotary_tables_are_skipped():
    skipped = ["model.layers.3.self_attn.rotary_emb.inv_freq", "rope.freqs", "rope_freqs.weight"]
    assert all(is_skipped(name) for name in skipped)
    kept = ["model.layers.3.self_attn.q_proj.bias", "lm_head.weight", "xrope.freqs"]
    assert not any(is_skipped(name) for name in kept)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 6), (4, 16)])
def test_half_split_undoes_interleaving(heads, head_dim):
    matrix = torch.arange(heads * head_dim * 5.0).view(heads * head_dim, 5)
    assert torch.equal(interleaved(matrix, heads)[half_split_rows(heads, head_dim)], matrix)


def test_half_split_is_the_rotation_of_transformers():
    """A rotation by interleaved pairs equals transformers' rotation after the permutation."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, head_dim = 2, 8
    vector = torch.randn(heads * head_dim, generator=torch.Generator().manual_seed(0))
    angles = torch.rand(head_dim // 2, generator=torch.Generator().manual_seed(1))
    pairs = torch.view_as_complex(vector.view(heads, head_dim // 2, 2))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones(4), angles)).flatten()
    order = half_split_rows(heads, head_dim)
    query = vector[order].view(1, heads, 1, head_dim)
    both = torch.cat([angles, angles]).view(1, 1, -1)
    rotated, _ = apply_rotary_pos_emb(query, query, both.cos(), both.sin())
    torch.testing.assert_close(rotated.flatten(), turned[order])


def test_state_dict_has_no_name_we_do_not_know(tiny_llama: LlamaForCausalLM):
    for name in expected_specs(tiny_llama.config):
        assert hf_name_of_meta(meta_name(name)) == name
