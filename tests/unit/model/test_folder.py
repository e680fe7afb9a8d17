"""A converted folder: opens with transformers, computes the same, saves, reloads, dequantises."""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from qll.errors import CheckpointError, ConfigError, IntegrityError, MissingFileError
from qll.model import LlamaTNForCausalLM, TNConfig, check_fingerprint, load, logits_fingerprint
from qll.model.swap import TN_MODULES
from qll.tn import JOINTS, NETWORKS
from qll.tn.network import NetworkSpec
from tests.conftest import make_tiny_llama
from tests.unit.model.conftest import write_folder


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_full_rank_equals_the_dense_model(full_pair, ids):
    model, folder = full_pair
    converted = load(folder)
    torch.testing.assert_close(logits(converted, ids), logits(model, ids), atol=1e-5, rtol=0)
    networks = [m for m in converted.modules() if isinstance(m, TN_MODULES)]
    assert len(networks) == 2 * 9 + 2


def test_auto_classes_open_it(small_folder, ids):
    model, info = AutoModelForCausalLM.from_pretrained(small_folder, output_loading_info=True)
    assert type(model) is LlamaTNForCausalLM
    assert not any(info.values())
    assert not model.training
    torch.testing.assert_close(logits(model, ids), logits(load(small_folder), ids), atol=0, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(small_folder)
    assert tokenizer.decode(tokenizer("tensor")["input_ids"]) == "tensor"


def test_every_format_in_one_model(tmp_path, ids):
    """Each network format somewhere in a block, at full rank: the dense logits come back."""
    model = make_tiny_llama(seed=6)
    modes = {"out": (8, 16), "in": (8, 8)}
    formats = {"mpo": modes, "kron": modes, "tree": modes, "tucker": {"stack": (4, 32, 64)}}
    places = [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up")]
    entries = {
        (path,): full_rank(NETWORKS[name], NetworkSpec(name, (128, 64), modes=formats[name]))
        for path, name in zip(places, formats, strict=True)
    }
    attention = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")
    heads = {"heads": (4, 2, 2, 4), "d_head": (16,), "d_model": (64,)}
    shapes = ((64, 64), (32, 64), (32, 64), (64, 64))
    spec = NetworkSpec("joint_tucker", (192, 64), modes=heads, members=shapes)
    entries[attention] = full_rank(JOINTS["joint_tucker"], spec)
    converted = load(write_folder(tmp_path / "formats", model, entries=entries))
    assert {spec.format for spec in converted.config.entries.values()} == {*formats, "joint_tucker"}
    torch.testing.assert_close(logits(converted, ids), logits(model, ids), atol=1e-5, rtol=0)
    dense = converted.dequantize()
    torch.testing.assert_close(logits(dense, ids), logits(model, ids), atol=1e-5, rtol=0)


def full_rank(format, spec):
    return spec.with_ranks(format.max_ranks(spec)).with_gauge("interpolative")


def test_truncation_saves_parameters_and_the_gauge_saves_more(small_folder):
    model = load(small_folder)
    floats = sum(p.numel() for p in model.parameters())
    dense = LlamaForCausalLM(load(small_folder).config)
    assert floats < 0.5 * sum(p.numel() for p in dense.parameters())


def test_save_and_reload_is_bit_exact(small_folder, tmp_path, ids):
    model = load(small_folder)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model, ids), logits(again, ids))
    files = {path.name for path in (tmp_path / "again").iterdir()}
    assert {"modeling_qll.py", "qll_manifest.json", "config.json"} <= files
    assert "llama_tn.py" not in files
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_qll.LlamaTNForCausalLM"
    assert config["original_architecture"] == "LlamaForCausalLM"
    assert config["architectures"] == ["LlamaTNForCausalLM"]


def test_generate_and_the_cache(small_folder, ids):
    model = load(small_folder)
    made = model.generate(ids[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    plain = ids[:1]
    for _ in range(6):
        scores = logits(model, plain)[:, -1]
        scores[:, model.config.eos_token_id] = -torch.inf
        plain = torch.cat([plain, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, plain)


def test_dequantize_gives_plain_linears(small_folder, tmp_path, ids):
    model = load(small_folder)
    expected = logits(model, ids)
    tied = model.config.tie_word_embeddings
    dense = model.dequantize()
    assert not any(isinstance(module, TN_MODULES) for module in dense.modules())
    assert type(dense.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert type(dense.model.embed_tokens) is torch.nn.Embedding
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
    assert not hasattr(dense.model.layers[0].self_attn, "qkv")
    torch.testing.assert_close(logits(dense, ids), expected, atol=1e-5, rtol=0)
    dense.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(load(tmp_path / "dense"), ids), logits(dense, ids))


def test_deepcopy_pickle_and_dtype(small_folder, ids):
    model = load(small_folder)
    expected = logits(model, ids)
    copied = copy.deepcopy(model)
    assert copied.model.layers[0].self_attn.q_proj.group is copied.model.layers[0].self_attn.qkv
    assert copied.model.layers[0].self_attn.qkv is not model.model.layers[0].self_attn.qkv
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(copied, ids), expected)
    block = pickle.loads(pickle.dumps(copied.model.layers[0]))
    hidden = torch.randn(1, 3, 64)
    twin = copied.model.layers[0].self_attn.v_proj
    assert torch.equal(block.self_attn.v_proj(hidden), twin(hidden))
    half = copied.to(torch.bfloat16)
    drift = logits(half, ids).float() - expected
    assert 0 < drift.square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()
    assert half.model.layers[0].self_attn.qkv.indices.get_buffer("0").dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_load_in_another_dtype_passes_the_fingerprint(small_folder, dtype):
    model = load(small_folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}


def edited(folder, tmp_path, change):
    """A copy of `folder` whose tensors were changed by `change`, with no manifest."""
    copied = tmp_path / "edited"
    shutil.copytree(folder, copied)
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


def drop_core(tensors):
    del tensors["model.layers.1.self_attn.o_proj.cores.0"]


def drop_pivots(tensors):
    del tensors["model.layers.0.self_attn.qkv.indices.0"]


def drop_norm(tensors):
    del tensors["model.norm.weight"]


def add_weight(tensors):
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 128)


def cut_core(tensors):
    name = "model.layers.1.self_attn.o_proj.cores.1"
    tensors[name] = tensors[name][1:].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_core, r"tensor is missing .*o_proj\.cores\.0"),
        (drop_pivots, r"tensor is missing .*qkv\.indices\.0"),
        (drop_norm, r"tensor is missing .*model\.norm\.weight"),
        (add_weight, r"no place in this model .*down_proj\.weight"),
        (cut_core, r"wrong shape .*o_proj\.cores\.1 \(file \(15, 64\), config \(16, 64\)\)"),
    ],
)
def test_no_invented_weight_survives_a_load(small_folder, tmp_path, change, message):
    folder = edited(small_folder, tmp_path, change)
    with pytest.raises(IntegrityError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(IntegrityError, match=message):
        load(folder, verify=False)


def test_stock_class_is_refused(small_folder):
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        LlamaForCausalLM.from_pretrained(small_folder)


def test_conversion_on_the_fly_is_refused(full_pair):
    _, folder = full_pair
    dense = folder.with_name(folder.name + "_dense")
    with pytest.raises(ValueError, match="pre-quantized"):
        LlamaForCausalLM.from_pretrained(dense, quantization_config=TNConfig())


def test_load_checks_bytes_then_logits(small_folder, tmp_path):
    def scale(tensors):
        tensors["model.layers.0.self_attn.o_proj.cores.1"] *= 3.0

    folder = edited(small_folder, tmp_path, scale)
    with pytest.raises(IntegrityError, match="changed since it was written"):
        load(folder)
    model = load(folder, verify=False)
    stored = json.loads((small_folder / "qll_manifest.json").read_text())["logits_fingerprint"]
    with pytest.raises(IntegrityError, match="other logits"):
        check_fingerprint(model, stored, where=folder)


def test_fingerprint_sees_a_changed_rope(small_folder):
    model = load(small_folder)
    stored = logits_fingerprint(model)
    assert check_fingerprint(model, stored, where="here") == 0
    model.model.rotary_emb.inv_freq *= 1.5
    with pytest.raises(IntegrityError, match="other logits"):
        check_fingerprint(model, stored, where="here")


def test_folders_that_are_none(tmp_path, tiny_hf_folder, small_folder):
    with pytest.raises(MissingFileError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match=r"config\.json"):
        load(tmp_path)
    with pytest.raises(IntegrityError, match="not a converted checkpoint"):
        load(tiny_hf_folder)
    shutil.copytree(small_folder, tmp_path / "torn")
    (tmp_path / "torn" / "qll_manifest.json").unlink()
    with pytest.raises(IntegrityError, match="never finished"):
        load(tmp_path / "torn")


def rewritten(small_folder, tmp_path, change):
    """A copy of the folder with an edited quantization_config."""
    folder = tmp_path / "rewritten"
    shutil.copytree(small_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def newer(quantization):
    quantization["format_version"] = 2


def unknown_format(quantization):
    next(iter(quantization["modules"].values()))["format"] = "peps"


def unknown_path(quantization):
    quantization["modules"]["model.layers.9.mlp.down_proj"] = quantization["modules"][
        "model.layers.0.mlp.down_proj"
    ]


def other_shape(quantization):
    quantization["modules"]["model.layers.0.mlp.down_proj"]["shape"] = [64, 10**9]


def no_spec(quantization):
    quantization["modules"]["model.layers.0.mlp.down_proj"] = {"format": "lowrank"}


def of_down(**changes):
    """A change of the spec of one low-rank matrix."""

    def change(quantization):
        quantization["modules"]["model.layers.0.mlp.down_proj"] |= changes

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_down(ranks=[-5]), "not the spec of a tensor network"),
        (of_down(ranks=[10**12]), r"impossible ranks \(expected at most \(64,\)"),
        (of_down(ranks=[2, 2]), "impossible ranks"),
        (of_down(ranks=["a"]), r"cannot be read|not the spec"),
        (of_down(gauge="left"), "not the spec of a tensor network"),
        (of_down(format="mpo"), "do not belong to the format mpo"),
        (newer, "another format version"),
        (unknown_format, "unknown tensor network format .*peps"),
        (unknown_path, r"no such matrix"),
        (other_shape, r"another shape .*1000000000"),
        (no_spec, "cannot be read"),
    ],
)
def test_config_that_lies(small_folder, tmp_path, change, message):
    folder = rewritten(small_folder, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder, verify=False)
