"""`lens` on a folder converted before, and conversion that is told to keep features."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from qll.cli import main
from qll.load.sae_write import write_sparsify
from tests.e2e.conftest import QUICK
from tests.unit.lens.conftest import random_sae


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes")
    for place in ("layers.0", "layers.1.mlp"):
        write_sparsify(random_sae(hookpoint=place, k=16).stored, folder / place)
    return folder


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, tmp_path_factory):
    """The folder of a run that stopped after the conversion."""
    out = tmp_path_factory.mktemp("converted") / "run"
    words = ["convert", "--llama_dir", tiny_checkpoint, "--out", out, *QUICK]
    assert main([str(word) for word in (*words, "--effort", "fast", "--keep", "0.6")]) == 0
    return out


def lens(tiny_checkpoint, converted, autoencoders, out, *more):
    words = ["lens", "--model", converted, "--llama_dir", tiny_checkpoint, "--sae_dir",
             autoencoders, "--out", out, "--eval_tokens", "256", *more]  # fmt: skip
    return main([str(word) for word in words])


def test_pages_and_numbers_without_converting(
    tiny_checkpoint, converted, autoencoders, tmp_path, capsys
):
    out = tmp_path / "lens"
    moments = converted / "work" / "moments"
    assert lens(tiny_checkpoint, converted, autoencoders, out, "--moments", moments) == 0
    said = capsys.readouterr().out
    assert "layers.1.mlp" in said
    assert str(out / "features" / "layers.0.html") in said
    value = json.loads((out / "lens.json").read_text())
    assert list(value["layers"]) == ["0", "layers.1.mlp"]
    assert any("autoencoder of layers.0" in warning for warning in value["warnings"])
    for entry in value["layers"].values():
        weights = entry["weights"]
        assert weights["metric"] == "kfac"
        assert entry["causal"]["edits"] > 0
        assert set(entry["causal"]["controls"]) == {"other_feature", "floor"}
        page = out / entry["page"]
        tensors = load_file(page.with_suffix(".safetensors"))
        assert tensors["r"].shape == (96,)
        assert tensors["rho"].shape == (len(weights["matrices"]), weights["features"])
        html = page.read_text()
        assert entry["hookpoint"] in html
        assert "another feature" in html
        assert html.count('class="token"') > 50
    assert not (out / "work").exists()
    before = (out / "lens.json").read_bytes()
    assert lens(tiny_checkpoint, converted, autoencoders, out, "--moments", moments) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (out / "lens.json").read_bytes() == before
    assert lens(tiny_checkpoint, converted, autoencoders, out) == 2
    assert "belongs to another run" in capsys.readouterr().err


def test_a_killed_look_goes_on(tiny_checkpoint, converted, autoencoders, tmp_path, monkeypatch):
    import qll.lens

    study, seen = qll.lens.study, []

    def interrupted(readings, sae, *rest, **more):
        seen.append(sae.spec.hookpoint)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return study(readings, sae, *rest, **more)

    monkeypatch.setattr(qll.lens, "study", interrupted)
    out = tmp_path / "lens"
    few = ("--eval_tokens", "128", "--reach", "1")
    assert lens(tiny_checkpoint, converted, autoencoders, out, *few) == 4
    assert not (out / "lens.json").exists()
    assert lens(tiny_checkpoint, converted, autoencoders, out, *few) == 0
    assert seen == ["layers.0", "layers.1.mlp", "layers.1.mlp"]
    assert len(json.loads((out / "lens.json").read_text())["layers"]) == 2


def test_folders_and_places_that_do_not_fit(
    tiny_checkpoint, converted, autoencoders, tmp_path, capsys
):
    def said(*more, model=converted, code=3) -> str:
        assert lens(tiny_checkpoint, model, autoencoders, tmp_path / "out", *more) == code
        assert not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "found layers.0, layers.1.mlp" in said("--hookpoints", "1")
    assert "not a place" in said("--hookpoints", "attic", code=2)
    assert "no such file" in said("--eval_text", tmp_path / "none.txt", code=2)
    (tmp_path / "short.txt").write_text("a")
    assert "too few tokens" in said("--eval_text", tmp_path / "short.txt")
    assert "--reach" in said("--reach", "0", code=2)
    assert "--run_again" in said("--run_again", "0", code=2)
    said(model=tmp_path / "nowhere")
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert "made from another checkpoint" in said("--llama_dir", other, code=2)


def test_keeping_features_changes_the_plan_only_where_it_is_asked(
    tiny_checkpoint, autoencoders, tmp_path, capsys
):
    def plan(name, *more, code=0):
        words = ["plan", "--llama_dir", tiny_checkpoint, "--out", tmp_path / name, *QUICK, *more]
        assert main([str(word) for word in words]) == code, capsys.readouterr().err
        return tmp_path / name

    common = ("--sae_dir", autoencoders, "--keep", "0.6")
    steered = plan("steered", *common, "--feature_weight", "4")
    moments = steered / "work" / "moments"
    assert json.loads((moments / "moments.json").read_text())["extra"]["feature_weight"] == 4
    assert "steers nothing" in (steered / "events.jsonl").read_text()
    again = plan("again", *common, "--feature_weight", "4", "--moments", moments)
    assert (again / "plan.json").read_bytes() == (steered / "plan.json").read_bytes()
    plain = plan("plain", *common)
    assert (plain / "plan.json").read_bytes() != (steered / "plan.json").read_bytes()
    plan("mixed", *common, "--moments", moments, code=2)
    assert "another weight of features" in capsys.readouterr().err
    given = ("--feature_weight", "4", "--moments", moments)
    plan("labels", *common, *given, "--labels", "text", code=2)
    assert "use --labels sampled" in capsys.readouterr().err
    for words in (("--feature_weight", "4"), (*common, "--feature_weight", "-1"),
                  (*common, "--feature_weight", "1", "--metric", "activation")):  # fmt: skip
        plan("wrong", *words, code=2)
        assert "--feature_weight" in capsys.readouterr().err
