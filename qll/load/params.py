"""What a model is, from Meta's params.json, which leaves much to Meta's code: stated here.

The feed-forward width follows from three numbers, scaled rotary embeddings are one flag, Llama 2's
rotary base is not written at all, and tied embeddings show only in the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qll.errors import ConfigError
from qll.load.config import LLAMA_2_ROPE_THETA, MAX_LAYERS, llama_config, number, whole
from qll.load.rope import llama3_rope

if TYPE_CHECKING:
    from transformers import LlamaConfig

LLAMA_2_VOCABS = (-1, 32000)
LLAMA_3_VOCAB, LLAMA_3_BOS, LLAMA_3_EOS = 128256, 128000, 128001
# Llama 3.1 and 3.3, and the small tied models of Llama 3.2
SCALING, SCALING_TIED = 8.0, 32.0
REFUSED = ("vision_model", "vision_chunk_size", "quantization_args", "lora_args", "moe", "moe_args")
logger = logging.getLogger("qll.load")


def meta_config(
    params: Mapping[str, Any], where: Path, shapes: Mapping[str, tuple[int, ...]], tied: bool
) -> LlamaConfig:
    """The LlamaConfig of a params.json; raises ConfigError naming the key that is wrong.

    shapes: of the tensors by HF name, for the size of the vocabulary, which may be -1.

    >>> params = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024,
    ...     "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "vocab_size": 128256, "rope_theta": 5e5}
    >>> meta_config(params, Path("params.json"), {}, tied=False).intermediate_size
    14336
    """
    for key in REFUSED:
        if params.get(key) not in (None, -1, {}):
            raise ConfigError("variant of Llama is not implemented", where=where, found=key)
    heads, vocab = whole(params, "n_heads", where), _vocab_size(params, shapes)
    is_llama_3 = vocab == LLAMA_3_VOCAB
    theta = _theta(params, where)
    scaled = params.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise ConfigError("not true or false", where=where, found=f"use_scaled_rope {scaled}")
    return llama_config(
        where,
        hidden_size=whole(params, "dim", where),
        intermediate_size=_feed_forward(params, where),
        num_hidden_layers=whole(params, "n_layers", where, MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=params["n_kv_heads"] if params.get("n_kv_heads") else heads,
        vocab_size=vocab,
        rms_norm_eps=number(params, "norm_eps", where, 1.0),
        tie_word_embeddings=tied,
        max_position_embeddings=131072 if scaled else 8192 if is_llama_3 else 4096,
        bos_token_id=LLAMA_3_BOS if is_llama_3 else 1,
        eos_token_id=LLAMA_3_EOS if is_llama_3 else 2,
        rope_parameters=_scaled(params, theta, tied, where)
        if scaled
        else {"rope_type": "default", "rope_theta": theta},
    )


def _vocab_size(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Stated size, else (-1 in Llama 2) the rows of the head or the embedding table."""
    if (stated := params.get("vocab_size", -1)) != -1:
        return stated
    return shapes.get("lm_head.weight", shapes.get("model.embed_tokens.weight", (None,)))[0]


def _feed_forward(params: Mapping[str, Any], where: Path) -> int:
    """2/3 of 4 dim, times the multiplier, rounded up to a multiple (Meta's FeedForward)."""
    width = int(2 * 4 * whole(params, "dim", where) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(number(params, "ffn_dim_multiplier", where, 1e3) * width)
    multiple = whole({"multiple_of": 256, **params}, "multiple_of", where)
    return -(-width // multiple) * multiple


def _theta(params: Mapping[str, Any], where: Path) -> float:
    if params.get("rope_theta") is not None:
        return number(params, "rope_theta", where, 1e12)
    if params.get("vocab_size", -1) in LLAMA_2_VOCABS:
        logger.warning("%s has no rope_theta: using Llama 2's %g", where, LLAMA_2_ROPE_THETA)
        return LLAMA_2_ROPE_THETA
    raise ConfigError(
        "rotary embedding is not stated",
        where=where,
        expected="rope_theta",
        found="nothing",
        hint="add the value of the original model to params.json (Llama 3: 500000.0)",
    )


def _scaled(params: Mapping[str, Any], theta: float, tied: bool, where: Path) -> dict[str, Any]:
    """Llama 3.1's scaling; Meta's flag does not say the factor, transformers' configs do."""
    if "rope_scaling_factor" in params:
        return llama3_rope(theta, number(params, "rope_scaling_factor", where, 1e6))
    factor = SCALING_TIED if tied else SCALING
    logger.warning(
        "%s does not state the factor of use_scaled_rope: using %g (Llama %s); "
        "set rope_scaling_factor to choose",
        where,
        factor,
        "3.2, tied" if tied else "3.1",
    )
    return llama3_rope(theta, factor)
