"""Compiled blocks: plain outside training, and a missing compiler explained. That a compiled run
learns the same is in tests/e2e/test_lm_compile.py."""

from __future__ import annotations

import pytest
import torch

from qll.bytelm.compiled import compiled_training
from qll.errors import UsageError


def missing():
    raise torch._inductor.exc.InvalidCxxCompiler


def test_a_missing_compiler_is_explained_when_training_begins(monkeypatch):
    monkeypatch.setattr(torch._inductor.config, "fx_graph_cache", False)
    monkeypatch.setattr(torch._inductor.cpp_builder, "get_cpp_compiler", missing)
    norm = torch.nn.LayerNorm(37)
    forward = compiled_training(norm.eval())
    assert forward(torch.ones(3, 37)).shape == (3, 37)
    norm.train()
    with pytest.raises(UsageError, match=r"--compile.*C\+\+ compiler.*without --compile"):
        forward(torch.ones(3, 37))
