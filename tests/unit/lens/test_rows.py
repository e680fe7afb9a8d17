"""Products with rows that tokens name: the same for every buffer, dtype and way of storage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qll.lens import rows
from qll.lens.codes import SparseCodes
from qll.lens.sae import SAE
from qll.load.sae_file import LatentMatrix, SAESpec, StoredSAE


def weights(features: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(features, width, generator=generator) / width**0.5).bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 700, 1 << 20])
def test_neither_sums_nor_products_depend_on_the_buffer(size, dtype, monkeypatch):
    weight, indices = weights(50, 16, 3).to(dtype), torch.randint(50, (11, 5))
    values, x, y = torch.randn(11, 5), torch.randn(11, 16), torch.randn(11, 16)
    wanted = torch.einsum("tk,tkd->td", values, weight.float()[indices])
    monkeypatch.setitem(rows.BUFFER_BYTES, "cpu", size)
    torch.testing.assert_close(rows.combine(values, weight, indices), wanted, atol=1e-6, rtol=1e-5)
    found = rows.products_with([x, y], weight, indices)
    for z, made in zip((x, y), found, strict=True):
        wanted = torch.einsum("td,tkd->tk", z, weight.float()[indices])
        torch.testing.assert_close(made, wanted, atol=1e-6, rtol=1e-5)


def test_no_tokens_and_no_features_are_nothing():
    weight = weights(5, 4, 0)
    nothing = torch.ones(3, 0).long()
    assert rows.combine(torch.ones(3, 0), weight, nothing).tolist() == [[0] * 4] * 3
    assert rows.combine(torch.ones(0, 2), weight, torch.ones(0, 2).long()).shape == (0, 4)
    assert rows.products(torch.ones(0, 4), weight, torch.ones(0, 2).long()).shape == (0, 2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("extra", ["none", "scale", "whitening"])
def test_projections_and_sums_are_those_of_directions(transposed, extra, monkeypatch):
    monkeypatch.setattr("qll.lens.sae.BLOCK_BYTES", 600)  # several chunks
    weight = weights(12, 6, 1).float()
    vectors = {"b_enc": torch.zeros(12), "b_dec": torch.zeros(6)}
    spec = SAESpec("layers.0", 6, 12, 6, "topk", k=3)
    if extra == "scale":
        vectors["scale_dec"] = torch.rand(12) + 0.5
    if extra == "whitening":
        spec = replace(spec, normalize="covariance_whitening")
        vectors |= {"mean": torch.zeros(6), "matrix": torch.eye(6)}
        vectors["inverse_matrix"] = torch.randn(6, 6)
    decoder = LatentMatrix(weight.T.contiguous(), transposed=True)
    decoder = decoder if transposed else LatentMatrix(weight)
    sae = SAE(StoredSAE(spec, LatentMatrix(weight), decoder, vectors))
    features, x, y = torch.randint(12, (9, 3)), torch.randn(9, 6), torch.randn(9, 6)
    codes = SparseCodes(torch.rand(9, 3), features)
    pairs = zip(codes.values, codes.indices, strict=True)
    wanted = torch.stack([values @ sae.directions(n) for values, n in pairs])
    made = sae.weighted_sum(codes) @ vectors.get("inverse_matrix", torch.eye(6))
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)
    for z, found in zip((x, y), sae.projections(features, [x, y]), strict=True):
        wanted = [sae.directions(n) @ v for n, v in zip(features, z, strict=True)]
        torch.testing.assert_close(found, torch.stack(wanted), atol=1e-5, rtol=1e-5)
