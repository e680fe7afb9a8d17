"""The stand-in for Llama 3: exact shapes, the same weights in every format, made from names."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import make_llama
from benchmarks.llama_shapes import SHAPES, VOCAB
from benchmarks.llama_weights import ROWS, Weights
from qll.errors import UsageError
from qll.load import open_source, open_tokenizer
from qll.load.names import expected_specs

TINY = SHAPES["tiny"]
WEIGHTS = Weights(TINY.n_layers)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("standins")
    kinds = {"hf": ("hf", None), "hf3": ("hf", 3), "meta": ("meta", None), "meta2": ("meta", 2)}
    for name, (format, shards) in kinds.items():
        make_llama.make(TINY, format, base / name, shards)
    return base


@pytest.mark.parametrize("name", ["hf", "hf3", "meta", "meta2"])
def test_every_format_holds_the_tensors_of_their_names(folders, name):
    source = open_source(folders / name)
    specs = source.specs()
    assert {key: spec.shape for key, spec in specs.items()} == expected_specs(TINY.config())
    assert {spec.dtype for spec in specs.values()} == {torch.bfloat16}
    assert source.config.rope_parameters["rope_theta"] == 500000.0
    for key in specs:
        if "embed" not in key and "lm_head" not in key:
            assert torch.equal(source.read(key), WEIGHTS.tensor(key, specs[key].shape)), key
    table = WEIGHTS.tensor("lm_head.weight", (VOCAB, TINY.dim))
    assert torch.equal(source.read("lm_head.weight", slice(VOCAB - 9, VOCAB)), table[-9:])


def test_files_are_cut_as_asked(folders):
    assert len(list((folders / "hf3").glob("*.safetensors"))) == 3
    assert len(list((folders / "meta2").glob("consolidated.*.pth"))) == 2
    specs = expected_specs(SHAPES["llama3-8b"].config())
    assert len(make_llama.hf_files(specs, None)) == 4
    assert len(make_llama.hf_files(expected_specs(SHAPES["llama3-70b"].config()), None)) == 30


def test_sizes_are_the_original_ones():
    assert make_llama.size_of(SHAPES["llama3-8b"]) == 2 * 8_030_261_248
    assert make_llama.size_of(SHAPES["llama3-70b"]) == 2 * 70_553_706_496
    assert SHAPES["llama3-8b"].params()["ffn_dim_multiplier"] == 1.3


def test_tokenizer_is_the_real_one(folders):
    tokenizer = open_tokenizer(open_source(folders / "hf"))
    assert len(tokenizer) == VOCAB
    assert tokenizer("Hello world")["input_ids"] == [128000, 9906, 1917]


def test_spectrum_is_a_bulk_with_spikes():
    rows, columns = 384, 256
    name = "model.layers.1.mlp.up_proj.weight"
    values = torch.linalg.svdvals(Weights(4).tensor(name, (rows, columns)).double())
    edge = Weights(4).scale(name, (rows, columns)) * (math.sqrt(rows) + math.sqrt(columns))
    assert 4 * edge < values[0] < 9 * edge
    assert values[100] < edge
    assert values[-1] > 0.01 * edge


def test_super_weights_stand_out():
    name, shape = "model.layers.1.mlp.down_proj.weight", (256, 512)
    matrix = Weights(4).tensor(name, shape).float().abs()
    assert int((matrix > 0.5 * matrix.max()).sum()) == 3
    other = Weights(4).tensor(name.replace("layers.1", "layers.2"), shape).float().abs()
    assert other.max() < 0.5 * matrix.max()


def test_pieces_are_the_whole():
    name, shape = "model.layers.0.mlp.gate_proj.weight", (ROWS + 300, 16)
    parts = [piece for _, piece in WEIGHTS.pieces(name, shape)]
    assert len(parts) == 2
    assert torch.equal(torch.cat(parts), WEIGHTS.tensor(name, shape))


@torch.no_grad()
def test_activations_stay_finite_through_many_blocks(tmp_path):
    from qll.model.blocks import build_block, embed, run_block

    make_llama.make(TINY.with_blocks(32), "hf", tmp_path / "deep")
    source = open_source(tmp_path / "deep")
    hidden = embed(source, torch.arange(64)[None] * 997)
    for index in range(32):
        hidden = run_block(build_block(source, index), hidden)
    assert torch.isfinite(hidden).all()
    assert 0.1 < hidden.square().mean().sqrt() < 100


def test_a_folder_that_is_there_is_refused(folders):
    with pytest.raises(UsageError, match="not empty"):
        make_llama.make(TINY, "hf", folders / "hf")
