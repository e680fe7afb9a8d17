"""Autoencoders written by eai-sparsify and sae-lens compute here what they compute there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qll.lens import load_sae
from qll.load.sae import find_saes
from qll.load.sae_write import write_saelens, write_sparsify

GOLDEN = Path(__file__).parents[1] / "golden"
ANSWERS = load_file(GOLDEN / "saes.safetensors")
NAMES = sorted(name.removesuffix("/codes") for name in ANSWERS if name.endswith("/codes"))
TOLERANCE = 1e-5


def opened(name: str, **options):
    return load_sae(GOLDEN / "saes", name, **options)


def require_same(sae, name: str) -> None:
    codes = sae.encode(ANSWERS["x"])
    torch.testing.assert_close(
        codes.dense(sae.spec.d_sae), ANSWERS[f"{name}/codes"], rtol=TOLERANCE, atol=TOLERANCE
    )
    out = sae.decode(codes, ANSWERS["x"])
    torch.testing.assert_close(out, ANSWERS[f"{name}/out"], rtol=TOLERANCE, atol=TOLERANCE)


def test_every_folder_has_an_answer():
    assert sorted(find_saes(GOLDEN / "saes")) == NAMES
    assert len(NAMES) >= 22


@pytest.mark.parametrize("name", NAMES)
def test_same_codes_and_output(name):
    require_same(opened(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_same_from_the_file_in_blocks(name, monkeypatch):
    monkeypatch.setattr("qll.lens.sae.BLOCK_BYTES", 200)
    sae = opened(name, memory_bytes=0)
    assert not sae.stored.encoder.in_memory
    require_same(sae, name)


@pytest.mark.parametrize(
    ("name", "hookpoint", "writes"),
    [
        ("sparsify/bfloat16/model.layers.3", "layers.3", "layers.3"),
        ("sparsify/2024-07/layer_5", "layers.4", "layers.4"),
        ("sparsify/transcoder/layers.3.mlp", "layers.3.mlp.input", "layers.3.mlp"),
        ("sparsify/seeds/layers.3/seed1", "layers.3", "layers.3"),
        ("saelens/topk", "layers.3", "layers.3"),
        ("saelens/version_5", "layers.2", "layers.2"),
        ("saelens/skip_transcoder", "layers.3.mlp.input", "layers.3.mlp"),
    ],
)
def test_hookpoints(name, hookpoint, writes):
    spec = opened(name).spec
    assert (spec.hookpoint, spec.writes) == (hookpoint, writes)


def test_the_old_name_of_a_layer_is_explained(caplog):
    sae = load_sae(GOLDEN / "saes" / "sparsify" / "2024-07", "layers.4")
    assert sae.spec.hookpoint == "layers.4"
    assert "input of that block" in caplog.text


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("sparsify")])
def test_sparsify_round_trip(name, tmp_path):
    sae = opened(name)
    write_sparsify(sae.stored, tmp_path / sae.spec.writes)
    again = load_sae(tmp_path, sae.spec.writes)
    assert again.spec == sae.spec
    before = load_file(GOLDEN / "saes" / name / "sae.safetensors")
    after = load_file(tmp_path / sae.spec.writes / "sae.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    require_same(again, name)


# whitening has to be folded first
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("saelens/")])
def test_saelens_round_trip(name, tmp_path):
    sae = opened(name)
    if name == "saelens/whitened":
        return
    write_saelens(sae.stored, tmp_path / "sae", model_name="tiny")
    again = load_sae(tmp_path)
    assert again.spec == sae.spec
    require_same(again, name)


def test_written_files_open_in_the_packages_themselves(tmp_path, monkeypatch):
    """Needs eai-sparsify and sae-lens beside us; the round trips above do not."""
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # it would ask for a GPU
    sparsify = pytest.importorskip("sparsify", exc_type=ImportError)
    sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)
    x = ANSWERS["x"]
    for name in NAMES:
        sae = opened(name)
        if name.startswith("sparsify"):
            write_sparsify(sae.stored, tmp_path / name)
            with torch.no_grad():
                out = sparsify.SparseCoder.load_from_disk(tmp_path / name).float()(x).sae_out
        elif name != "saelens/whitened":
            write_saelens(sae.stored, tmp_path / name)
            with torch.no_grad():
                out = sae_lens.SAE.load_from_disk(tmp_path / name)(x)
        else:
            continue
        torch.testing.assert_close(out, ANSWERS[f"{name}/out"], rtol=TOLERANCE, atol=TOLERANCE)


def write_llama_scope(folder: Path, d: int, d_sae: int) -> dict:
    """A Llama Scope autoencoder of random weights; returns its numbers."""
    hand = torch.Generator().manual_seed(3)
    tensors = {
        "encoder.weight": torch.randn(d_sae, d, generator=hand),
        "encoder.bias": torch.randn(d_sae, generator=hand) / 4,
        "decoder.weight": torch.randn(d, d_sae, generator=hand),
        "decoder.bias": torch.randn(d, generator=hand),
    }
    config = {
        "hook_point_in": "blocks.3.hook_resid_post",
        "hook_point_out": "blocks.3.hook_resid_post",
        "d_model": d,
        "d_sae": d_sae,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.8,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 5.0, "out": 4.0},
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "top_k": 50,
    }
    (folder / "checkpoints").mkdir(parents=True)
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps(config))
    return tensors


def test_llama_scope_folds_in_its_order(tmp_path):
    """Step by step as the description says, in float64."""
    d, d_sae = 8, 24
    raw = write_llama_scope(tmp_path / "L3R", d, d_sae)
    weights = {name: tensor.double() for name, tensor in raw.items()}
    s_in, s_out = math.sqrt(d) / 5.0, math.sqrt(d) / 4.0
    b_enc, b_dec = weights["encoder.bias"] / s_in, weights["decoder.bias"] / s_out
    decoder = weights["decoder.weight"] * s_in / s_out
    norms = decoder.norm(dim=0)
    decoder, encoder = decoder / norms, weights["encoder.weight"] * norms[:, None]
    x = ANSWERS["x"].double()
    before = x @ encoder.T + b_enc * norms
    codes = before * (before > 0.8)
    sae = load_sae(tmp_path, "layers.3")
    found = sae.encode(ANSWERS["x"])
    assert 0 < found.l0().float().mean() < d_sae
    torch.testing.assert_close(found.dense(d_sae).double(), codes, rtol=1e-5, atol=1e-5)
    expected = codes @ decoder.T + b_dec
    torch.testing.assert_close(sae.decode(found).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.directions([5])[0].double(), decoder[:, 5])
