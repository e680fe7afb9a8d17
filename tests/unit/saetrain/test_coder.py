"""The loss of each kind against formulas on dense codes, and what is written against what was
trained."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from qll.lens.sae import SAE
from qll.saetrain.coder import Coder, CoderShape

D, LATENTS, TOKENS, K = 6, 24, 40, 3
KINDS = ("topk", "multitopk", "jumprelu", "transcoder")


def made(kind: str, seed: int = 0) -> tuple[Coder, Tensor, Tensor]:
    """A coder with weights of every size, and activations to use it on."""
    place = "layers.0.mlp" if kind == "transcoder" else "layers.0"
    shape = CoderShape(place, kind, D, D, LATENTS, K, skip=kind == "transcoder", bandwidth=0.2)
    coder, generator = Coder(shape, seed), torch.Generator().manual_seed(seed)
    x = 5 * torch.randn(TOKENS, D, generator=generator) + 2
    y = x if kind != "transcoder" else 3 * torch.randn(TOKENS, D, generator=generator) - 1
    coder.start(x, y, y.mean(dim=0))
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            if name != "log_threshold":
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    coder.normalize_decoder()
    return coder, x, y


def dense_loss(coder: Coder, x: Tensor, y: Tensor) -> Tensor:
    """The same loss from all pre-activations at once, by autograd through dense products."""
    kind, z, target = coder.shape.kind, x / coder.scale_in, y / coder.scale_out
    before = (z if kind == "transcoder" else z - coder.b_dec) @ coder.W_enc.T + coder.b_enc
    straight = coder.b_dec + (z @ coder.W_skip.T if kind == "transcoder" else 0)

    def error_of(codes: Tensor) -> Tensor:
        return (codes @ coder.W_dec + straight - target).square().sum(dim=1).mean()

    def strongest(k: int) -> Tensor:
        values, places = before.relu().topk(k, dim=1)
        return torch.zeros_like(before).scatter(1, places, values)

    if kind == "jumprelu":
        return error_of(before * (before > coder.log_threshold.exp()))
    extra = error_of(strongest(4 * K)) / 8 if kind == "multitopk" else 0
    return error_of(strongest(K)) + extra


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_dense_codes(kind):
    coder, x, y = made(kind)
    if kind == "jumprelu":  # the penalty and the thresholds have no dense counterpart
        coder.shape = dataclasses.replace(coder.shape, l0_weight=0.0)
    names = [name for name, _ in coder.named_parameters() if name != "log_threshold"]
    parameters = [coder.get_parameter(name) for name in names]
    codes, wanted = coder(x, y), dense_loss(coder, x, y)
    torch.testing.assert_close(codes.loss, wanted)
    ours = torch.autograd.grad(codes.loss, parameters, retain_graph=True)
    theirs = torch.autograd.grad(wanted, parameters)
    for name, left, right in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6, msg=name)


def test_auxk_lets_dead_features_alone_reconstruct_the_error():
    coder, x, y = made("topk")
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[[2, 7]] = True
    plain, helped = coder(x, y, dead, 0.0), coder(x, y, dead, 0.5)
    z = x / coder.scale_in - coder.b_dec
    before = (z @ coder.W_enc.T + coder.b_enc).relu() * dead
    scale = 2 / (D // 2)
    wanted = scale * (before @ coder.W_dec + plain.error).square().sum(dim=1).mean()
    torch.testing.assert_close(helped.loss - plain.loss, 0.5 * wanted)
    gradient = torch.autograd.grad(helped.loss - plain.loss, coder.W_enc)[0]
    assert gradient[dead].abs().sum() > 0
    assert gradient[~dead].abs().max() < 1e-6


def test_jumprelu_pays_for_firing_too_often_and_too_rarely():
    coder, x, y = made("jumprelu")
    base = dataclasses.replace(coder.shape, l0_weight=0.0)
    for shift, sign in ((-1.0, -1), (1.0, 1)):
        with torch.no_grad():
            coder.log_threshold += shift
        costs = []
        for weight in (0.0, 2.0):
            coder.shape = dataclasses.replace(base, l0_weight=weight)
            codes = coder(x, y)
            costs.append((codes.loss, torch.autograd.grad(codes.loss, coder.log_threshold)[0]))
        l0 = codes.fires.sum().item() / TOKENS
        assert (l0 > K) == (sign < 0)
        torch.testing.assert_close(costs[1][0] - costs[0][0], torch.tensor(2 * (l0 / K - 1) ** 2))
        # the way down leads towards k
        assert sign * (costs[1][1] - costs[0][1]).sum() > 0
        with torch.no_grad():
            coder.log_threshold -= shift


def test_thresholds_start_at_the_wanted_rate():
    shape = CoderShape("layers.0", "jumprelu", D, D, LATENTS, K)
    coder, x = Coder(shape, 0), torch.randn(2000, D, generator=torch.Generator().manual_seed(1))
    coder.start(x, x, x.mean(dim=0))
    assert coder(x, x).fires.sum().item() / 2000 == pytest.approx(K, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_computes_what_was_trained(kind):
    coder, x, y = made(kind)
    sae = SAE(coder.stored(torch.float32))
    wanted = y + coder(x, y).error * coder.scale_out
    torch.testing.assert_close(sae.reconstruct(x), wanted.detach(), rtol=1e-4, atol=1e-4)


def test_projection_leaves_no_gradient_along_a_row():
    coder, x, y = made("topk")
    coder(x, y).loss.backward()
    before = coder.W_dec.grad.clone()
    coder.project_gradient()
    assert (coder.W_dec.grad * coder.W_dec).sum(dim=1).abs().max() < 1e-6
    across = before - coder.W_dec.grad
    torch.testing.assert_close(
        across, (across * coder.W_dec).sum(dim=1, keepdim=True) * coder.W_dec.detach()
    )


@pytest.mark.parametrize("kind", ["topk", "transcoder", "jumprelu"])
def test_a_revived_feature_fires_where_the_error_was(kind):
    coder, x, y = made(kind)
    with torch.no_grad():
        coder.b_enc[4] = -1e6
    silenced = coder(x, y)
    assert silenced.fires[4] == 0
    generator = torch.Generator().manual_seed(0)
    error = torch.zeros_like(silenced.error)
    error[11] = silenced.error[11]
    coder.revive(torch.tensor([4]), x, error, generator)
    after = coder(x, y)
    assert after.fires[4] > 0
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(coder.W_dec[4], -silenced.error[11], dim=0),
        torch.tensor(1.0),
    )
