"""Converted folders of the tiny Llama, made directly from the interfaces (no convert room)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qll import store
from qll.load import open_source
from qll.model import commit_folder, stored_shapes, write_static_files
from qll.tn import JOINTS, NETWORKS
from qll.tn.network import NetworkSpec
from tests.conftest import VOCAB, make_tiny_llama


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def lowrank(shape, rank, gauge="interpolative"):
    return NetworkSpec("lowrank", shape, (rank,), gauge=gauge)


def star(shapes, rank, gauge="interpolative"):
    """A joint tree whose members have no bonds of their own."""
    total = (sum(out for out, _ in shapes), shapes[0][1])
    ranks = (rank, *(min(out, rank) for out, _ in shapes))
    return NetworkSpec("joint_tree", total, ranks, gauge=gauge, members=tuple(shapes))


def entries_of(config, rank_of):
    """q/k/v and gate/up as joint trees, o and down low rank, the embedding (and head) low rank.

    `rank_of(full)` gives the rank in place of the full one.
    """
    d, f = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    entries = {}
    for index in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        qkv = tuple(f"{attention}.{name}_proj" for name in "qkv")
        entries[qkv] = star(((d, d), (kv, d), (kv, d)), rank_of(d))
        entries[(f"{attention}.o_proj",)] = lowrank((d, d), rank_of(d))
        entries[(f"{mlp}.gate_proj", f"{mlp}.up_proj")] = star(((f, d), (f, d)), rank_of(d))
        entries[(f"{mlp}.down_proj",)] = lowrank((d, f), rank_of(d))
    entries[("model.embed_tokens",)] = lowrank((config.vocab_size, d), rank_of(d))
    if not config.tie_word_embeddings:
        entries[("lm_head",)] = lowrank((config.vocab_size, d), rank_of(d))
    return entries


def decompose(members, spec, weights):
    """The network of an entry in the gauge of its spec."""
    plain = spec.with_gauge("none")
    if len(members) == 1:
        network = NETWORKS[spec.format].decompose(weights[f"{members[0]}.weight"], plain)
    else:
        matrices = [weights[f"{member}.weight"] for member in members]
        network = JOINTS[spec.format].decompose(matrices, plain)
    return network.interpolate() if spec.gauge == "interpolative" else network


def write_folder(folder: Path, model, rank_of=lambda full: full, dtype=torch.float32, entries=None):
    """A complete converted folder of `model`; returns `folder`."""
    dense = folder.with_name(folder.name + "_dense")
    model.save_pretrained(dense)
    entries = entries_of(model.config, rank_of) if entries is None else entries
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    tensors = {}
    for members, spec in entries.items():
        network = decompose(members, spec, weights)
        stored = [*(core.to(dtype) for core in network.cores)]
        stored += [index.to(torch.int32) for index in network.indices]
        tensors |= dict(zip(stored_shapes(members, spec), stored, strict=True))
        for member in members:
            del weights[f"{member}.weight"]
    tensors |= {name: tensor.to(dtype) for name, tensor in weights.items()}
    store.write_tensors(folder / "model.safetensors", tensors)
    write_static_files(folder, open_source(dense), make_tokenizer(), entries, dtype=dtype)
    commit_folder(folder, {"source": "tiny"})
    return folder


@pytest.fixture(scope="session", params=["untied", "tied"])
def full_pair(request, tmp_path_factory):
    """(dense model, folder of networks of full rank): the two must compute the same."""
    model = make_tiny_llama(tied=request.param == "tied", seed=1)
    return model, write_folder(tmp_path_factory.mktemp("full") / request.param, model)


@pytest.fixture(scope="session", params=["untied", "tied"])
def small_folder(request, tmp_path_factory) -> Path:
    """A truncated folder."""
    model = make_tiny_llama(tied=request.param == "tied", seed=2)
    folder = tmp_path_factory.mktemp("small") / request.param
    return write_folder(folder, model, rank_of=lambda full: full // 4)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(5))
