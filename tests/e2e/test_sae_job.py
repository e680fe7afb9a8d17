"""The main job and `generate` with autoencoders, and every way the flags can be wrong."""

from __future__ import annotations

import json

import pytest

from qll.cli import main
from qll.load.sae_write import write_saelens, write_sparsify
from tests.e2e.conftest import QUICK
from tests.unit.lens.conftest import random_sae


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    """A sparsify folder of two blocks, and one SAELens autoencoder of an MLP's output."""
    folder = tmp_path_factory.mktemp("saes")
    for place in ("layers.0", "layers.1"):
        write_sparsify(random_sae(hookpoint=place, k=16).stored, folder / place)
    mlp = random_sae(hookpoint="layers.1.mlp", activation="jumprelu")
    write_saelens(mlp.stored, folder / "mlp_out")
    return folder


def test_report_has_every_autoencoder(tiny_checkpoint, autoencoders, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--llama_dir", tiny_checkpoint, "--sae_dir", autoencoders, "--out", out, *QUICK]
    assert main([str(word) for word in (*words, "--effort", "fast")]) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert list(report["sae"]["layers"]) == ["0", "1", "layers.1.mlp"]
    for entry in report["sae"]["layers"].values():
        for model in ("dense", "converted"):
            assert {"fvu", "l0", "ce_score", "dead"} <= set(entry[model])
        survival = entry["survival"]
        classes = [survival[name] for name in ("kept", "blurred", "lost", "silenced")]
        assert sum(classes) + survival["unmeasured"] == 96
        assert {"shuffled", "matched_noise", "floor"} == set(entry["controls"])
        assert sum(entry["ledger"].values()) == pytest.approx(1.0)
    assert any("autoencoder of layers.0" in warning for warning in report["warnings"])
    assert "sae" in report["cost"]["seconds"]


@pytest.mark.parametrize(
    ("layers", "words"),
    [("0,99", "no such blocks"), ("1,0", None), ("", None)],
)
def test_layers_are_checked_before_anything_is_written(
    tiny_checkpoint, autoencoders, tmp_path, layers, words, capsys
):
    common = ["--llama_dir", str(tiny_checkpoint), "--out", str(tmp_path / "out"), "--dry_run"]
    flags = ["--sae_dir", str(autoencoders), *(("--sae_layers", layers) if layers else ())]
    assert main([*common, *flags]) == (0 if words is None else 2)
    assert words is None or words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit(tiny_checkpoint, autoencoders, tmp_path, capsys):
    def said(folder, layers="0") -> str:
        words = ["--llama_dir", tiny_checkpoint, "--out", tmp_path / "out", "--sae_dir", folder]
        assert main([str(word) for word in (*words, "--sae_layers", layers)]) == 3
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return error

    (tmp_path / "empty").mkdir()
    assert "no autoencoder in this folder" in said(tmp_path / "empty")
    assert "no such folder" in said(tmp_path / "none")
    narrow = random_sae(d_in=32, hookpoint="layers.0").stored
    write_sparsify(narrow, tmp_path / "narrow" / "layers.0")
    assert "another width than the model" in said(tmp_path / "narrow")
    assert "found layers.0" in said(tmp_path / "narrow", layers="1")
    write_sparsify(narrow, tmp_path / "cut" / "layers.0")
    path = tmp_path / "cut" / "layers.0" / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert "another size than its header says" in said(tmp_path / "cut")


def test_generate_steers(tiny_checkpoint, autoencoders, capsys):
    def said(*flags) -> str:
        words = ["generate", "--prompt", "the", "--model", tiny_checkpoint, *flags]
        assert main([str(word) for word in (*words, "--max_new_tokens", "8")]) == 0
        return capsys.readouterr().out

    plain, folder = said(), ("--sae_dir", autoencoders)
    assert said(*folder, "--steer", "0:5:+0") == plain
    assert said(*folder, "--steer", "0:5:+60,layers.1:7:-30") != plain


@pytest.mark.parametrize(
    ("steer", "code", "words"),
    [
        ("0:5", 2, "not a feature to steer"),
        ("0:five:1", 2, "not a feature to steer"),
        ("0:5:nan", 2, "not a feature to steer"),
        ("0:96:1", 2, "no such feature"),
        ("2:5:1", 3, "no autoencoder at this place"),
        ("attic:5:1", 2, "not a place"),
    ],
)
def test_wrong_steering(tiny_checkpoint, autoencoders, steer, code, words, capsys):
    flags = ["--prompt", "the", "--model", tiny_checkpoint, "--sae_dir", autoencoders]
    assert main([str(word) for word in ("generate", *flags, "--steer", steer)]) == code
    assert words in capsys.readouterr().err


def test_steering_needs_a_folder(capsys):
    assert main(["generate", "--prompt", "the", "--steer", "0:5:1"]) == 2
    assert "--sae_dir" in capsys.readouterr().err
