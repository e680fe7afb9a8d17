"""The vocabulary inside a GGUF file.

The metadata holds the tokens with their types, then merges (`gpt2`: byte-level BPE) or scores
(`llama`: SentencePiece). It holds no split pattern, only the name of one in `tokenizer.ggml.pre`;
the patterns are those llama.cpp applies under that name (src/llama-vocab.cpp).

transformers builds a tokenizer from the same metadata but ignores `pre = smollm`, so it does not
split digits; tests/unit/load/test_tokenizer.py shows a text on which that changes the ids.

>>> sorted(PRE_TOKENIZERS)[:3]
['codeshell', 'command-r', 'dbrx']
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from qll.errors import TokenizerError
from qll.load.tokenizer_build import (
    Piece,
    byte_level_bpe,
    sentencepiece_bpe,
    to_transformers,
)
from qll.load.tokenizer_meta import LLAMA3_SPLIT

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")
ROLES = ("", "normal", "unknown", "control", "user_defined", "unused", "byte")

SPECIAL_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
}

log = logging.getLogger("qll.load")


@dataclass(frozen=True)
class PreTokenizer:
    """How the texts of a byte-level vocabulary are cut before merging."""

    splits: tuple[str, ...]
    """Regular expressions, each applied to what the one before left."""
    ignore_merges: bool = False
    """Whether a part that is a vocabulary entry is taken whole."""
    add_bos: bool = False
    """Whether BOS is put before a text when the file does not say."""


LLAMA3 = PreTokenizer((LLAMA3_SPLIT,), ignore_merges=True, add_bos=True)
GPT2 = PreTokenizer((GPT2_SPLIT,))
SENTENCEPIECE = PreTokenizer((), add_bos=True)
DIGITS_GPT2 = PreTokenizer((r"\p{N}", GPT2_SPLIT))
PRE_TOKENIZERS = {
    "default": PreTokenizer(DEFAULT_SPLITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1"), LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenizer((LLAMA3_SPLIT,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), DIGITS_GPT2),
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2"), GPT2),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), PreTokenizer((QWEN2_SPLIT,))),
    "tekken": PreTokenizer((TEKKEN_SPLIT,), ignore_merges=True, add_bos=True),
}


def from_gguf_metadata(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that the `tokenizer.*` keys of a GGUF file describe.

    Special tokens, BOS and EOS follow the file, or llama.cpp's defaults where it is silent. Raises
    TokenizerError for a vocabulary type or pre-tokenizer we do not know, or inconsistent lists.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(
            "the GGUF file has a vocabulary of a type we cannot read",
            where="tokenizer.ggml.model",
            expected="gpt2 or llama",
            found=kind,
            hint="use the Hugging Face folder of the same model, which has a tokenizer.json",
        )
    pieces = _pieces(metadata)
    if kind == "gpt2":
        pre, default_ids = _pre_tokenizer(metadata), {}
        space = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
        merges, whole = _merges(metadata), pre.ignore_merges
        tokenizer = byte_level_bpe(
            pieces, merges, pre.splits, ignore_merges=whole, add_space_prefix=space
        )
    else:
        pre, default_ids = SENTENCEPIECE, {"bos": 1, "eos": 2, "unknown": 0}
        space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        tokenizer = sentencepiece_bpe(pieces, add_space_prefix=space)
    special = {
        name: _special(metadata, f"tokenizer.ggml.{key}_token_id", default_ids.get(key), pieces)
        for key, name in SPECIAL_NAMES.items()
    }
    template = metadata.get("tokenizer.chat_template")
    return to_transformers(
        tokenizer,
        special=special,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", pre.add_bos)),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=template if isinstance(template, str) else None,
    )


def _pieces(metadata: Mapping[str, Any]) -> list[Piece]:
    tokens = _list(metadata, "tokenizer.ggml.tokens", str)
    count = len(tokens)
    types = _list(metadata, "tokenizer.ggml.token_type", int, default=[1] * count)
    scores = _list(metadata, "tokenizer.ggml.scores", float, default=[0.0] * count)
    for key, values in (("token_type", types), ("scores", scores)):
        if len(values) != count:
            raise TokenizerError(
                "the vocabulary lists differ in length",
                where=f"tokenizer.ggml.{key}",
                expected=count,
                found=len(values),
            )
    bad = next((i for i, role in enumerate(types) if not 0 < role < len(ROLES)), None)
    if bad is not None:
        raise TokenizerError("a token of unknown type", where=f"token {bad}", found=types[bad])
    rows = zip(tokens, scores, types, strict=True)
    return [Piece(token, score, ROLES[role]) for token, score, role in rows]


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        log.warning("the GGUF file has no tokenizer.ggml.pre: text is split the default way")
        name = "default"
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise TokenizerError(
            "the GGUF file names a pre-tokenizer we do not know",
            where="tokenizer.ggml.pre",
            expected=f"one of {', '.join(sorted(PRE_TOKENIZERS))}",
            found=name,
            hint="use the Hugging Face folder of the same model, which has a tokenizer.json",
        )
    return PRE_TOKENIZERS[name]


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for index, merge in enumerate(_list(metadata, "tokenizer.ggml.merges", str)):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise TokenizerError(
                "a merge is not two tokens",
                where=f"merge {index}",
                expected="left, a space, right",
                found=merge[:40],
            )
        merges.append((left, right))
    return merges


def _special(
    metadata: Mapping[str, Any], key: str, default: int | None, pieces: list[Piece]
) -> str | None:
    index = metadata.get(key, default)
    if index is None or (key not in metadata and index >= len(pieces)):
        return None
    if not isinstance(index, int) or not 0 <= index < len(pieces):
        raise TokenizerError(
            "a special token is not in the vocabulary",
            where=key,
            expected=f"an id below {len(pieces)}",
            found=index,
        )
    return pieces[index].text


def _list(metadata: Mapping[str, Any], key: str, kind: type, default: list | None = None) -> list:
    values = metadata.get(key, default)
    if values is None or isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise TokenizerError("the GGUF file has no vocabulary list", where=key)
    values = list(values)
    if not all(isinstance(value, kind) for value in values):
        raise TokenizerError(
            "a vocabulary list holds values of another type",
            where=key,
            expected=kind.__name__,
        )
    return values
