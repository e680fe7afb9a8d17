"""describe() counts what the architecture has, exactly."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from qll.load.inspect import describe, render
from qll.load.source import open_source
from tests.conftest import make_tiny_llama

LLAMA_3 = {
    "8B": (8_030_261_248, 32, 4096, 14336, 32),
    "70B": (70_553_706_496, 80, 8192, 28672, 64),
    "405B": (405_853_388_800, 126, 16384, 53248, 128),
}


def llama_3(size: str) -> LlamaConfig:
    _, layers, width, hidden, heads = LLAMA_3[size]
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
    )


@pytest.mark.parametrize("size", LLAMA_3)
def test_llama_3_totals_are_the_published_ones(size):
    facts = describe(llama_3(size))
    assert facts["parameters"]["total"] == LLAMA_3[size][0]
    assert facts["bytes"]["total"] == 2 * LLAMA_3[size][0]
    assert (facts["source_format"], facts["row_order"]) == (None, None)


def test_counts_of_8b_by_hand():
    parameters = describe(llama_3("8B"))["parameters"]
    attention = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
    mlp = 32 * 3 * 4096 * 14336
    assert parameters["attention"] == attention
    assert parameters["mlp"] == mlp
    assert parameters["embedding"] == parameters["lm_head"] == 128256 * 4096
    assert parameters["norms"] == 65 * 4096
    assert parameters["block_linears"] == attention + mlp
    assert parameters["blocks"] == attention + mlp + 64 * 4096


@pytest.mark.parametrize("tied", [False, True])
def test_total_equals_what_transformers_allocates(tied):
    model = make_tiny_llama(tied=tied)
    facts = describe(model.config)
    assert facts["parameters"]["total"] == model.num_parameters()
    in_rows = sum(row["count"] * row["params"] for row in facts["connectivity"])
    assert in_rows == model.num_parameters()
    assert (facts["parameters"]["lm_head"] == 0) == tied


def test_source_adds_format_row_order_dtype_and_bytes(tmp_path):
    make_tiny_llama().bfloat16().save_pretrained(tmp_path)
    source = open_source(tmp_path)
    facts = describe(source.config, source)
    assert facts["source_format"] == "hf"
    assert facts["row_order"] == "half_split"
    assert facts["bytes"]["dtype"] == "bfloat16"
    assert facts["bytes"]["total"] == 2 * facts["parameters"]["total"]
    assert facts["bytes"]["on_disk"] == (tmp_path / "model.safetensors").stat().st_size


def test_row_order_of_the_embedded_model_is_stated(smollm2_source):
    facts = describe(smollm2_source.config, smollm2_source)
    assert facts["row_order"] == "interleaved"
    assert "permuted to half_split" in render(facts)


def test_facts_are_json():
    facts = describe(llama_3("8B"))
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("size", LLAMA_3)
def test_render_shows_every_tensor_within_120_columns(size):
    facts = describe(llama_3(size))
    text = render(facts)
    assert f"{LLAMA_3[size][0]:,}" in text
    assert all(row["tensor"] in text for row in facts["connectivity"])
    assert max(map(len, text.splitlines())) <= 120
    assert text.isascii()


def test_wiring_says_what_grouped_heads_and_tied_heads_do():
    rows = {
        row["tensor"]: row for row in describe(make_tiny_llama(tied=True).config)["connectivity"]
    }
    assert rows["model.layers.{i}.self_attn.k_proj.weight"]["shape"] == [32, 64]
    assert "logits" in rows["model.embed_tokens.weight"]["writes"]
    assert "lm_head.weight" not in rows
