"""Folding gains into the next matrices does not change the function."""

from __future__ import annotations

import copy

import pytest
import torch

from qll.model import fold_gain, gain_of
from tests.conftest import make_tiny_llama


@pytest.mark.parametrize("tied", [False, True])
def test_folding_every_gain_preserves_the_function(tied, ids):
    model = make_tiny_llama(tied=tied, seed=7)
    folded = copy.deepcopy(model)
    state = dict(model.state_dict())
    gains = set()
    with torch.no_grad():
        for name, module in folded.named_modules():
            if isinstance(module, torch.nn.Linear) and (gain := gain_of(name, model.config)):
                module.weight.copy_(fold_gain(module.weight, state[gain]))
                gains.add(gain)
        for gain in gains:
            folded.get_parameter(gain).fill_(1.0)
        expected, found = model(input_ids=ids).logits, folded(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(gains) == 4 + (not tied)
    changed = folded.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert not torch.equal(changed, state["model.layers.0.mlp.up_proj.weight"])


def test_matrices_that_read_no_norm(tiny_llama):
    for path in ("self_attn.o_proj", "mlp.down_proj"):
        assert gain_of(f"model.layers.0.{path}", tiny_llama.config) is None
    assert gain_of("model.embed_tokens", tiny_llama.config) is None


def test_half_precision_is_widened():
    folded = fold_gain(torch.ones(1, 1).bfloat16(), torch.tensor([1.0 + 2**-12]))
    assert folded.dtype == torch.float32
    assert folded.item() == 1.0 + 2**-12
