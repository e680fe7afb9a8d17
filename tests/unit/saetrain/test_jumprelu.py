"""JumpReLU's pseudo-derivatives are those of the paper's equations 11 and 12."""

from __future__ import annotations

import torch

from qll.saetrain.jumprelu import fires, jump_relu

H = torch.tensor([0.2, 0.96, 1.04, 3.0])
BANDWIDTH = 0.1


def gradients(function) -> tuple[torch.Tensor | None, torch.Tensor]:
    h, threshold = H.clone().requires_grad_(), torch.ones(4, requires_grad=True)
    out = function(h, threshold, BANDWIDTH)
    return torch.autograd.grad(out.sum(), (h, threshold), allow_unused=True)


def test_values_are_exact():
    assert jump_relu(H, torch.ones(4), BANDWIDTH).tolist() == [0.0, 0.0, H[2].item(), 3.0]
    assert fires(H, torch.ones(4), BANDWIDTH).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_jump_relu_moves_its_threshold_only_near_it():
    in_h, in_threshold = gradients(jump_relu)
    assert in_h.tolist() == [0.0, 0.0, 1.0, 1.0]
    torch.testing.assert_close(in_threshold, torch.tensor([0.0, -10.0, -10.0, 0.0]))


def test_the_count_has_a_derivative_in_the_threshold_alone():
    in_h, in_threshold = gradients(fires)
    assert in_h is None
    torch.testing.assert_close(in_threshold, torch.tensor([0.0, -10.0, -10.0, 0.0]))


def test_the_rectangle_integrates_to_the_height_of_the_step():
    thresholds = torch.linspace(0, 2, 20001, requires_grad=True)
    out = fires(torch.ones(20001), thresholds, BANDWIDTH)
    slope = torch.autograd.grad(out.sum(), thresholds)[0]
    assert abs(torch.trapezoid(slope, thresholds.detach()).item() + 1) < 1e-2
