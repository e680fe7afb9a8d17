"""Models on disk: what comes back, and every way in which a folder can lie."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import qll
from qll.bytelm.adapter import AdaptedLinear, with_adapters
from qll.bytelm.config import MixerConfig, ModelConfig
from qll.bytelm.model import ByteModel
from qll.bytelm.saved import load_model, save_model
from qll.errors import (
    ConfigError,
    IntegrityError,
    MissingFileError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    TruncatedFileError,
    UsageError,
)
from tests.unit.bytelm.byte_models import byte_model, text


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", byte_model("plain").float())
    return tmp_path / "model"


def change_json(folder, **changes):
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("part", ["plain", "tied", "adapters", "mpo", "topk", "everything"])
def test_a_model_comes_back(tmp_path, part):
    model = byte_model(part).float()
    save_model(tmp_path / "run" / "model", model)
    for loaded in (load_model(tmp_path / "run" / "model"), qll.load_lm(tmp_path / "run")):
        assert loaded.config == model.config
        assert not loaded.training
        assert loaded.num_params() == model.num_params()
        with torch.no_grad():
            assert torch.equal(loaded(text(2, 15)), model(text(2, 15)))


def test_no_folder(tmp_path):
    with pytest.raises(MissingFileError, match="no such folder"):
        qll.load_lm(tmp_path / "nowhere")
    with pytest.raises(MissingFileError):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architecture": "LlamaForCausalLM"}, ConfigError, "another architecture"),
        ({"vocabulary": 50257}, ConfigError, "another vocabulary"),
        ({"config": {"d_modle": 3}}, ConfigError, "d_modle"),
        ({"config": {"d_model": "16"}}, ConfigError, "wrong type"),
        ({"config": {"d_model": True}}, ConfigError, "wrong type"),
        ({"config": {"mixer": {"pattern": "attention"}}}, ConfigError, "wrong type"),
        ({"config": {"stream": {"phase": "twist"}}}, ConfigError, "no such choice"),
        ({"config": None}, ConfigError, "wrong type"),
    ],
)
def test_configs_that_are_not_ours(folder, changes, error, message):
    change_json(folder, **changes)
    with pytest.raises(error, match=message):
        load_model(folder)


def test_a_config_that_is_not_json(folder):
    (folder / "model.json").write_text("{")
    with pytest.raises(IntegrityError):
        load_model(folder)


def test_a_huge_config_is_refused_before_memory_is_taken(folder):
    change_json(folder, config={"d_model": 1 << 20, "n_layers": 2, "n_heads": 2})
    with pytest.raises(ShapeError, match="wrong shape or type"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -50])
def test_truncated_tensors(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TruncatedFileError):
        load_model(folder)


def test_tensors_that_do_not_fit(folder):
    for change, error in (
        (lambda t: t.pop("norm.gain"), MissingTensorError),
        (
            lambda t: t.update({"norm.gain": torch.ones(16), "more": torch.ones(1)}),
            MissingTensorError,
        ),
        (lambda t: t.pop("more") is None or t.update({"norm.gain": torch.ones(3)}), ShapeError),
        (lambda t: t.update({"norm.gain": torch.full((16,), torch.nan)}), NonFiniteError),
        (lambda t: t.update({"norm.gain": torch.ones(16, dtype=torch.int64)}), ShapeError),
    ):
        change_tensors(folder, change)
        with pytest.raises(error):
            load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFileError):
        load_model(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"d_model": 30, "n_heads": 4},
        {"n_layers": 0},
        {"dropout": 1.0},
        {"d_ff": 7},
        {"context": 0},
        {"mixer": {"pattern": ["nothing"]}},
        {"mixer": {"pattern": []}},
        {"weights": {"keep": 0.0}},
        {"weights": {"lora_train_only": True}},
        {"weights": {"lora_rank": 2, "format": "mpo"}},
        {"weights": {"lora_rank": 2}, "stream": {"numbers": "complex"}},
        {"weights": {"width_groups": 5}},
        {"concept": {"layer": 4}},
        {"concept": {"k": 9, "codes": 8}},
        {"memory": {"segment": -1}},
    ],
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(UsageError):
        ModelConfig.from_dict(settings)


def test_a_pattern_repeats():
    config = ModelConfig(n_layers=3, mixer=MixerConfig(pattern=("delta", "attention")))
    assert [config.mixer_of(layer) for layer in range(3)] == ["delta", "attention", "delta"]


def test_adapters_that_are_merged_count_once_when_read(tmp_path):
    base = ByteModel(ModelConfig(d_model=32, n_layers=1, n_heads=2)).eval()
    model, ids = with_adapters(base, rank=2, alpha=4.0).eval(), torch.arange(9)[None]
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    with torch.no_grad():
        for module in adapted:
            module.adapter_up.normal_()
        expected = model(ids)
        for module in adapted:
            module.merge()
        save_model(tmp_path, model)
        torch.testing.assert_close(load_model(tmp_path)(ids), expected, rtol=1e-4, atol=1e-4)
        again = with_adapters(model, rank=2, alpha=4.0).eval()
        torch.testing.assert_close(again(ids), expected, rtol=1e-4, atol=1e-4)
