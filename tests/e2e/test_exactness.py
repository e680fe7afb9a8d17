"""--keep 1.0 loses nothing: every format, gains folded, head tied, from Meta's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import qll
from qll.cli import main
from qll.model import TNEmbedding, TNTiedHead
from tests.checkpoints import write_meta_folder
from tests.conftest import make_tiny_llama
from tests.e2e.conftest import QUICK

INNER = ("joint_channels", "joint_value_output", "joint_query_key")
FORMATS = (
    *("auto", "lowrank", "mpo", "tucker", "tree", "kron", "panels", "sparse"),
    *("joint_tree", "joint_tucker"),
    *INNER,
)


@pytest.fixture(scope="module")
def tied_checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint with a head that is its embedding."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("tied") / "checkpoint"))
    make_tiny_llama(tied=True).save_pretrained(folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None] % 512).logits


def difference(folder: Path, checkpoint: Path) -> float:
    dense = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    return float((logits(dense) - logits(qll.load(folder))).abs().max())


@pytest.mark.parametrize("format", FORMATS)
def test_keep_one_with_folded_gains_is_the_dense_model(format, tied_checkpoint, tmp_path):
    flags = ["--llama_dir", str(tied_checkpoint), "--out", str(tmp_path / "out"), *QUICK]
    flags += ["--format", format, "--keep", "1.0", "--norms", "fold"]
    assert main(["convert", *flags]) == 0
    assert difference(tmp_path / "out" / "model", tied_checkpoint) < 1e-4
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    used = {spec["format"] for spec in config["quantization_config"]["modules"].values()}
    assert format in used or format == "auto"


def test_keep_one_in_another_gauge_is_the_dense_model(tied_checkpoint, tmp_path):
    flags = ["--llama_dir", str(tied_checkpoint), "--out", str(tmp_path / "out"), *QUICK]
    flags += ["--format", "kron", "--keep", "1.0", "--norms", "fold", "--disentangle", "all"]
    assert main(["convert", *flags]) == 0
    assert difference(tmp_path / "out" / "model", tied_checkpoint) < 1e-4
    exported = ["--model", str(tmp_path / "out" / "model"), "--out", str(tmp_path / "plain")]
    assert main(["export", *exported]) == 0
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain").eval()
    dense = LlamaForCausalLM.from_pretrained(tied_checkpoint).eval()
    assert float((logits(plain) - logits(dense)).abs().max()) < 1e-4
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.allclose(plain.state_dict()[name], dense.state_dict()[name], atol=1e-2)


@pytest.mark.parametrize("metric", ["plain", "activation", "kfac"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_every_metric_and_allocation_stays_within_its_budget(
    metric, allocation, tied_checkpoint, tmp_path
):
    flags = ["--llama_dir", str(tied_checkpoint), "--out", str(tmp_path / "out"), *QUICK]
    flags += ["--metric", metric, "--allocation", allocation, "--keep", "0.6"]
    assert main(["plan", *flags]) == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    linears = sum(e["params_dense"] for e in plan["entries"] if ".layers." in e["members"][0])
    assert 0.5 * linears < plan["block_params"] <= 0.6 * linears


def test_tied_embedding_as_a_network_has_no_head_of_its_own(tied_checkpoint, tmp_path):
    flags = ["--llama_dir", str(tied_checkpoint), "--out", str(tmp_path / "out"), *QUICK]
    assert main(["convert", *flags, "--keep", "1.0", "--keep_embeddings", "0.6"]) == 0
    model = qll.load(tmp_path / "out" / "model")
    table, head = model.model.embed_tokens, model.lm_head
    assert isinstance(table, TNEmbedding)
    assert isinstance(head, TNTiedHead)
    assert not [name for name in model.state_dict() if name.startswith("lm_head")]
    ids, hidden = torch.tensor([[3, 500]]), torch.randn(2, 64)
    torch.testing.assert_close(table(ids)[0], table.weight[[3, 500]])
    torch.testing.assert_close(head(hidden), hidden @ table.weight.mT, atol=1e-4, rtol=1e-4)
    stored = sum(parameter.numel() for parameter in table.parameters())
    assert stored <= 0.6 * 512 * 64


@pytest.mark.parametrize("shards", [1, 2])
def test_main_job_from_metas_own_files(shards, tiny_checkpoint, tmp_path):
    """A folder with Meta's files in original/ and the tokenizer beside them converts the same."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    write_meta_folder(make_tiny_llama(), folder / "original", shards)
    (folder / "model.safetensors").unlink()
    flags = ["--llama_dir", str(folder), "--out", str(tmp_path / "out"), *QUICK]
    assert main(["convert", *flags, "--keep", "1.0", "--format", "lowrank"]) == 0
    assert difference(tmp_path / "out" / "model", tiny_checkpoint) < 1e-4
