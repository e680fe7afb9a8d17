"""Meta folders: any number of shards gives the same tensors as transformers holds."""

from __future__ import annotations

import logging

import pytest
import torch

from qll.errors import ConfigError, MissingFileError, MissingTensorError, ShapeError
from qll.load import open_source
from tests.checkpoints import (
    LLAMA_3_ROPE,
    assert_same,
    meta_weights,
    weights,
    write_hf_original,
    write_meta_folder,
)
from tests.conftest import make_tiny_llama


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("embedding_cut", [0, 1])
def test_shards_merge_to_the_model(tmp_path, tiny_llama, shards, embedding_cut):
    folder = write_meta_folder(tiny_llama, tmp_path / "meta", shards, embedding_cut)
    source = open_source(folder)
    assert_same(source, tiny_llama)
    assert (source.format, source.row_order, source.name) == ("meta", "interleaved", "meta")


def test_config_is_that_of_the_model(tiny_meta_folder, tiny_llama):
    config = open_source(tiny_meta_folder).config
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
    ):
        assert getattr(config, key) == getattr(tiny_llama.config, key), key


@pytest.mark.parametrize(
    ("params", "width"),
    [
        ({"dim": 4096, "multiple_of": 256}, 11008),  # Llama 2 7B
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),  # Llama 2 70B
        ({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),  # Llama 3 8B
        ({"dim": 16384, "multiple_of": 4096, "ffn_dim_multiplier": 1.2}, 53248),  # Llama 3.1 405B
        ({"dim": 2048, "multiple_of": 256, "ffn_dim_multiplier": 1.5}, 8192),  # Llama 3.2 1B
        ({"dim": 3072, "multiple_of": 256, "ffn_dim_multiplier": 1.0}, 8192),  # Llama 3.2 3B
    ],
)
def test_feed_forward_width_of_published_models(tmp_path, params, width):
    from qll.load.params import meta_config

    base = {"n_layers": 1, "n_heads": 32, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 5e5}
    config = meta_config({**base, **params}, tmp_path / "params.json", {}, tied=False)
    assert config.intermediate_size == width


@pytest.mark.parametrize(("tied", "factor"), [(False, 8.0), (True, 32.0)])
def test_scaled_rope_of_llama_3(tmp_path, caplog, tied, factor):
    model = make_tiny_llama(tied=tied, rope_parameters=LLAMA_3_ROPE | {"factor": factor})
    with caplog.at_level(logging.WARNING, "qll.load"):
        source = open_source(write_meta_folder(model, tmp_path / "meta"))
    assert source.config.rope_parameters == LLAMA_3_ROPE | {"factor": factor}
    assert "use_scaled_rope" in caplog.text
    assert ("tied" in caplog.text) == tied
    assert_same(source, model)


def test_stated_rope_factor_wins(tmp_path):
    model = make_tiny_llama(rope_parameters=LLAMA_3_ROPE)
    folder = write_meta_folder(model, tmp_path / "m", changes={"rope_scaling_factor": 16})
    assert open_source(folder).config.rope_parameters["factor"] == 16.0


def test_llama_2_has_neither_vocabulary_nor_base(tmp_path, caplog, tiny_llama):
    changes = {"vocab_size": -1, "rope_theta": None, "n_kv_heads": 2}
    folder = write_meta_folder(tiny_llama, tmp_path / "m", 2, embedding_cut=1, changes=changes)
    with caplog.at_level(logging.WARNING, "qll.load"):
        source = open_source(folder)
    assert source.config.vocab_size == tiny_llama.config.vocab_size
    assert source.config.rope_parameters["rope_theta"] == 10000.0
    assert "rope_theta" in caplog.text
    assert_same(source, tiny_llama)


def test_params_without_rope_are_refused(tmp_path, tiny_llama):
    folder = write_meta_folder(tiny_llama, tmp_path / "m", changes={"rope_theta": None})
    with pytest.raises(ConfigError, match="rope_theta"):
        open_source(folder)


def test_old_format_is_read_without_mapping(tmp_path, caplog, tiny_llama):
    folder = write_meta_folder(tiny_llama, tmp_path / "m", 2, legacy=True)
    with caplog.at_level(logging.WARNING, "qll.load"):
        source = open_source(folder)
    assert "old format" in caplog.text
    assert_same(source, tiny_llama)


def test_hugging_face_folder_with_original_only(tmp_path, tiny_llama):
    source = open_source(write_hf_original(tiny_llama, tmp_path / "hf", shards=2))
    assert_same(source, tiny_llama)
    assert (source.format, source.name) == ("meta", "hf")
    assert source.config.max_position_embeddings == 256  # from config.json


def test_folder_around_original_without_config(tmp_path, tiny_llama):
    write_meta_folder(tiny_llama, tmp_path / "model" / "original")
    assert_same(open_source(tmp_path / "model"), tiny_llama)


def test_stored_head_equal_to_the_table_means_tied(tmp_path):
    model = make_tiny_llama(tied=True)
    table = weights(model)["model.embed_tokens.weight"]
    for shards in (1, 2):
        folder = tmp_path / f"m{shards}"
        write_meta_folder(model, folder, shards, extra={"output.weight": table})
        source = open_source(folder)
        assert source.config.tie_word_embeddings
        assert_same(source, model)


def test_rotary_table_is_skipped(tmp_path, tiny_llama):
    folder = write_meta_folder(tiny_llama, tmp_path / "m", 2, extra={"rope.freqs": torch.ones(8)})
    assert_same(open_source(folder), tiny_llama)


def test_unknown_tensor_is_refused(tmp_path, tiny_llama):
    extra = {"layers.0.attention.wq.bias": torch.ones(64)}
    folder = write_meta_folder(tiny_llama, tmp_path / "m", extra=extra)
    with pytest.raises(MissingTensorError, match=r"wq\.bias"):
        open_source(folder)


@pytest.mark.parametrize("gone", [0, 1, 3])
def test_missing_shard_is_named(tmp_path, tiny_llama, gone):
    folder = write_meta_folder(tiny_llama, tmp_path / "m", 4)
    (folder / f"consolidated.{gone:02d}.pth").unlink()
    with pytest.raises(MissingFileError, match=f"{gone:02d}.pth"):
        open_source(folder)


def test_shards_of_two_models_are_refused(tmp_path, tiny_llama):
    other = make_tiny_llama(seed=1)
    folder = write_meta_folder(tiny_llama, tmp_path / "a", 2)
    stranger = write_meta_folder(other, tmp_path / "b", 2)
    (stranger / "consolidated.01.pth").replace(folder / "consolidated.01.pth")
    source = open_source(folder)
    with pytest.raises(Exception, match="different copies"):
        source.read("model.norm.weight")


def test_wrong_width_is_a_shape_error(tmp_path, tiny_llama):
    folder = write_meta_folder(tiny_llama, tmp_path / "m", changes={"multiple_of": 256})
    with pytest.raises(ShapeError, match="gate_proj"):
        open_source(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vision_chunk_size", 448),
        ("moe_args", {"num_experts": 16}),
        ("quantization_args", {"group_size": 32}),
        ("n_heads", True),
        ("n_heads", 10**12),
        ("dim", -64),
        ("norm_eps", float("nan")),
        ("n_kv_heads", 3),
        ("use_scaled_rope", "yes"),
    ],
)
def test_params_we_do_not_implement_are_refused(tmp_path, tiny_llama, key, value):
    folder = write_meta_folder(tiny_llama, tmp_path / "m", changes={key: value})
    with pytest.raises(ConfigError):
        open_source(folder)


def test_names_and_rows_of_meta_are_not_ours(tiny_meta_folder, tiny_llama):
    """The file really is interleaved: reading it unpermuted would differ."""
    raw = meta_weights(tiny_llama)["layers.0.attention.wq.weight"]
    read = open_source(tiny_meta_folder).read("model.layers.0.self_attn.q_proj.weight")
    assert not torch.equal(raw, read)
    assert torch.equal(raw.sort(0).values, read.sort(0).values)
