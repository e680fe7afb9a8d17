"""A tiny Llama with moments of random tokens, and small random matrices, for the peers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.peers import Case
from qll.calibrate import LinearMoments, collect
from qll.load import open_source

TOKENS = 400


@pytest.fixture(scope="session")
def tiny_case(tiny_hf_folder, tmp_path_factory):
    """A Case of the tiny Llama at keep 0.6; `tiny_case(keep=..)` is another size of it."""
    windows = torch.randint(0, 512, (8, 40), generator=torch.Generator().manual_seed(1))
    source, folder = open_source(tiny_hf_folder), tmp_path_factory.mktemp("peers")
    moments = collect(source, windows, folder / "moments", gradients=True)
    case = Case(source, lambda: moments, windows, 0.6, 0, folder / "cache")

    def make(**changes) -> Case:
        return dataclasses.replace(case, **changes)

    return make


@pytest.fixture
def problem():
    """(weight [20, 30], inputs [400, 30], moments) with strong and weak input directions."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    mixing = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -3, 30, dtype=torch.float64)
    inputs = torch.randn(TOKENS, 30, generator=generator, dtype=torch.float64) * scales @ mixing
    grads = torch.randn(TOKENS, 20, generator=generator, dtype=torch.float64)
    return weight, inputs, LinearMoments(inputs.T @ inputs, grads.T @ grads, TOKENS, TOKENS)
