"""describe() counts what the architecture has, exactly."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from qll.cli import main
from qll.load.inspect import PARTS, describe, inspect_path, render
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


# parameters of all blocks, of their linears, and of one vocabulary matrix, worked out by hand
PARTS_OF_LLAMA_3 = {
    "8B": (6_979_584_000, 6_979_321_856, 525_336_576),
    "70B": (68_452_352_000, 68_451_041_280, 1_050_673_152),
    "405B": (401_650_679_808, 401_646_551_040, 2_101_346_304),
}
META_PARAMS = {
    "8B": {"multiple_of": 1024, "ffn_dim_multiplier": 1.3},
    "70B": {"multiple_of": 4096, "ffn_dim_multiplier": 1.3},
    "405B": {"multiple_of": 4096, "ffn_dim_multiplier": 1.2, "use_scaled_rope": True},
}


def write_bare(folder, size: str, layout: str):
    """A folder with nothing but the config file of Llama 3 `size`, as its publisher wrote it."""
    _, layers, width, hidden, heads = LLAMA_3[size]
    hf = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    }
    meta = {
        "dim": width,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        **META_PARAMS[size],
    }
    name, values = {"hf": ("config.json", hf), "meta": ("params.json", meta)}[layout]
    (folder / name).write_text(json.dumps(values))
    return folder / name


@pytest.mark.parametrize("layout", ["hf", "meta"])
@pytest.mark.parametrize("size", LLAMA_3)
def test_bare_config_of_any_size_is_enough(tmp_path, size, layout):
    total, layers, width, hidden, heads = LLAMA_3[size]
    blocks, linears, table = PARTS_OF_LLAMA_3[size]
    file = write_bare(tmp_path, size, layout)
    facts = inspect_path(tmp_path)
    assert facts == inspect_path(file)
    counts, sizes = facts["parameters"], facts["bytes"]
    assert (counts["total"], counts["blocks"], counts["block_linears"]) == (total, blocks, linears)
    assert (counts["embedding"], counts["lm_head"]) == (table, table)
    assert counts["attention"] + counts["mlp"] == linears
    assert {part: sizes[part] for part in PARTS} == {part: 2 * counts[part] for part in PARTS}
    assert sum(sizes[part] for part in PARTS) == sizes["total"] == 2 * total
    shapes = {row["tensor"]: (row["count"], *row["shape"]) for row in facts["connectivity"]}
    block = "model.layers.{i}."
    assert shapes[f"{block}self_attn.q_proj.weight"] == (layers, width, width)
    assert shapes[f"{block}self_attn.k_proj.weight"] == (layers, 1024, width)
    assert shapes[f"{block}mlp.down_proj.weight"] == (layers, width, hidden)
    assert shapes["lm_head.weight"] == (1, 128256, width)
    dimensions = facts["dimensions"]
    assert (dimensions["n_heads"], dimensions["n_kv_heads"], dimensions["d_head"]) == (
        heads,
        8,
        128,
    )


OTHER_FAMILIES = {
    # vocabulary, d_model, d_ff, blocks, heads, key/value heads, tied, published parameters
    "Llama 2 7B": (32000, 4096, 11008, 32, 32, 32, False, 6_738_415_616),
    "Llama 3.2 1B": (128256, 2048, 8192, 16, 32, 8, True, 1_235_814_400),
    "Llama 3.2 3B": (128256, 3072, 8192, 28, 24, 8, True, 3_212_749_824),
    "TinyLlama 1.1B": (32000, 2048, 5632, 22, 32, 4, False, 1_100_048_384),
    "SmolLM2 135M": (49152, 576, 1536, 30, 9, 3, True, 134_515_008),
}


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_totals_of_the_other_families_are_the_published_ones(family):
    vocab, width, hidden, layers, heads, kv_heads, tied, total = OTHER_FAMILIES[family]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
    assert describe(config)["parameters"]["total"] == total


def test_command_line_prints_the_tables_or_json(tmp_path, capsys):
    write_bare(tmp_path, "405B", "hf")
    assert main(["inspect", "--llama_dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "405,853,388,800" in text
    assert "not known without weight files" in text
    assert main(["inspect", "--llama_dir", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect_path(tmp_path)


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
