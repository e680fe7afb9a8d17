"""A coarse look in bfloat16 finds the same features as float32, and says where it might not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qll.errors import UsageError
from qll.lens import coarse
from qll.lens.sae import SAE
from qll.load.sae_file import LatentMatrix, SAESpec, StoredSAE


def weights(features: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(features, width, generator=generator) / width**0.5).bfloat16()


def autoencoder(weight: torch.Tensor, k: int, signed: bool = False) -> SAE:
    features, width = weight.shape
    generator = torch.Generator().manual_seed(0)
    vectors = {
        "b_enc": torch.randn(features, generator=generator) / 8,
        "b_dec": torch.randn(width, generator=generator),
    }
    spec = SAESpec("layers.0", width, features, width, "topk", k=k, signed=signed)
    return SAE(StoredSAE(spec, LatentMatrix(weight), LatentMatrix(weight.clone()), vectors))


@settings(deadline=None, max_examples=25)
@given(
    features=st.integers(3, 600),
    width=st.integers(1, 70),
    tokens=st.integers(1, 20),
    signed=st.booleans(),
    seed=st.integers(0, 99),
    block=st.sampled_from([7, 64, 1000]),
    data=st.data(),
)
def test_what_is_not_doubtful_is_the_exact_answer(
    features, width, tokens, signed, seed, block, data
):
    k = data.draw(st.integers(1, features))
    generator = torch.Generator().manual_seed(seed)
    weight, z = weights(features, width, seed), torch.randn(tokens, width, generator=generator)
    bias = torch.randn(features, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coarse, "LATENTS", block)
        values, chosen, doubtful = coarse.strongest(z, weight, bias, k, signed)
    exact = z @ weight.float().T + bias
    sizes = exact.abs() if signed else exact
    wanted = sizes.topk(k, dim=1).values
    torch.testing.assert_close(values, exact.gather(1, chosen), atol=2e-5, rtol=1e-5)
    found = values.abs() if signed else values
    assert bool((found.diff(dim=1) <= 1e-5).all())  # strongest first
    torch.testing.assert_close(found[~doubtful], wanted[~doubtful], atol=2e-5, rtol=1e-5)


def test_ties_finer_than_bfloat16_are_in_doubt():
    # features that differ by less than bfloat16 can tell at these sizes
    weight = torch.full((400, 2), 1.0).bfloat16()
    weight[:, 1] = torch.linspace(0, 1, 400).bfloat16() * 2**-10
    doubtful = coarse.strongest(torch.ones(1, 2), weight, torch.zeros(400), 4)[2]
    assert doubtful.tolist() == [True]


@pytest.mark.parametrize("signed", [False, True])
def test_an_autoencoder_encodes_the_same_with_and_without(signed, monkeypatch):
    sae = autoencoder(weights(500, 48, 1), k=9, signed=signed)
    x = torch.randn(30, 48, generator=torch.Generator().manual_seed(2))
    # one token on which nothing can be told apart
    x[3] = sae.stored.vectors["b_dec"]
    with monkeypatch.context() as patch:
        patch.setattr(coarse, "choose_precision", lambda wanted, device: torch.bfloat16)
        found = replace(sae).encode(x)
        rough = replace(sae)
        assert rough._is_coarse
    with monkeypatch.context() as patch:
        patch.setattr(coarse, "choose_precision", lambda wanted, device: torch.float32)
        wanted = replace(sae).encode(x)
    torch.testing.assert_close(found.values, wanted.values, atol=2e-6, rtol=1e-5)
    assert torch.equal(found.indices, wanted.indices)


def test_full_precision_weights_are_never_looked_at_coarsely(monkeypatch):
    monkeypatch.setattr(coarse, "choose_precision", lambda wanted, device: torch.bfloat16)
    assert coarse.is_fast(autoencoder(weights(8, 4, 0), 2).stored, torch.device("cpu"))
    assert not coarse.is_fast(autoencoder(torch.eye(8, 4), 2).stored, torch.device("cpu"))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("block", [7, 1000])
def test_in_bfloat16_every_result_is_within_its_rounding(signed, block, monkeypatch):
    monkeypatch.setattr(coarse, "LATENTS", block)
    sae = autoencoder(weights(500, 48, 1), k=9, signed=signed)
    x = torch.randn(30, 48, generator=torch.Generator().manual_seed(2))
    wanted, found = sae.encode(x), replace(sae, precision=torch.bfloat16).encode(x)
    # the weakest features may change places with others of nearly their size
    rounding = 2**-7 * wanted.values.abs().amax()
    sizes = found.values.abs().sort(dim=1, descending=True).values
    assert bool(((sizes - wanted.values.abs()).abs() <= rounding).all())
    assert bool((found.values < 0).any()) == signed
    made = replace(sae, precision=torch.bfloat16).decode(found)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, sae.decode(found), atol=0.05, rtol=0.02)
    assert not torch.equal(made, sae.decode(found))


def test_bfloat16_needs_weights_in_bfloat16():
    sae = autoencoder(torch.eye(8, 4), 2)
    with pytest.raises(UsageError, match="stored in bfloat16"):
        replace(sae, precision=torch.bfloat16)
