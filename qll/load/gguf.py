"""GGUF files: one file with config, vocabulary and (mostly quantised) tensors.

Metadata becomes a LlamaConfig; tensors are dequantised by the gguf package a few rows at a time.
Llama 3's rotary scaling is stored as a table of factors per frequency (`rope_freqs.weight`), from
which its four parameters are recovered and then compared with the table.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from qll.errors import ConfigError, ShapeError
from qll.load.checkpoint import Checkpoint, TensorSpec
from qll.load.config import LLAMA_2_ROPE_THETA, MAX_LAYERS, llama_config, number, whole
from qll.load.files import read_tensor, reject_pointer
from qll.load.gguf_header import GGUFEntry, GGUFHeader, read_header
from qll.load.names import by_hf_name, hf_name_of_gguf, is_skipped
from qll.load.rope import scaled_rope

if TYPE_CHECKING:
    from transformers import LlamaConfig

PLAIN = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.I64: torch.int64,
    GGMLQuantizationType.I32: torch.int32,
    GGMLQuantizationType.I16: torch.int16,
    GGMLQuantizationType.I8: torch.int8,
}
# Rows dequantised at once: the package makes several temporaries of this size
CHUNK_ELEMENTS = 1 << 22
LLAMA_2_VOCAB = 32000
KEY_LENGTH = "attention.key_length"
logger = logging.getLogger("qll.load")


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file; see checkpoint.Stored."""

    path: Path
    entry: GGUFEntry

    @property
    def spec(self) -> TensorSpec:
        """Shape, and the dtype of plain numbers; float32 for everything quantised."""
        return TensorSpec(self.entry.shape, PLAIN.get(self.entry.kind, torch.float32))

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start..stop-1, dequantised; only their bytes are read."""
        shape = (stop - start, *self.entry.shape[1:])
        row_bytes = self.entry.nbytes // self.entry.shape[0]
        offset = self.entry.offset + start * row_bytes
        if self.entry.kind in PLAIN:
            return read_tensor(self.path, offset, shape, PLAIN[self.entry.kind])
        if len(self.entry.shape) == 1:
            # blocks straddle the "rows" of a vector: it is one row
            raw = read_tensor(self.path, self.entry.offset, (1, self.entry.nbytes), torch.uint8)
            return self._dequantize(raw.numpy()).flatten()[start:stop]
        result = torch.empty(shape, dtype=torch.float32)
        step = max(1, CHUNK_ELEMENTS // math.prod(shape[1:]))
        for row in range(0, stop - start, step):
            count = min(step, stop - start - row)
            place = offset + row * row_bytes
            raw = read_tensor(self.path, place, (count, row_bytes), torch.uint8)
            result[row : row + count] = self._dequantize(raw.numpy()).view(count, *shape[1:])
        return result

    def _dequantize(self, raw: np.ndarray) -> Tensor:
        try:
            # a scale that is not finite makes numpy warn; the caller checks the result
            with np.errstate(all="ignore"):
                return torch.from_numpy(dequantize(raw, self.entry.kind))
        except NotImplementedError:
            raise ShapeError(
                "quantisation is not implemented by the gguf package",
                where=f"{self.path}: {self.entry.name}",
                found=self.entry.kind.name,
                hint="use another quantisation of the model",
            ) from None


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint of one GGUF file; raises HeaderError, TruncatedFileError or ConfigError."""
    reject_pointer(path)
    header = read_header(path)
    tensors = {
        name: GGUFTensor(path, entry)
        for name, entry in header.tensors.items()
        if not is_skipped(name)
    }
    return Checkpoint(
        path=path,
        name=path.stem,
        format="gguf",
        row_order="interleaved",
        config=gguf_config(header, path),
        files=(path,),
        tensors=by_hf_name(tensors, hf_name_of_gguf),
    )


def gguf_config(header: GGUFHeader, path: Path) -> LlamaConfig:
    """The LlamaConfig that the metadata states; raises ConfigError naming the key that is wrong."""
    metadata = header.metadata
    _refuse_variants(metadata, path)
    prefixed = {
        key.removeprefix("llama."): value
        for key, value in metadata.items()
        if key.startswith("llama.")
    }
    heads = whole(prefixed, "attention.head_count", path)
    width = whole(prefixed, "embedding_length", path)
    facts = {
        "hidden_size": width,
        "intermediate_size": whole(prefixed, "feed_forward_length", path),
        "num_hidden_layers": whole(prefixed, "block_count", path, MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": prefixed.get("attention.head_count_kv", heads),
        "head_dim": whole({KEY_LENGTH: width // heads, **prefixed}, KEY_LENGTH, path),
        "vocab_size": _vocab_size(header),
        "rms_norm_eps": _shortest(number(prefixed, "attention.layer_norm_rms_epsilon", path, 1.0)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if "context_length" in prefixed:
        facts["max_position_embeddings"] = prefixed["context_length"]
    rope = _rope(prefixed, header, path, facts["head_dim"], facts["vocab_size"])
    return llama_config(path, rope_parameters=rope, **facts)


def _refuse_variants(metadata: Mapping[str, Any], path: Path) -> None:
    """Raise for files that are not one whole dense Llama."""
    if (found := metadata.get("general.architecture")) != "llama":
        raise ConfigError(
            "not a Llama model", where=path, expected="general.architecture llama", found=found
        )
    if metadata.get("llama.expert_count", 0):
        raise ConfigError("mixture of experts is not implemented", where=path)
    if (parts := metadata.get("split.count", 0)) not in (0, 1):
        raise ConfigError(
            "GGUF file is one part of several",
            where=path,
            found=f"{parts} parts",
            hint="join them with llama-gguf-split --merge",
        )


def _vocab_size(header: GGUFHeader) -> Any:
    """Stated size, else that of the vocabulary, else that of the embedding table."""
    if (stated := header.metadata.get("llama.vocab_size")) is not None:
        return stated
    if isinstance(tokens := header.metadata.get("tokenizer.ggml.tokens"), list):
        return len(tokens)
    table = header.tensors.get("token_embd.weight")
    return table.shape[0] if table else None


def _rope(
    prefixed: Mapping[str, Any], header: GGUFHeader, path: Path, head_dim: int, vocab: Any
) -> dict[str, Any]:
    """Rotary parameters from metadata and, for Llama 3.1 and later, from the table of factors."""
    if (turned := prefixed.get("rope.dimension_count", head_dim)) != head_dim:
        raise ConfigError(
            "partial rotary embedding is not implemented",
            where=path,
            expected=f"llama.rope.dimension_count {head_dim}",
            found=turned,
        )
    rope = {"rope_type": "default", "rope_theta": _theta(prefixed, path, vocab)}
    kind = prefixed.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ConfigError(
            "rotary scaling of a type that is not implemented",
            where=path,
            expected="llama.rope.scaling.type none or linear, or a rope_freqs tensor",
            found=kind,
        )
    if kind == "linear":
        factor = number(prefixed, "rope.scaling.factor", path, 1e12)
        rope |= {"rope_type": "linear", "factor": factor}
    if (entry := header.tensors.get("rope_freqs.weight")) is None:
        return rope
    if kind != "none":
        raise ConfigError("two rotary scalings at once", where=path, found=f"{kind}, rope_freqs")
    if entry.shape != (head_dim // 2,):
        raise ConfigError(
            "rotary factors do not fit the heads",
            where=f"{path}: rope_freqs.weight",
            expected=(head_dim // 2,),
            found=entry.shape,
        )
    factors = GGUFTensor(path, entry).read(0, entry.shape[0]).double()
    return scaled_rope(factors, rope["rope_theta"], head_dim, path)


def _theta(prefixed: Mapping[str, Any], path: Path, vocab: Any) -> float:
    if "rope.freq_base" in prefixed:
        return _shortest(number(prefixed, "rope.freq_base", path, 1e12))
    if vocab == LLAMA_2_VOCAB:
        logger.warning(
            "%s has no llama.rope.freq_base: using Llama 2's %g", path, LLAMA_2_ROPE_THETA
        )
        return LLAMA_2_ROPE_THETA
    raise ConfigError(
        "rotary embedding is not stated",
        where=path,
        expected="llama.rope.freq_base",
        found="nothing",
        hint="convert the model to GGUF again with a current converter",
    )


def _shortest(value: float) -> float:
    """The shortest decimal with the same float32: metadata stores 1e-5 as 9.99999975e-06."""
    return float(str(np.float32(value)))
