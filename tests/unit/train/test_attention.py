"""Attention as plain products: the numbers of torch's own, forward and backward."""

import pytest
import torch

from qll.load import open_source
from qll.model import load_dense
from qll.model.blocks import build_block, run_block
from qll.train import autocast, prepare_training

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_block_with_products_is_the_block_with_torchs_attention(tiny_hf_folder, precision):
    source = open_source(tiny_hf_folder)
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(4))
    found = []
    for chosen in (torch.float32, torch.bfloat16):
        block = build_block(source, 0)
        prepare_training(block, chosen, CPU)
        states = hidden.clone().requires_grad_()
        with autocast(precision, CPU):
            output = run_block(block, states)
        output.float().square().sum().backward()
        found.append((output.float(), states.grad))
    allowed = 1e-6 if precision == torch.float32 else 2e-2
    for fused, products in zip(*found, strict=True):
        assert (fused - products).abs().max() <= allowed * fused.abs().max()


def test_a_model_that_trains_in_bfloat16_sees_no_later_token(tiny_hf_folder):
    model = load_dense(open_source(tiny_hf_folder))
    prepare_training(model, torch.bfloat16, CPU)
    ids = torch.arange(3, 15)[None]
    changed = ids.clone()
    changed[0, 7:] = 2
    with torch.no_grad(), autocast(torch.bfloat16, CPU):
        before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])
