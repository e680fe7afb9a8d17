"""The block runner and the dense loader are transformers' own model, read tensor by tensor."""

from __future__ import annotations

import pytest
import torch

from qll.errors import MissingTensorError, ShapeError, UsageError
from qll.load import open_source
from qll.model import blocks, build_block, embed, head, load_dense, run_block
from tests.conftest import make_tiny_llama


@pytest.fixture(scope="module", params=["untied", "tied", "llama3_rope"])
def pair(request, tmp_path_factory):
    """A random model and a Source of the same weights."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    changes = {"rope_parameters": rope} if request.param == "llama3_rope" else {}
    model = make_tiny_llama(tied=request.param == "tied", seed=3, **changes)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, open_source(folder)


IDS = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))


def stream(source, ids):
    hidden = embed(source, ids)
    for index in range(source.config.num_hidden_layers):
        hidden = run_block(build_block(source, index), hidden)
    norm, weight = head(source)
    return norm(hidden) @ weight.T


def test_streamed_blocks_equal_the_whole_model(pair):
    model, source = pair
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        torch.testing.assert_close(stream(source, IDS), expected, atol=1e-5, rtol=0)


def test_dense_model_equals_the_one_that_was_saved(pair):
    model, source = pair
    dense = load_dense(source)
    assert not dense.training
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        torch.testing.assert_close(dense(input_ids=IDS).logits, expected, atol=1e-6, rtol=0)
    tied = dense.lm_head.weight is dense.model.embed_tokens.weight
    assert tied == source.config.tie_word_embeddings


def test_gradients_through_blocks_equal_those_of_the_whole_model(pair):
    model, source = pair
    start = embed(source, IDS).requires_grad_()
    hidden = start
    for index in range(source.config.num_hidden_layers):
        hidden = run_block(build_block(source, index), hidden)
    norm, weight = head(source)
    (norm(hidden) @ weight.T).square().mean().backward()
    twin = embed(source, IDS).requires_grad_()
    model(inputs_embeds=twin).logits.square().mean().backward()
    torch.testing.assert_close(start.grad, twin.grad, atol=1e-6, rtol=1e-4)


def test_block_is_causal(pair):
    _, source = pair
    block = build_block(source, 0)
    hidden = embed(source, IDS)
    changed = hidden.clone()
    changed[:, 12:] += 1.0
    before, after = run_block(block, hidden), run_block(block, changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_embedding_reads_the_table_in_slices(pair, monkeypatch):
    model, source = pair
    monkeypatch.setattr(blocks, "TABLE_ROWS", 100)
    torch.testing.assert_close(embed(source, IDS), model.model.embed_tokens(IDS).detach())


@pytest.mark.parametrize("bad", [-1, 512])
def test_id_outside_the_vocabulary(pair, bad):
    with pytest.raises(UsageError, match=f"expected 0 to 511, found {bad}"):
        embed(pair[1], torch.tensor([[1, bad]]))


class Tampered:
    """A Source whose tensors were changed behind its back."""

    def __init__(self, source, name, tensor):
        self.source, self.name, self.tensor = source, name, tensor
        self.config = source.config
        self.path, self.format, self.row_order = source.path, source.format, source.row_order
        self.fingerprint, self.bytes_on_disk = source.fingerprint, source.bytes_on_disk
        self.files = source.files

    def specs(self):
        specs = dict(self.source.specs())
        if self.tensor is None:
            del specs[self.name]
        return specs

    def read(self, name, rows=None):
        return self.tensor if name == self.name else self.source.read(name, rows)


def test_dense_loader_refuses_what_transformers_would_invent(pair):
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(MissingTensorError, match="up_proj"):
        load_dense(Tampered(pair[1], name, None))
    with pytest.raises(ShapeError, match=r"\(128, 64\), found \(128, 63\)"):
        load_dense(Tampered(pair[1], name, torch.zeros(128, 63)))
    with pytest.raises(ShapeError, match="up_proj"):
        build_block(Tampered(pair[1], name, torch.zeros(128, 63)), 1)
