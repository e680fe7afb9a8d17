"""GGUF files: plain and quantised tensors, metadata, rotary factors, the embedded model."""

from __future__ import annotations

import logging

import gguf
import numpy as np
import pytest
import torch

from qll.errors import ConfigError, MissingTensorError, ShapeError, UsageError
from qll.load import expected_specs, open_source
from qll.load.gguf_header import read_header
from tests.checkpoints import LLAMA_3_ROPE, assert_same, interleaved, weights, write_gguf
from tests.conftest import make_tiny_llama

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"


def test_float32_file(tiny_gguf_file, tiny_llama):
    source = open_source(tiny_gguf_file)
    assert_same(source, tiny_llama)
    assert (source.format, source.row_order, source.name) == ("gguf", "interleaved", "tiny")


def test_config_is_that_of_the_model(tiny_gguf_file, tiny_llama):
    found, expected = open_source(tiny_gguf_file).config.to_dict(), tiny_llama.config.to_dict()
    for key in ("architectures", "dtype", "transformers_version", "use_cache"):
        found.pop(key, None), expected.pop(key, None)
    assert found == expected | {"initializer_range": 0.02}


def test_folder_with_one_file(tmp_path, tiny_gguf_file, tiny_llama):
    (tmp_path / "a.gguf").write_bytes(tiny_gguf_file.read_bytes())
    assert_same(open_source(tmp_path), tiny_llama)
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(UsageError, match=r"a\.gguf, b\.gguf"):
        open_source(tmp_path)


def test_file_without_suffix(tmp_path, tiny_gguf_file, tiny_llama):
    (tmp_path / "sha256-0a").write_bytes(tiny_gguf_file.read_bytes())
    assert_same(open_source(tmp_path / "sha256-0a"), tiny_llama)


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_half_precision_is_kept(tmp_path, kind, dtype):
    model = make_tiny_llama().to(dtype)
    source = open_source(write_gguf(model, tmp_path / "a.gguf", kind))
    for name, expected in weights(model).items():
        wanted = dtype if expected.ndim == 2 else torch.float32
        assert source.specs()[name].dtype == wanted
        assert torch.equal(source.read(name), expected.to(wanted))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors_are_those_of_the_package(tmp_path, tiny_llama, kind):
    source = open_source(write_gguf(tiny_llama, tmp_path / "a.gguf", kind))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    raw = stored["blk.1.ffn_down.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(raw.data, raw.tensor_type))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(source.read(name), expected)
    assert torch.equal(source.read(name, rows=slice(7, 23)), expected[7:23])
    raw = stored["blk.0.attn_q.weight"]
    unpermuted = torch.from_numpy(gguf.quants.dequantize(raw.data, raw.tensor_type))
    assert torch.equal(interleaved(source.read(Q), 4), unpermuted)
    error = (source.read(Q) - weights(tiny_llama)[Q]).abs().max()
    assert 0 < error < 0.05


def test_dequantisation_in_chunks_is_the_same(tmp_path, tiny_llama, monkeypatch):
    source = open_source(write_gguf(tiny_llama, tmp_path / "a.gguf", "Q8_0"))
    whole = source.read("lm_head.weight")
    monkeypatch.setattr("qll.load.gguf.CHUNK_ELEMENTS", 64 * 7)
    assert torch.equal(source.read("lm_head.weight"), whole)


BLOCK_TYPES = [
    kind
    for kind in gguf.GGMLQuantizationType
    if gguf.constants.GGML_QUANT_SIZES[kind][0] > 1 and kind in gguf.quants._type_traits
]


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_every_block_type_of_the_package_is_read(tmp_path, kind):
    """Random bytes of each type, laid out by the package's writer, read back row by row."""
    block, nbytes = gguf.constants.GGML_QUANT_SIZES[kind]
    # bytes below 0x30 keep every half-precision scale finite
    raw = np.random.default_rng(0).integers(0, 0x30, (6, 2 * nbytes), dtype=np.uint8)
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from qll.load.gguf import GGUFTensor

    tensor = GGUFTensor(path, read_header(path).tensors["w"])
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    assert tensor.spec.shape == (6, 2 * block) == tuple(expected.shape)
    torch.testing.assert_close(tensor.read(0, 6), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tensor.read(2, 5), expected[2:5], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "Q1_0"])
def test_types_the_package_cannot_dequantise_are_named(tmp_path, kind):
    from qll.load.gguf import GGUFTensor
    from qll.load.gguf_header import GGUFEntry

    quantisation = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.constants.GGML_QUANT_SIZES[quantisation]
    path = tmp_path / "raw"
    path.write_bytes(bytes(nbytes))
    with pytest.raises(ShapeError, match=kind):
        GGUFTensor(path, GGUFEntry("w", (1, block), quantisation, 0, nbytes)).read(0, 1)


def test_header_agrees_with_the_package(tiny_gguf_file):
    ours, theirs = read_header(tiny_gguf_file), gguf.GGUFReader(tiny_gguf_file)
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert (entry.offset, entry.nbytes) == (tensor.data_offset, tensor.n_bytes)
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == value


def test_metadata_of_every_type(tmp_path):
    values = {
        "add_uint8": 200, "add_int8": -5, "add_uint16": 60000, "add_int16": -300,
        "add_uint32": 2**32 - 1, "add_int32": -(2**31), "add_uint64": 2**64 - 1,
        "add_int64": -(2**63), "add_float32": 0.5, "add_float64": 0.1, "add_bool": True,
        "add_string": "\u00e9\u0120", "add_array": ["a", "", "\u4e2d"],
    }  # fmt: skip
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for method, value in values.items():
        getattr(writer, method)(method, value)
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = read_header(path).metadata
    assert {key: metadata[key] for key in values} == values
    assert (metadata["floats"], metadata["flags"]) == ([0.5, 1.5], [True, False])


@pytest.mark.parametrize("factor", [8.0, 32.0, 4.0])
def test_rotary_factors_become_llama_3_scaling(tmp_path, factor):
    rope = LLAMA_3_ROPE | {"factor": factor}
    model = make_tiny_llama(rope_parameters=rope)
    source = open_source(write_gguf(model, tmp_path / "a.gguf"))
    assert source.config.rope_parameters == rope
    from transformers import LlamaForCausalLM

    again = LlamaForCausalLM(source.config).model.rotary_emb.inv_freq
    torch.testing.assert_close(again, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    "factors",
    [
        torch.full((8,), 3.0),
        torch.zeros(8),
        torch.full((8,), float("nan")),
        torch.full((8,), float("inf")),
        torch.ones(7),
        torch.ones(8, 1),
    ],
)
def test_unknown_rotary_factors_are_refused(tmp_path, tiny_llama, factors):
    extra = {"rope_freqs.weight": factors}
    with pytest.raises(ConfigError, match="rope_freqs"):
        open_source(write_gguf(tiny_llama, tmp_path / "a.gguf", extra=extra))


def test_rotary_factors_of_one_scale_nothing(tmp_path, tiny_llama):
    extra = {"rope_freqs.weight": torch.ones(8)}
    assert_same(open_source(write_gguf(tiny_llama, tmp_path / "a.gguf", extra=extra)), tiny_llama)


def test_tied_file_has_no_output(tmp_path):
    model = make_tiny_llama(tied=True)
    source = open_source(write_gguf(model, tmp_path / "a.gguf"))
    assert source.config.tie_word_embeddings
    assert_same(source, model)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.expert_count": 8},
        {"split.count": 3},
        {"llama.rope.scaling.type": "yarn"},
        {"llama.rope.scaling.type": "linear"},  # without its factor
        {"llama.attention.key_length": 32},  # unlike rope.dimension_count
        {"llama.attention.key_length": "16"},
        {"llama.attention.key_length": 0},
    ],
)
def test_variants_we_do_not_implement_are_refused(tmp_path, tiny_llama, metadata):
    with pytest.raises(ConfigError):
        open_source(write_gguf(tiny_llama, tmp_path / "a.gguf", metadata=metadata))


def test_quantised_vectors_are_read(tmp_path, tiny_llama):
    """Blocks straddle the entries of a vector, so a slice of it needs the whole."""
    from qll.load.gguf import GGUFTensor

    path = tmp_path / "a.gguf"
    vector = np.linspace(-1, 1, 64, dtype=np.float32)
    quantisation = gguf.GGMLQuantizationType.Q8_0
    raw = gguf.quants.quantize(vector, quantisation)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", raw, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = GGUFTensor(path, read_header(path).tensors["w"])
    assert tensor.spec.shape == (64,)
    np.testing.assert_allclose(tensor.read(0, 64).numpy(), vector, atol=0.005)
    assert torch.equal(tensor.read(5, 40), tensor.read(0, 64)[5:40])


@pytest.mark.parametrize("name", ["model.norm.weight", "blk.00.attn_q.weight"])
def test_one_tensor_under_two_names_is_refused(tmp_path, tiny_llama, name):
    extra = {name: weights(tiny_llama)["model.norm.weight"]}
    with pytest.raises(MissingTensorError):
        open_source(write_gguf(tiny_llama, tmp_path / "a.gguf", extra=extra))


def test_bias_is_refused(tmp_path, tiny_llama):
    extra = {"blk.0.attn_q.bias": torch.ones(64)}
    with pytest.raises(MissingTensorError, match=r"attn_q\.bias"):
        open_source(write_gguf(tiny_llama, tmp_path / "a.gguf", extra=extra))


@pytest.mark.parametrize(("vocab", "accepted"), [(32000, True), (512, False)])
def test_file_without_rope(tmp_path, monkeypatch, caplog, vocab, accepted):
    """Only Llama 2's vocabulary may leave the base out: converters of its day did."""
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda *_: None)
    model = make_tiny_llama(vocab_size=vocab)
    path = write_gguf(model, tmp_path / "a.gguf")
    if accepted:
        with caplog.at_level(logging.WARNING, "qll.load"):
            assert open_source(path).config.rope_parameters["rope_theta"] == 10000.0
        assert "rope.freq_base" in caplog.text
    else:
        with pytest.raises(ConfigError, match=r"llama\.rope\.freq_base"):
            open_source(path)


def test_embedded_model_is_smollm2():
    source = open_source(None)
    config = source.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (
        30,
        576,
        1536,
    )
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.tie_word_embeddings
    assert config.rms_norm_eps == 1e-5
    assert source.read("model.embed_tokens.weight", rows=slice(0, 4)).shape == (4, 576)
    assert sum(torch.Size(spec.shape).numel() for spec in source.specs().values()) == 134_515_008


@pytest.mark.slow
def test_embedded_blocks_dequantise_as_the_package_does():
    """All 30 blocks, tensor by tensor, against the gguf package's own reader."""
    source = open_source(None)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(source.path).tensors}
    from qll.load.names import gguf_name

    for name in expected_specs(source.config):
        raw = stored[gguf_name(name)]
        expected = torch.from_numpy(np.array(gguf.quants.dequantize(raw.data, raw.tensor_type)))
        found = source.read(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            found = interleaved(found, 9 if "q_proj" in name else 3)
        assert torch.equal(found, expected), name
