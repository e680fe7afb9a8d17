"""Small autoencoders for the tiny Llama: random ones, and one that fits a given place."""

from __future__ import annotations

import pytest
import torch

from qll.lens import SAE
from qll.lens.hooks import capture
from qll.lens.readings import Encoded, places_for, read
from qll.load.sae_file import LatentMatrix, SAESpec, StoredSAE
from tests.conftest import VOCAB, make_tiny_llama


def random_sae(
    d_in=64, d_sae=96, k=6, activation="topk", hookpoint="layers.0", seed=0, d_out=None, **more
) -> SAE:
    """Random weights; unit-norm decoder rows."""
    hand = torch.Generator().manual_seed(seed)
    d_out = d_out or d_in

    def noise(*shape):
        return torch.randn(*shape, generator=hand)

    decoder = torch.nn.functional.normalize(noise(d_sae, d_out), dim=1)
    vectors = {"b_enc": noise(d_sae) / 10, "b_dec": noise(d_out) / 10}
    if activation == "gated":
        gates = {name: noise(d_sae) / 10 for name in ("b_gate", "b_mag", "r_mag")}
        vectors = gates | {"b_dec": vectors["b_dec"]}
    if activation == "jumprelu":
        vectors["threshold"] = noise(d_sae).abs()
    k = k if activation in ("topk", "groupmax") else None
    spec = SAESpec(hookpoint, d_in, d_sae, d_out, activation, k=k, **more)
    encoder = LatentMatrix(noise(d_sae, d_in) / d_in**0.5)
    return SAE(StoredSAE(spec, encoder, LatentMatrix(decoder), vectors))


def fitted_sae(model, windows, hookpoint="layers.0", k=24) -> SAE:
    """Plus and minus the principal axes of the activations at a place, k of them per token."""
    x = torch.cat([capture(model, ids[None], [hookpoint])[hookpoint][0] for ids in windows])
    mean = x.mean(0)
    _, _, axes = torch.linalg.svd(x - mean, full_matrices=False)
    both = torch.cat([axes, -axes]).contiguous()
    width = x.shape[1]
    spec = SAESpec(hookpoint, width, len(both), width, "topk", k=k)
    biases = {"b_enc": torch.zeros(len(both)), "b_dec": mean}
    return SAE(StoredSAE(spec, LatentMatrix(both), LatentMatrix(both), biases))


def encoded(model, sae, windows, special=()) -> Encoded:
    """What `sae` makes of `model` on the windows, read at all the places it can want."""
    places = places_for(sae.spec, model.config.num_hidden_layers)
    return Encoded(read(model, windows, places, special=special), sae)


@pytest.fixture(scope="session")
def deep_llama():
    """Three blocks of the tiny Llama's widths."""
    return make_tiny_llama(seed=7, num_hidden_layers=3)


@pytest.fixture(scope="session")
def windows() -> torch.Tensor:
    """Four windows of 32 random tokens."""
    return torch.randint(3, VOCAB, (4, 32), generator=torch.Generator().manual_seed(9))
