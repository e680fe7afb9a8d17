"""The `tokenizer.model` of Llama 3: a tiktoken rank file.

A line per token: its bytes in base64 and its rank. The file holds no special tokens and no split
pattern; both are constants of Meta's code (llama-models, llama3/tokenizer.py), restated here. We
read the file ourselves because tiktoken's reader caches it under its path and so returns a stale
vocabulary for a changed file.

>>> parse_ranks(b"IQ== 0")  # doctest: +IGNORE_EXCEPTION_DETAIL
Traceback (most recent call last):
qll.errors.TokenizerError: some bytes have no token of their own (expected 256, found 1)
"""

from __future__ import annotations

import base64
import binascii

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from qll.errors import TokenizerError
from qll.load.tokenizer_build import MAX_PIECE, Piece, byte_level_bpe, to_transformers

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED_SPECIALS = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
    "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image"
)
SPECIALS = 256


def from_ranks(content: bytes) -> PreTrainedTokenizerFast:
    """The Llama 3 tokenizer for the bytes of a rank file.

    The 256 special tokens bear the names of Llama 3.1 and later; Llama 3.0 called some of them
    reserved, under the same ids. BOS is put before a text, as Meta's own code does. Raises
    TokenizerError with the offending line.
    """
    tokens = parse_ranks(content)
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in tokens}
    pieces = [Piece(text) for text in spelled.values()]
    pieces += [Piece(text, role="control") for text in special_tokens()]
    tokenizer = byte_level_bpe(pieces, _merges_by_rank(spelled), [LLAMA3_SPLIT], ignore_merges=True)
    special = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|finetune_right_pad_id|>",
    }
    return to_transformers(tokenizer, special=special, add_bos=True, add_eos=False)


def special_tokens() -> list[str]:
    """The 256 special tokens of Llama 3 in the order of their ids.

    >>> len(set(special_tokens())), special_tokens()[9]
    (256, '<|eot_id|>')
    """
    named = NAMED_SPECIALS.split()
    reserved = [f"reserved_special_token_{2 + i}" for i in range(SPECIALS - len(named))]
    return [f"<|{name}|>" for name in named + reserved]


def parse_ranks(content: bytes) -> list[bytes]:
    """The tokens in the order of their ranks, after every check a rank file allows."""
    by_rank: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        token, rank = _parse_rank_line(line, where=f"line {number}")
        if rank in by_rank:
            raise TokenizerError("a rank stands twice", where=f"line {number}", found=rank)
        by_rank[rank] = token
    missing = next((rank for rank in range(len(by_rank)) if rank not in by_rank), None)
    if missing is not None:
        raise TokenizerError(
            "the ranks have a gap",
            expected=f"every rank from 0 to {len(by_rank) - 1}",
            found=f"no rank {missing}",
        )
    tokens = [by_rank[rank] for rank in range(len(by_rank))]
    alone = {token for token in tokens if len(token) == 1}
    if len(alone) != 256:
        raise TokenizerError(
            "some bytes have no token of their own", expected=256, found=len(alone)
        )
    if len(set(tokens)) != len(tokens):
        raise TokenizerError("a token stands twice in the rank file")
    return tokens


def _parse_rank_line(line: bytes, where: str) -> tuple[bytes, int]:
    shown = line[:40]
    parts = line.split()
    if len(parts) != 2 or not parts[1].isdigit() or len(parts[1]) > 9:
        raise TokenizerError(
            "not a line of a tiktoken rank file",
            where=where,
            expected="base64, a space, a rank",
            found=shown,
        )
    try:
        token = base64.b64decode(parts[0], validate=True)
    except binascii.Error:
        raise TokenizerError("not base64", where=where, found=shown) from None
    if not 0 < len(token) <= MAX_PIECE:
        raise TokenizerError(
            "a token of impossible length",
            where=where,
            expected=f"1 to {MAX_PIECE} bytes",
            found=len(token),
        )
    return token, int(parts[1])


def _merges_by_rank(spelled: dict[bytes, str]) -> list[tuple[str, str]]:
    """Every way to make a token of two tokens, in the order of ranks.

    tiktoken has no merge list: it joins the neighbours whose union has the lowest rank.
    """
    rank = {token: index for index, token in enumerate(spelled)}
    merges = []
    for token in spelled:
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in cuts if left in rank and right in rank]
        known.sort(key=lambda pair: (rank[pair[0]], rank[pair[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in known]
    return merges


def _byte_letters() -> list[str]:
    """The GPT-2 alphabet: printable Latin-1 bytes spell themselves, the others 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    assert set(letters.values()) == set(ByteLevel.alphabet())
    return [letters[byte] for byte in range(256)]
