"""Exports open without any code of ours and compute the same."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from qll import store
from qll.errors import IntegrityError, UsageError
from qll.load import open_source
from qll.model import export_dense, export_two_linear, load


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_dense_export_is_a_plain_llama(small_folder, tmp_path, ids):
    out = export_dense(small_folder, tmp_path / "dense")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(model) is LlamaForCausalLM
    assert not any(info.values())
    expected = logits(load(small_folder), ids)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=0)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert not {"quantization_config", "auto_map", "qll_folded_norms"} & config.keys()
    assert not list(out.glob("*.py"))
    assert AutoTokenizer.from_pretrained(out).decode([100]) != ""
    assert store.verify_manifest(out)
    assert open_source(out).config.num_hidden_layers == 2
    # one shard per block, one for the embedding, one for the final norm and the head
    assert len(list(out.glob("model-*.safetensors"))) == 4


def test_two_linear_export_is_assembled_by_its_card(small_folder, tmp_path, ids, caplog):
    out = export_two_linear(small_folder, tmp_path / "pairs")
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL).group(1)
    scope = {"folder": str(out)}
    exec(code, scope)
    model = scope["model"].eval()
    expected = logits(load(small_folder), ids)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=0)
    assert isinstance(model.model.layers[1].self_attn.o_proj, torch.nn.Sequential)
    warned = [r.args[0] for r in caplog.records if r.name == "qll.model"]
    assert "model.layers.0.self_attn.q_proj" in warned
    assert "model.embed_tokens" in warned
    assert "model.layers.0.self_attn.o_proj" not in warned
    with pytest.raises(ValueError, match="llama_two_linear"):
        AutoConfig.from_pretrained(out)


def test_exports_refuse_their_own_input(small_folder, tmp_path):
    for out in (small_folder, small_folder / "inside", small_folder.parent):
        with pytest.raises(UsageError, match="own input"):
            export_dense(small_folder, out)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        export_two_linear(small_folder, tmp_path)
    assert (tmp_path / "file").read_text() == "precious"


def test_export_refuses_a_folder_that_changed(small_folder, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(small_folder, copied)
    data = bytearray((copied / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "model.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match="changed"):
        export_dense(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/hostname", "absent.safetensors"])
def test_index_may_not_point_outside(small_folder, tmp_path, file):
    from qll.model.files import read_weight_map

    (tmp_path / "outside.safetensors").write_bytes(b"")
    folder = tmp_path / "folder"
    shutil.copytree(small_folder, folder)
    store.write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": file}})
    with pytest.raises(IntegrityError, match="not a plain file"):
        read_weight_map(folder)
