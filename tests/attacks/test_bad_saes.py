"""Autoencoders that are broken, or belong elsewhere: one sentence each, and nothing is computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qll.errors import (
    ConfigError,
    HeaderError,
    MissingFileError,
    MissingTensorError,
    NonFiniteError,
    QLLError,
    ShapeError,
    TruncatedFileError,
    UsageError,
)
from qll.lens import load_sae
from qll.load.sae import find_saes
from qll.load.sae_write import write_saelens, write_sparsify
from tests.unit.lens.conftest import random_sae

GOLDEN = Path(__file__).parents[1] / "golden" / "saes"
SPARSIFY, SAELENS = "sparsify/topk/layers.3", "saelens/jumprelu"


@pytest.fixture
def folder(tmp_path):
    """Copies of one autoencoder of each format."""
    shutil.copytree(GOLDEN / SPARSIFY, tmp_path / "layers.3")
    shutil.copytree(GOLDEN / SAELENS, tmp_path / "saelens")
    return tmp_path


def with_config(folder: Path, **changes: object) -> None:
    """Change keys of cfg.json; None removes one."""
    values = json.loads((folder / "cfg.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(kept))


def with_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = next(folder.glob("*.safetensors"))
    state = load_file(path) | ({} if tensor is None else {name: tensor})
    if tensor is None:
        del state[name]
    save_file(state, path)


def use(folder: Path, name: str, memory: int) -> None:
    sae = load_sae(folder, name, memory_bytes=memory)
    sae.decode(sae.encode(torch.ones(3, sae.spec.d_in)))


def refused(error: type[QLLError], words: str, folder: Path, name: str) -> None:
    """Opening says `words` in one printable line, from memory and streamed alike."""
    for memory in (0, 1 << 30):
        with pytest.raises(error, match=words) as caught:
            use(folder, name, memory)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"d_in": None}, ConfigError, "lacks a key"),
        ({"k": None}, ConfigError, "lacks a key"),
        ({"k": 25}, ConfigError, "k is not between 1 and"),
        ({"k": 0}, ConfigError, "not a size"),
        ({"k": "4"}, ConfigError, "not a size"),
        ({"d_in": 9}, ShapeError, "disagree about its shape"),
        ({"num_latents": 25}, ShapeError, "disagree about its shape"),
        ({"num_latents": -1}, ConfigError, "not a size"),
        ({"num_latents": 2**40}, ConfigError, "not a size"),
        ({"activation": "softmax"}, ConfigError, "not implemented"),
        ({"activation": "groupmax", "signed": True}, ConfigError, "not implemented"),
        ({"activation": "groupmax", "k": 5}, ConfigError, "multiple of k"),
        ({"signed": "yes"}, ConfigError, "truth value"),
        ({"skip_connection": True}, MissingTensorError, "W_skip"),
    ],
)
def test_sparsify_configs(folder, changes, error, words):
    with_config(folder / "layers.3", **changes)
    refused(error, words, folder, "layers.3")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"d_sae": None}, ConfigError, "lacks a key"),
        ({"architecture": "temporal"}, ConfigError, "temporal"),
        ({"architecture": "batchtopk"}, ConfigError, "save it for inference"),
        ({"architecture": "standard"}, MissingTensorError, "threshold"),
        ({"architecture": "gated"}, MissingTensorError, "b_gate"),
        ({"normalize_activations": "sphere"}, ConfigError, "sphere"),
        ({"normalize_activations": "expected_average_only_in"}, ConfigError, "factor"),
        ({"normalize_activations": "covariance_whitening"}, MissingFileError, "whitening"),
        ({"d_in": 9}, ShapeError, "disagree about its shape"),
    ],
)
def test_saelens_configs(folder, changes, error, words):
    with_config(folder / "saelens", **changes)
    refused(error, words, folder, "saelens")


def test_saelens_hook_that_no_llama_has(folder):
    metadata = {"sae_lens_version": "6.1.0", "hook_name": "blocks.3.attn.hook_q"}
    with_config(folder / "saelens", metadata=metadata)
    refused(ConfigError, "attn.hook_q", folder, "saelens")


def test_an_old_activation_is_not_approximated(folder):
    with_config(folder / "saelens", metadata=None, architecture=None, activation_fn="tanh-relu")
    refused(ConfigError, "tanh-relu", folder, "saelens")


@pytest.mark.parametrize("name", ["layers.3", "saelens"])
@pytest.mark.parametrize("tensor", ["W_dec", "b_dec"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number(folder, name, tensor, value):
    broken = load_file(next((folder / name).glob("*.safetensors")))[tensor]
    broken[..., 1] = value  # in every row: those that nothing reads are not looked at
    with_tensor(folder / name, tensor, broken)
    refused(NonFiniteError, "NaN or infinity", folder, name)


@pytest.mark.parametrize("name", ["layers.3", "saelens"])
def test_tensors_that_are_missing_or_too_many(folder, name):
    with_tensor(folder / name, "extra", torch.ones(3))
    refused(MissingTensorError, "extra", folder, name)
    with_tensor(folder / name, "extra", None)
    with_tensor(folder / name, "b_dec", None)
    refused(MissingTensorError, "b_dec", folder, name)


@pytest.mark.parametrize("name", ["layers.3", "saelens"])
def test_truncated_and_foreign_files(folder, name):
    path = next((folder / name).glob("*.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    refused(TruncatedFileError, "another size", folder, name)
    path.write_bytes(data[:60])
    refused(TruncatedFileError, "ends inside its header", folder, name)
    path.write_bytes(b"PK\x03\x04" + data)
    refused(HeaderError, "header is too long", folder, name)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    refused(MissingFileError, "Git LFS pointer", folder, name)


def test_a_file_that_shrinks_while_it_is_read(folder):
    sae = load_sae(folder, "layers.3", memory_bytes=0)
    path = folder / "layers.3" / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TruncatedFileError, match="ended inside a tensor"):
        sae.encode(torch.ones(3, 8))


def test_wrong_names_list_what_is_there(folder):
    for name in ("layers.4", "blocks.4.hook_resid_post"):
        with pytest.raises(MissingFileError, match=r"found layers\.3") as caught:
            load_sae(folder, name)
        assert "Traceback" not in str(caught.value)
    with pytest.raises(UsageError, match="not a place"):
        load_sae(folder, "block seven")
    with pytest.raises(UsageError, match="several autoencoders fit"):
        load_sae(folder, "blocks.3.hook_resid_post")
    assert load_sae(folder / "saelens").spec.hookpoint == "layers.3"


def test_folders_without_autoencoders(tmp_path):
    with pytest.raises(MissingFileError, match="no such folder"):
        load_sae(tmp_path / "none", "layers.0")
    with pytest.raises(MissingFileError, match="no autoencoder in this folder"):
        load_sae(tmp_path, "layers.0")
    (tmp_path / "layers.0").mkdir()
    (tmp_path / "layers.0" / "cfg.json").write_text('{"d_in": 8, "k": 2}')
    with pytest.raises(MissingFileError, match="file not found"):
        load_sae(tmp_path, "layers.0")
    (tmp_path / "layers.0" / "cfg.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_sae(tmp_path, "layers.0")


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "sae.safetensors"
    path = folder / "layers.3" / "sae.safetensors"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(QLLError, match="outside its folder"):
        load_sae(folder, "layers.3")
    (folder / "loop").symlink_to(folder)
    assert len(find_saes(folder)) == 2


@pytest.mark.parametrize(
    ("writer", "kind", "more"),
    [
        (write_sparsify, "jumprelu", {}),
        (write_sparsify, "topk", {"subtract_b_dec": False}),
        (write_sparsify, "topk", {"normalize": "layer_norm"}),
        (write_saelens, "groupmax", {}),
        (write_saelens, "topk", {"writes": "layers.1.mlp", "subtract_b_dec": False}),
    ],
)
def test_what_a_format_cannot_say_is_not_written(writer, kind, more, tmp_path):
    with pytest.raises(ConfigError, match="has no such autoencoder"):
        writer(random_sae(activation=kind, **more).stored, tmp_path / "out")
    assert not (tmp_path / "out").exists()
