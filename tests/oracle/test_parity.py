"""One model, every layout, four implementations: the logits are the same.

A tiny random Llama is written as a Meta folder (one and two shards), as a GGUF file and as a
Hugging Face folder. Read back through our Source, it must agree with transformers, with our own
reference (tests/oracle/reference_llama.py) and with Meta's code (package llama-models). Then the
real SmolLM2: our GGUF path against transformers' own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qll.load.source import open_source
from qll.load.tokenizer import open_tokenizer
from qll.model.dense import load_dense
from tests.checkpoints import (
    meta_params,
    meta_weights,
    weights,
    write_gguf,
    write_hf_folder,
    write_hf_original,
    write_meta_folder,
)
from tests.conftest import make_tiny_llama
from tests.oracle.reference_llama import reference_logits

pytestmark = pytest.mark.oracle
IDS = torch.randint(0, 512, (1, 48), generator=torch.Generator().manual_seed(3))
ROPE_31 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALED = {"rope_parameters": ROPE_31, "max_position_embeddings": 131072}
MODELS = {"untied": {}, "tied": {"tied": True}, "llama3_rope": SCALED}
LAYOUTS = {
    "hf": lambda model, folder: write_hf_folder(model, folder),
    "hf_sharded": lambda model, folder: write_hf_folder(model, folder, max_shard_size="100KB"),
    "hf_original": lambda model, folder: write_hf_original(model, folder),
    "meta": lambda model, folder: write_meta_folder(model, folder),
    "meta_2_shards": lambda model, folder: write_meta_folder(model, folder, shards=2),
    "gguf": lambda model, folder: write_gguf(model, folder / "tiny.gguf"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make_tiny_llama(seed=5, **MODELS[request.param])


def logits_of(model, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits[0]


def difference(first: Tensor, second: Tensor) -> float:
    return (first.double() - second.double()).abs().max().item()


def test_transformers_agrees_with_our_reference(model):
    ours = reference_logits(weights(model), model.config, IDS[0].tolist())
    assert ours.abs().max() > 1  # not a model of zeros
    assert difference(ours, logits_of(model)) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_through_our_source_agrees(model, layout, tmp_path):
    source = open_source(LAYOUTS[layout](model, tmp_path))
    loaded = load_dense(source)
    assert difference(logits_of(loaded), logits_of(model)) < 1e-5
    read = {name: source.read(name) for name in source.specs()}
    reference = reference_logits(read, source.config, IDS[0].tolist())
    assert difference(reference, logits_of(model)) < 1e-5


# --- Meta's own code ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """fairscale's model parallelism with a single rank."""
    import fairscale.nn.model_parallel.initialize as parallel
    from torch import distributed

    meeting_point = tmp_path_factory.mktemp("gloo") / "store"
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting_point}", rank=0, world_size=1
    )
    parallel.initialize_model_parallel(1)
    yield
    parallel.destroy_model_parallel()
    distributed.destroy_process_group()


def metas_logits(model) -> Tensor:
    """Logits of Meta's Transformer with the weights of `model` in Meta's names and row order."""
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    args = ModelArgs(**meta_params(model.config), max_batch_size=1, max_seq_len=64)
    theirs = Transformer(args)
    state = meta_weights(model)
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    theirs.load_state_dict(state)
    return theirs(IDS, start_pos=0)[0]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("layout", ["meta", "meta_2_shards", "hf", "gguf"])
def test_metas_reference_model_agrees_with_our_source(model, layout, tmp_path):
    theirs = metas_logits(model)
    assert difference(theirs, logits_of(model)) < 1e-5
    loaded = load_dense(open_source(LAYOUTS[layout](model, tmp_path)))
    assert difference(theirs, logits_of(loaded)) < 1e-5


# --- These tests can fail -------------------------------------------------------------------


def test_wrong_row_order_is_a_large_difference():
    model = make_tiny_llama(seed=5)
    config, wrong = model.config, weights(model)
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        wrong[name] = meta_weights(model)[f"layers.{layer}.attention.wq.weight"]
    logits = reference_logits(wrong, config, IDS[0].tolist())
    assert difference(logits, logits_of(model)) > 1e-2


def test_scaled_rope_is_a_visible_difference():
    plain, scaled = make_tiny_llama(seed=5), make_tiny_llama(seed=5, **SCALED)
    assert difference(logits_of(plain), logits_of(scaled)) > 1e-4


# --- The real model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_source():
    return open_source(None)


@pytest.fixture(scope="module")
def smollm2(smollm2_source) -> LlamaForCausalLM:
    return load_dense(smollm2_source)


@pytest.fixture(scope="module")
def smollm2_by_transformers(smollm2_source) -> LlamaForCausalLM:
    # transformers asks for accelerate before it reads a GGUF file, and then needs nothing of it
    file = smollm2_source.path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: True)
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )


@pytest.fixture(scope="module")
def prompt(smollm2_source) -> Tensor:
    text = (
        "The Moon is Earth's only natural satellite. It orbits at an average distance of 384,399 "
        "kilometres, about thirty times the diameter of Earth, and always shows the same face, "
        "because its rotation has been locked to its orbit by tides for more than 4 billion "
        "years. The first people to walk on it"
    )
    ids = open_tokenizer(smollm2_source)(text)["input_ids"][:64]
    assert len(ids) == 64
    return torch.tensor([ids])


@pytest.mark.slow
def test_smollm2_equals_transformers_own_gguf_path(smollm2, smollm2_by_transformers, prompt):
    ours, theirs = logits_of(smollm2, prompt), logits_of(smollm2_by_transformers, prompt)
    assert difference(ours, theirs) < 1e-4
    # two equal wrongs would pass this; a model that reads English does not lose 3 nats a token
    assert torch.nn.functional.cross_entropy(ours[:-1], prompt[0, 1:]) < 3.0


@pytest.mark.slow
def test_smollm2_continues_with_the_same_20_tokens(smollm2, smollm2_by_transformers, prompt):
    def continue_greedily(model) -> list[int]:
        settings = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
        mask = torch.ones_like(prompt)
        return model.generate(prompt, attention_mask=mask, **settings)[0, 64:].tolist()

    ours = continue_greedily(smollm2)
    assert len(ours) == 20
    assert len(set(ours)) > 5  # text, not one token over and over
    assert ours == continue_greedily(smollm2_by_transformers)
