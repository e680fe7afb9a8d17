"""transformers' own generate on fast modules: the same numbers, the same text."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from qll.model.layers import NetworkModule
from qll.runtime import accelerate
from tests.unit.runtime.conftest import CHOICES, ENTRIES, flat, make_model


@pytest.mark.parametrize("choice", ["stored", "both"])
@pytest.mark.parametrize("name", ENTRIES)
@torch.no_grad()
def test_logits_stay(name, choice, ids):
    model = make_model(name)
    expected = model(ids).logits
    fast = accelerate(model, flat(), choice=CHOICES[choice])
    assert fast is model
    assert_close(fast(ids).logits, expected, atol=1e-4, rtol=1e-4)
    networks = [type(m) for m in fast.model.layers.modules() if isinstance(m, NetworkModule)]
    assert not networks


def test_generate_writes_the_same(ids):
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    texts = [
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        for model in (make_model("mixed"), accelerate(make_model("mixed"), flat()))
    ]
    assert torch.equal(*texts)
