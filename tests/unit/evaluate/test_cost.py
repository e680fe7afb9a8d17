"""Closed forms of cost against torch's own counters and the files on disk."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from qll.evaluate import (
    bytes_by_dtype,
    cost_of_pair,
    count_params,
    decode_tokens_per_second,
    forward_flops,
    pair,
    peak_device_bytes,
    peak_rss_bytes,
    prefill_tokens_per_second,
)
from qll.evaluate.speed import greedy
from qll.model import TNEmbedding, TNLinear, TNTiedHead
from qll.tn import NETWORKS, NetworkSpec
from tests.conftest import make_tiny_llama

UP = "model.layers.0.mlp.up_proj"


def network(matrix, rank, gauge="none"):
    spec = NetworkSpec("lowrank", tuple(matrix.shape), (rank,))
    found = NETWORKS["lowrank"].decompose(matrix.detach(), spec)
    return found.interpolate() if gauge == "interpolative" else found


@pytest.fixture(scope="module")
def converted():
    """A tied tiny Llama with a low-rank up_proj and a low-rank embedding that is also its head."""
    model = make_tiny_llama(tied=True)
    up, table = model.get_submodule(UP).weight, model.model.embed_tokens.weight
    layer = TNLinear.from_network(network(up, 8, "interpolative"))
    model.set_submodule(UP, layer)
    model.model.embed_tokens = TNEmbedding.from_network(network(table, 16))
    model.lm_head = TNTiedHead(model.model.embed_tokens)
    return model


def counted_flops(model, tokens):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager(torch.arange(tokens)[None], use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [1, 7])
def test_flops_equal_torchs_counter(tied, tokens):
    model = make_tiny_llama(tied=tied)
    assert forward_flops(model, tokens, tokens) == counted_flops(model, tokens)


def test_flops_of_a_decoding_step_equal_torchs_counter(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        cache = model(torch.arange(9)[None], use_cache=True).cache
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor([[9]]), cache=cache, use_cache=True)
    assert forward_flops(model, 1, 10) == counter.get_total_flops()


def test_flops_of_a_converted_model(converted):
    dense = forward_flops(make_tiny_llama(tied=True), 1, 5)
    up_dense, up = 2 * 128 * 64, converted.get_submodule(UP).network().flops(1)
    head_dense, head = 2 * 512 * 64, converted.model.embed_tokens.network().flops(1)
    assert 0 < up < up_dense
    assert 0 < head < head_dense
    assert forward_flops(converted, 1, 5) == dense - up_dense + up - head_dense + head


@pytest.mark.parametrize("tied", [False, True])
def test_params_equal_transformers_count(tied):
    model = make_tiny_llama(tied=tied)
    found = count_params(model)
    assert found.total == sum(parameter.numel() for parameter in model.parameters())
    assert found.embeddings == 512 * 64 * (1 if tied else 2)
    assert found.norms == 5 * 64
    assert found.blocks == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)


def test_params_of_a_converted_model_count_pivots(converted):
    found = count_params(converted)
    dense = count_params(make_tiny_llama(tied=True))
    rank_eight = 8 * (128 + 64) - 8 * 8 + 8  # one identity block saved, eight pivots added
    assert dense.blocks - found.blocks == 128 * 64 - rank_eight
    assert found.embeddings == 16 * (512 + 64)
    assert found.total == found.blocks + found.embeddings + found.norms


def test_bytes_equal_the_saved_file(tmp_path):
    model = make_tiny_llama(tied=True).bfloat16()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert bytes_by_dtype(model) == {"bfloat16": 2 * stored}


def test_bytes_of_a_converted_model_name_the_pivots(converted):
    sizes = bytes_by_dtype(converted)
    assert sizes["int32"] == 4 * 8
    assert sizes["float32"] == 4 * (count_params(converted).total - 8)


def test_greedy_equals_transformers_generate(tiny_llama):
    prompt = torch.tensor([[5, 9, 200, 31]])
    expected = tiny_llama.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    ids, seconds = greedy(tiny_llama, prompt, 7)
    assert torch.equal(ids, expected[:, 4:])
    assert seconds > 0


def test_rates_are_positive_and_finite(tiny_llama, converted):
    for model in (tiny_llama, converted):
        decode = decode_tokens_per_second(model, prompt_tokens=4, new_tokens=3, repeats=1)
        prefill = prefill_tokens_per_second(model, 32, repeats=2)
        assert 0 < decode < math.inf
        assert 0 < prefill < math.inf


def test_peak_memory_is_in_bytes():
    held = torch.ones(1 << 24)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert held.nbytes < peak_rss_bytes() < installed
    assert peak_device_bytes("cpu") == 0


def test_rates_of_generate_stand_beside_those_of_transformers(tiny_llama, converted):
    cost = cost_of_pair(tiny_llama, converted)
    for rates in (cost, cost["runtime"]):
        for phase in ("decode", "prefill"):
            found = rates[f"{phase}_tokens_per_second"]
            assert set(found) == {"dense", "converted"}
            assert all(0 < rate < math.inf for rate in found.values())


def test_what_the_runtime_cannot_do_is_a_warning(tiny_llama, converted, monkeypatch, caplog):
    monkeypatch.setattr(pair, "free_bytes", lambda device: 0)
    assert "runtime" not in cost_of_pair(tiny_llama, converted)
    assert "needs 0.0 GB more memory" in caplog.text
    monkeypatch.undo()
    rope = {**tiny_llama.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    monkeypatch.setattr(tiny_llama.config, "rope_parameters", rope)
    assert "runtime" not in cost_of_pair(tiny_llama, converted)
    assert "a rotary embedding that changes" in caplog.text
