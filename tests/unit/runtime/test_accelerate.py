"""transformers' own generate on fast modules: the same numbers, the same text."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from qll.errors import UsageError
from qll.model.layers import NetworkModule
from qll.runtime import accelerate
from tests.conftest import make_tiny_llama
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


@pytest.mark.parametrize("name", ["mixed", "inner"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_texts_of_unequal_length_write_the_same(name, cache, ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0, "attention_mask": mask}
    slow, fast = make_model(name), accelerate(make_model(name), flat())
    expected = slow.generate(ids, **settings)
    assert torch.equal(fast.generate(ids, cache_implementation=cache, **settings), expected)


@torch.no_grad()
def test_lower_precision_stays_as_near_as_transformers_own(ids):
    exact = make_model("inner")(ids).logits
    slow = make_model("inner").to(torch.bfloat16)(ids).logits.float()
    fast = accelerate(make_model("inner").to(torch.bfloat16), flat())(ids).logits.float()
    assert (fast - exact).norm() <= 1.2 * (slow - exact).norm()


def test_a_bias_is_refused_before_it_is_lost():
    model = make_tiny_llama(attention_bias=True)
    with pytest.raises(UsageError, match=r"self_attn\.q_proj: a linear with a bias"):
        accelerate(model, flat())
