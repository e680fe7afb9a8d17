"""Encoding in blocks, from memory and from files; edits of codes; what does not fit."""

from __future__ import annotations

import dataclasses
import resource

import pytest
import torch

from qll.errors import ShapeError, UsageError
from qll.lens import SparseCodes, load_sae
from qll.load.sae_write import write_saelens, write_sparsify
from tests.unit.lens.conftest import random_sae

ACTIVATIONS = ("relu", "topk", "groupmax", "jumprelu", "gated")


def x_of(tokens=40, width=64, seed=1):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def dense_codes(sae, x):
    """The formulas of the formats, on whole matrices."""
    vectors, spec = sae.stored.vectors, sae.spec
    h = (x - vectors["b_dec"]) @ sae.stored.encoder.data.T
    if spec.activation == "gated":
        return (h + vectors["b_gate"] > 0) * (h * vectors["r_mag"].exp() + vectors["b_mag"]).relu()
    h = (h + vectors["b_enc"]).relu()
    if spec.activation == "jumprelu":
        return h * (h > vectors["threshold"])
    if spec.activation == "relu":
        return h
    groups = h.unflatten(1, (spec.k, -1)) if spec.activation == "groupmax" else h[:, None]
    best = groups.topk(1 if spec.activation == "groupmax" else spec.k, dim=2)
    return torch.zeros_like(groups).scatter_(2, best.indices, best.values).flatten(1)


@pytest.mark.parametrize("block", [700, 1 << 20])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_blocks_give_what_whole_matrices_give(activation, block, monkeypatch):
    monkeypatch.setattr("qll.lens.sae.BLOCK_BYTES", block)
    sae, x = random_sae(activation=activation), x_of()
    codes = sae.encode(x)
    expected = dense_codes(sae, x)
    assert (expected != 0).any()
    torch.testing.assert_close(codes.dense(96), expected, rtol=1e-5, atol=1e-5)
    vectors = sae.stored.vectors
    y = expected @ sae.stored.decoder.data + vectors["b_dec"]
    torch.testing.assert_close(sae.decode(codes), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.reconstruct(x), y, rtol=1e-5, atol=1e-5)
    assert torch.equal(codes.l0(), (expected != 0).sum(1))


def test_signed_topk_keeps_signs():
    sae, x = random_sae(signed=True), x_of()
    codes = sae.encode(x)
    h = (x - sae.stored.vectors["b_dec"]) @ sae.stored.encoder.data.T + sae.stored.vectors["b_enc"]
    wanted = h.abs().topk(6, dim=1).indices
    assert (codes.values < 0).any()
    assert torch.equal(codes.indices.sort(1).values, wanted.sort(1).values)
    torch.testing.assert_close(codes.values, h.gather(1, codes.indices))


def test_fewer_than_k_positive_leaves_padding():
    sae = random_sae(k=90)
    codes = sae.encode(x_of())
    assert (codes.l0() < 90).all()
    assert (codes.indices[codes.values == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("writer", [write_sparsify, write_saelens])
def test_streamed_from_the_file_is_the_same(writer, dtype, tmp_path, monkeypatch):
    sae = random_sae()
    cast = {
        name: dataclasses.replace(matrix, data=matrix.data.to(dtype))
        for name, matrix in (("encoder", sae.stored.encoder), ("decoder", sae.stored.decoder))
    }
    writer(dataclasses.replace(sae.stored, **cast), tmp_path / "layers.0")
    whole = load_sae(tmp_path, "layers.0")
    monkeypatch.setattr("qll.lens.sae.BLOCK_BYTES", 3000)
    streamed = load_sae(tmp_path, "layers.0", memory_bytes=0)
    assert whole.stored.encoder.in_memory
    assert not streamed.stored.encoder.in_memory
    x = x_of()
    one, two = whole.encode(x), streamed.encode(x)
    torch.testing.assert_close(one.dense(96), two.dense(96), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.decode(one), streamed.decode(two), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.directions([7, 3]), streamed.directions([7, 3]))


def test_memory_stays_with_the_block(tmp_path):
    """An autoencoder of 134 MB whose dense codes would take 537 MB: neither is ever held."""
    big = random_sae(d_in=128, d_sae=131072, k=8)
    write_sparsify(big.stored, tmp_path / "layers.0")
    del big
    sae = load_sae(tmp_path, "layers.0", memory_bytes=0)
    sae.encode(x_of(64, 128))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codes = sae.encode(x_of(1024, 128))
    sae.decode(codes)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert codes.values.shape == (1024, 8)
    assert grown < 400


def test_edits_of_codes():
    codes = SparseCodes(torch.tensor([[3.0, 1.0], [2.0, 0.0]]), torch.tensor([[4, 2], [2, 0]]))
    assert codes.without([2]).dense(5).tolist() == [[0, 0, 0, 0, 3], [0, 0, 0, 0, 0]]
    assert codes.plus(2, 5.0).dense(5).tolist() == [[0, 0, 6, 0, 3], [0, 0, 7, 0, 0]]
    assert codes.plus(0, 1.0).dense(5).tolist() == [[1, 0, 1, 0, 3], [1, 0, 2, 0, 0]]
    assert codes.plus(4, -3.0).of(4).tolist() == [0, -3]
    assert codes[1:].l0().tolist() == [1]


def test_difference_is_exactly_the_edit():
    sae, x = random_sae(), x_of()
    codes = sae.encode(x)
    assert not sae.difference(codes, codes).any()
    assert not sae.difference(codes, codes.widened(20)).any()
    feature = int(codes.indices[0, 0])
    gone = sae.difference(codes, codes.without([feature]))
    expected = -codes.of(feature)[:, None] * sae.directions([feature])
    torch.testing.assert_close(gone, expected)
    untouched = codes.of(feature) == 0
    assert not gone[untouched].any()


def test_k_can_be_chosen(tmp_path):
    write_sparsify(random_sae().stored, tmp_path / "layers.0")
    x = x_of()
    assert load_sae(tmp_path, "layers.0", k=2).encode(x).values.shape == (40, 2)
    with pytest.raises(Exception, match="k is not between 1 and"):
        load_sae(tmp_path, "layers.0", k=97)


def test_what_does_not_fit():
    sae = random_sae()
    with pytest.raises(ShapeError, match="another width"):
        sae.encode(torch.zeros(2, 63))
    with pytest.raises(UsageError, match="no such feature"):
        sae.directions([96])
    assert len(sae.encode(torch.zeros(0, 64))) == 0
