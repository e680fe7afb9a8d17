"""SparseGPT: its budget, its update against the exact one, and what it buys over sizes alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from benchmarks.peers import sparsegpt


@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_entries_and_mask_fill_the_budget(problem, keep):
    weight, _, moments = problem
    found = sparsegpt.pruned(weight, moments, keep)
    words = math.ceil(weight.numel() / 32)
    assert found.params == int((found.matrix != 0).sum()) + words
    assert keep * weight.numel() - 2 < found.params <= keep * weight.numel()


def test_one_column_left_out_is_made_up_for_by_the_least_squares_solution(problem):
    weight, inputs, moments = problem
    weight = weight.clone()
    weight[:, 0] *= 1e-4  # the cheapest entry of every row
    size, words = weight.numel(), math.ceil(weight.numel() / 32)
    found = sparsegpt.pruned(weight, moments, (size - len(weight) + words) / size)
    hessian = inputs.T @ inputs / len(inputs)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    rest = torch.linalg.solve(hessian[1:, 1:], hessian[1:] @ weight.T).T
    assert torch.equal(found.matrix[:, 0], torch.zeros(len(weight)))
    assert torch.allclose(found.matrix[:, 1:].double(), rest, atol=1e-6)


def test_uncorrelated_inputs_leave_the_largest_entries_of_a_panel(problem):
    weight = problem[0]
    white = dataclasses.replace(problem[2], input=400 * torch.eye(30).double())
    matrix = sparsegpt.pruned(weight, white, 0.5).matrix.double()
    kept = matrix != 0
    assert torch.allclose(matrix[kept], weight[kept], atol=1e-6)
    assert weight[kept].abs().min() >= weight[~kept].abs().max()


def test_it_beats_sizes_alone_on_correlated_inputs(problem):
    weight, inputs, moments = problem
    found = sparsegpt.pruned(weight, moments, 0.5).matrix.double()
    kept = weight.abs().flatten().topk(int((found != 0).sum())).indices
    largest = torch.zeros(weight.numel(), dtype=weight.dtype)
    largest[kept] = weight.flatten()[kept]
    errors = [(inputs @ (weight - m.view(weight.shape)).T).norm() for m in (found, largest)]
    assert errors[0] < 0.6 * errors[1]


def test_panels_after_the_first_are_masked_too(monkeypatch, problem):
    monkeypatch.setattr(sparsegpt, "PANEL", 8)
    weight, _, moments = problem
    zeros = (sparsegpt.pruned(weight, moments, 0.5).matrix == 0).sum(0)
    assert all(int(part.sum()) > 0 for part in zeros.split(8))
