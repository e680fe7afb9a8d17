"""What a model is, from its config.json: checked key by key, then a transformers LlamaConfig.

Only what we compute exactly is accepted. The rotary embedding must be stated, because a wrong
default is a model that looks almost right: as `rope_parameters` (transformers 5) or as
`rope_theta` / `rope_scaling` (transformers 4). Llama 2's config.json states `rope_scaling: null`
alone, which means transformers 4's default base of 10000.

>>> check_rope({"rope_type": "yarn", "rope_theta": 1e4}, Path("config.json"))
Traceback (most recent call last):
    ...
qll.errors.ConfigError: config.json: rotary embedding of a type that is not implemented \
(expected rope_type default or linear or llama3, found yarn)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qll.errors import ConfigError, QLLError

if TYPE_CHECKING:
    from transformers import LlamaConfig

LLAMA_2_ROPE_THETA = 10000.0
SUPPORTED_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
# Far above any real model, far below what would exhaust memory while names are listed
MAX_SIZE, MAX_LAYERS, MAX_VOCAB = 1 << 20, 2048, 1 << 24
logger = logging.getLogger("qll.load")


def hf_config(values: Mapping[str, Any], where: Path) -> LlamaConfig:
    """The LlamaConfig of a config.json; raises ConfigError naming the key that is wrong.

    >>> config = hf_config({"model_type": "llama", "vocab_size": 32, "hidden_size": 16,
    ...     "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    ...     "rms_norm_eps": 1e-5, "rope_theta": 500000.0}, Path("config.json"))
    >>> config.rope_parameters["rope_theta"], config.num_key_value_heads
    (500000.0, 4)
    """
    if (found := values.get("model_type")) != "llama":
        raise ConfigError(
            "not a Llama model", where=where, expected="model_type llama", found=found
        )
    _refuse_variants(values, where)
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    needed = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    facts = {key: values.get(key) for key in needed}
    facts |= {key: values[key] for key in optional if values.get(key) is not None}
    facts |= {key: values[key] for key in tokens if key in values}
    return llama_config(where, rope_parameters=_hf_rope(values, where), **facts)


def llama_config(where: Path, **facts: Any) -> LlamaConfig:
    """A LlamaConfig from named facts, every number checked; raises ConfigError."""
    heads = _check_sizes(facts, where)
    facts.setdefault("num_key_value_heads", heads)
    if heads % facts["num_key_value_heads"]:
        raise ConfigError(
            "query heads are not a multiple of key/value heads",
            where=where,
            expected=f"a multiple of {facts['num_key_value_heads']}",
            found=heads,
        )
    if "head_dim" not in facts:
        if facts["hidden_size"] % heads:
            raise ConfigError(
                "hidden_size is not a multiple of num_attention_heads and head_dim is not given",
                where=where,
                found=f"{facts['hidden_size']} / {heads}",
            )
        facts["head_dim"] = facts["hidden_size"] // heads
    if facts["head_dim"] % 2:
        raise ConfigError(
            "rotary embedding needs an even head_dim", where=where, found=facts["head_dim"]
        )
    facts["rms_norm_eps"] = number(facts, "rms_norm_eps", where, high=1.0)
    facts["rope_parameters"] = check_rope(facts["rope_parameters"], where)
    return _construct(facts, where)


def check_rope(rope: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Rotary parameters reduced to the keys their type needs; raises ConfigError."""
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in SUPPORTED_ROPE:
        raise ConfigError(
            "rotary embedding of a type that is not implemented",
            where=where,
            expected=f"rope_type {' or '.join(SUPPORTED_ROPE)}",
            found=kind,
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial rotary embedding is not implemented", where=where)
    checked = {key: number(rope, key, where, high=1e12) for key in SUPPORTED_ROPE[kind]}
    if "original_max_position_embeddings" in checked:
        checked["original_max_position_embeddings"] = int(
            checked["original_max_position_embeddings"]
        )
        if checked["high_freq_factor"] <= checked["low_freq_factor"]:
            raise ConfigError("high_freq_factor must be above low_freq_factor", where=where)
    return {
        "rope_type": kind,
        "rope_theta": number(rope, "rope_theta", where, high=1e12),
        **checked,
    }


def number(values: Mapping[str, Any], key: str, where: Path, high: float) -> float:
    """The positive finite number `values[key]`; raises ConfigError."""
    value = values.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= high:
        raise ConfigError(
            "number missing or out of range",
            where=where,
            expected=f"{key} above 0 and at most {high:g}",
            found=value,
        )
    return float(value)


def whole(values: Mapping[str, Any], key: str, where: Path, high: int = MAX_SIZE) -> int:
    """The integer `values[key]` from 1 to `high`; raises ConfigError."""
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
        raise ConfigError(
            "number missing or out of range",
            where=where,
            expected=f"{key}: an integer from 1 to {high}",
            found=value,
        )
    return value


def _refuse_variants(values: Mapping[str, Any], where: Path) -> None:
    """Raise for what changes the computation and is not implemented."""
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key, False) is not False:
            raise ConfigError("biases are not implemented", where=where, found=f"{key} true")
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise ConfigError(
            "activation is not implemented", where=where, expected="silu", found=activation
        )
    if values.get("quantization_config") is not None:
        raise ConfigError(
            "quantised Hugging Face folders are not read",
            where=where,
            found="quantization_config",
            hint="use the unquantised folder, or a GGUF file",
        )


def _hf_rope(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Rotary parameters from either generation of config.json."""
    stated = [key for key in ("rope_parameters", "rope_theta", "rope_scaling") if key in values]
    if not stated or (stated == ["rope_parameters"] and not values["rope_parameters"]):
        raise ConfigError(
            "rotary embedding is not stated",
            where=where,
            expected="rope_parameters (transformers 5) or rope_theta (transformers 4)",
            found="neither",
            hint="add the value of the original model to config.json",
        )
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError("rotary parameters are not an object", where=where, found=rope)
    rope = dict(rope)
    # before the name rope_type there was type
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = values.get("rope_theta")
    if rope["rope_theta"] is None and "rope_scaling" in values:
        logger.warning(
            "%s has no rope_theta: using %g, as transformers 4 did", where, LLAMA_2_ROPE_THETA
        )
        rope["rope_theta"] = LLAMA_2_ROPE_THETA
    return rope


def _check_sizes(facts: Mapping[str, Any], where: Path) -> int:
    """Check every size that the shapes are computed from; returns the number of query heads."""
    for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
        whole(facts, key, where)
    whole(facts, "num_hidden_layers", where, MAX_LAYERS)
    whole(facts, "vocab_size", where, MAX_VOCAB)
    for key in ("num_key_value_heads", "head_dim"):
        if key in facts:
            whole(facts, key, where)
    if "max_position_embeddings" in facts:
        whole(facts, "max_position_embeddings", where, 1 << 31)
    if not isinstance(tied := facts.get("tie_word_embeddings", False), bool):
        raise ConfigError("not true or false", where=where, found=f"tie_word_embeddings {tied}")
    return facts["num_attention_heads"]


def _construct(facts: Mapping[str, Any], where: Path) -> LlamaConfig:
    from transformers import LlamaConfig

    try:
        return LlamaConfig(architectures=["LlamaForCausalLM"], **facts)
    except QLLError:
        raise
    except Exception as error:  # transformers validates with classes of its own
        raise ConfigError(
            "config is refused by transformers", where=where, found=str(error)[:300]
        ) from None
