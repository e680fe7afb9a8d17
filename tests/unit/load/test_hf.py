"""Hugging Face folders, single and sharded, and what their config.json may say."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qll.errors import ConfigError, MissingFileError, MissingTensorError, ShapeError, UsageError
from qll.load import Source, expected_specs, open_source
from qll.load.config import hf_config
from qll.load.safetensors import read_safetensors
from tests.checkpoints import LLAMA_3_ROPE, assert_same, weights, write_hf_folder
from tests.conftest import make_tiny_llama

V4 = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def hf_copy(tmp_path, tiny_hf_folder) -> Path:
    """A copy of the tiny folder that a test may damage."""
    return Path(shutil.copytree(tiny_hf_folder, tmp_path / "copy"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "GONE"}))


def test_single_file(tiny_hf_folder, tiny_llama):
    source = open_source(tiny_hf_folder)
    assert isinstance(source, Source)
    assert_same(source, tiny_llama)
    assert (source.format, source.row_order) == ("hf", "half_split")
    assert source.bytes_on_disk == (tiny_hf_folder / "model.safetensors").stat().st_size


def test_sharded(tmp_path, tiny_llama):
    folder = write_hf_folder(tiny_llama, tmp_path, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_same(open_source(folder), tiny_llama)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(tmp_path, dtype):
    model = make_tiny_llama().to(dtype)
    source = open_source(write_hf_folder(model, tmp_path))
    assert {spec.dtype for spec in source.specs().values()} == {dtype}
    assert_same(source, model)


def test_tied_model_has_no_head(tmp_path):
    model = make_tiny_llama(tied=True)
    source = open_source(write_hf_folder(model, tmp_path))
    assert "lm_head.weight" not in source.specs()
    assert_same(source, model)
    with pytest.raises(MissingTensorError):
        source.read("lm_head.weight")


@pytest.mark.parametrize("equal", [True, False])
def test_head_stored_although_tied(tmp_path, equal):
    model = make_tiny_llama(tied=True)
    folder = write_hf_folder(model, tmp_path)
    state = weights(model)
    head = state["model.embed_tokens.weight"].clone()
    if not equal:
        head += 1
    save_file(state | {"lm_head.weight": head}, folder / "model.safetensors")
    if equal:
        assert_same(open_source(folder), model)
    else:
        with pytest.raises(ConfigError, match="tie_word_embeddings"):
            open_source(folder)


def test_old_rotary_buffers_are_skipped(hf_copy, tiny_llama):
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    save_file(weights(tiny_llama) | extra, hf_copy / "model.safetensors")
    assert_same(open_source(hf_copy), tiny_llama)


@pytest.mark.parametrize(
    ("extra", "error"),
    [
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, MissingTensorError),
        ({"model.norm.weight": torch.ones(63)}, ShapeError),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int32)}, ShapeError),
        ({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}, ShapeError),
        ({"model.embed_tokens.weight": torch.ones(512, 64, 1)}, ShapeError),
    ],
)
def test_tensors_that_do_not_fit_the_config(hf_copy, tiny_llama, extra, error):
    save_file(weights(tiny_llama) | extra, hf_copy / "model.safetensors")
    with pytest.raises(error, match=next(iter(extra)).replace(".", r"\.")):
        open_source(hf_copy)


def test_missing_tensor_is_named(hf_copy, tiny_llama):
    state = weights(tiny_llama)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, hf_copy / "model.safetensors")
    with pytest.raises(MissingTensorError, match=r"layers\.1\.mlp\.up_proj"):
        open_source(hf_copy)


def test_reads_are_fresh_and_leave_the_file_alone(hf_copy):
    source = open_source(hf_copy)
    before = (hf_copy / "model.safetensors").read_bytes()
    source.read("model.norm.weight").zero_()
    assert source.read("model.norm.weight").abs().sum() > 0
    assert (hf_copy / "model.safetensors").read_bytes() == before


def test_slices_follow_python(tiny_hf_folder):
    source = open_source(tiny_hf_folder)
    whole = source.read("lm_head.weight")
    for rows in (slice(-3, None), slice(500, 900), slice(5, 5), slice(9, 4), slice(None, 2)):
        assert torch.equal(source.read("lm_head.weight", rows=rows), whole[rows])
    with pytest.raises(UsageError):
        source.read("lm_head.weight", rows=slice(0, 10, 2))


def test_header_agrees_with_the_library(tiny_hf_folder):
    path = tiny_hf_folder / "model.safetensors"
    ours, theirs = read_safetensors(path), load_file(path)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor.read(0, tensor.spec.shape[0]), theirs[name])
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(ours)


@pytest.mark.parametrize("fixture", ["tiny_hf_folder", "tiny_meta_folder", "tiny_gguf_file"])
def test_sources_travel_to_other_processes(request, fixture, tiny_llama):
    source = open_source(request.getfixturevalue(fixture))
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint
    assert_same(again, tiny_llama)


def test_fingerprint_changes_with_weights_config_and_nothing_else(hf_copy, tmp_path, tiny_llama):
    first = open_source(hf_copy).fingerprint
    assert open_source(shutil.copytree(hf_copy, tmp_path / "same")).fingerprint == first
    state = weights(tiny_llama)
    state["model.norm.weight"][0] += 1
    save_file(state, hf_copy / "model.safetensors", metadata={"format": "pt"})
    assert open_source(hf_copy).fingerprint != first
    other = shutil.copytree(tmp_path / "same", tmp_path / "other")
    change_config(Path(other), rms_norm_eps=1e-6)
    assert open_source(other).fingerprint != first


# -- config.json -----------------------------------------------------------------------------------


def test_both_generations_of_rope():
    new = {"rope_type": "default", "rope_theta": 5e5}
    assert hf_config({**V4, "rope_theta": 5e5}, Path("c")).rope_parameters == new
    assert hf_config({**V4, "rope_parameters": new}, Path("c")).rope_parameters == new


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_llama_3_scaling_of_both_generations(key):
    scaling = {key: "llama3", **{k: v for k, v in LLAMA_3_ROPE.items() if k != "rope_type"}}
    theta = scaling.pop("rope_theta")
    old = hf_config({**V4, "rope_theta": theta, "rope_scaling": scaling}, Path("c"))
    new = hf_config({**V4, "rope_parameters": LLAMA_3_ROPE}, Path("c"))
    assert old.rope_parameters == new.rope_parameters == LLAMA_3_ROPE


def test_llama_2_states_no_base(caplog):
    with caplog.at_level(logging.WARNING, "qll.load"):
        config = hf_config({**V4, "rope_scaling": None}, Path("c"))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert "rope_theta" in caplog.text


def test_linear_scaling_reaches_transformers():
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model = make_tiny_llama(rope_parameters=rope)
    config = hf_config({**V4, "rope_parameters": rope}, Path("c"))
    assert config.rope_parameters == rope
    plain = make_tiny_llama().model.rotary_emb.inv_freq
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / 2)


@pytest.mark.parametrize("rope", [{}, {"rope_parameters": None}, {"rope_parameters": {}}])
def test_no_rope_names_both_keys(rope):
    with pytest.raises(ConfigError, match=r"rope_parameters.*rope_theta"):
        hf_config({**V4, **rope}, Path("config.json"))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral"},
        {"model_type": None},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"quantization_config": {"quant_method": "gptq"}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": ["llama3"], "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": "default"},
        {"rope_parameters": LLAMA_3_ROPE | {"high_freq_factor": 1.0}},
        {"rope_theta": -1.0},
        {"rope_theta": float("inf")},
        {"rope_theta": 10**400},
        {"rope_theta": True},
        {"rope_theta": "10000"},
        {"hidden_size": None},
        {"hidden_size": "64"},
        {"hidden_size": 63},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 2**40},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"rms_norm_eps": 0},
        {"tie_word_embeddings": "no"},
        {"max_position_embeddings": -1},
        {"initializer_range": 7.0},
        {"eos_token_id": "</s>"},
    ],
)
def test_configs_we_do_not_implement_are_refused(change):
    base = V4 if "rope_parameters" in change else V4 | {"rope_theta": 1e4}
    with pytest.raises(ConfigError):
        hf_config({**base, **change}, Path("config.json"))


def test_head_dim_may_differ_from_the_quotient(tmp_path):
    model = make_tiny_llama(head_dim=24)
    source = open_source(write_hf_folder(model, tmp_path))
    assert_same(source, model)
    assert expected_specs(source.config)["model.layers.0.self_attn.o_proj.weight"] == (64, 96)


# -- folders that are not checkpoints --------------------------------------------------------------


def test_folder_and_file_problems_have_their_class(tmp_path, hf_copy):
    with pytest.raises(MissingFileError, match="check the path"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="an empty folder"):
        open_source(tmp_path / "empty")
    (hf_copy / "model.safetensors").rename(hf_copy / "weights.safetensors")
    with pytest.raises(MissingFileError, match=r"weights\.safetensors"):
        open_source(hf_copy)


def test_git_lfs_pointer_is_recognised(hf_copy):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 16060556376\n"
    (hf_copy / "model.safetensors").write_text(pointer)
    with pytest.raises(MissingFileError, match="git lfs pull"):
        open_source(hf_copy)


def test_hub_cache_layout_is_accepted(tmp_path, hf_copy, tiny_llama):
    """snapshots/<commit>/file -> ../../blobs/<sha>: links that leave the folder, by design."""
    cache = tmp_path / "models--tiny"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in hf_copy.iterdir():
        file.rename(cache / "blobs" / f"sha-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    assert_same(open_source(snapshot), tiny_llama)
