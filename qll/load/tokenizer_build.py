"""The two kinds of vocabulary a Llama has, built as `tokenizers` objects.

Byte-level BPE (Llama 3, SmolLM2): text is split by a regular expression, each UTF-8 byte becomes
one letter of a 256-letter alphabet, and letters are merged by rank. SentencePiece BPE (Llama 1
and 2, TinyLlama): spaces become a visible letter, characters outside the vocabulary become byte
tokens, and neighbours are merged by the score of the piece they make.

Source: the GPT-2 byte alphabet; Kudo and Richardson 2018 (SentencePiece); the behaviour of
llama.cpp, whose answers on both kinds are committed in tests/golden/tokenizers.json.

>>> pieces = [Piece("<unk>", 0.0, "unknown"), Piece("a", -1.0), Piece("b", -2.0), Piece("ab", -0.5)]
>>> sentencepiece_bpe(pieces, add_space_prefix=False).encode("abb").ids
[3, 2]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

from qll.errors import TokenizerError

# the longest token of Llama 3 has 128 characters; splitting one in all ways is quadratic in it
MAX_PIECE = 512
METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"
Role = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]


class Piece(NamedTuple):
    """One entry of a vocabulary; its id is its place in the list."""

    text: str
    """How the file spells it (byte-level letters, or with a metaspace)."""
    score: float = 0.0
    """SentencePiece: pieces with a higher score are merged first."""
    role: Role = "normal"
    """What the entry is for; only control and user_defined are found whole in a text."""


def byte_level_bpe(
    pieces: Sequence[Piece],
    merges: Sequence[tuple[str, str]],
    splits: Sequence[str],
    *,
    ignore_merges: bool,
    add_space_prefix: bool = False,
) -> Tokenizer:
    """A byte-level BPE tokenizer without special tokens around a text.

    `splits` are regular expressions applied one after the other, each cutting the parts the one
    before left. `ignore_merges`: a part that is itself a vocabulary entry is taken whole. Raises
    TokenizerError when a piece stands twice or a merge names a piece that is not there.

    >>> letters = [Piece(letter) for letter in "abc"] + [Piece("ab")]
    >>> byte_level_bpe(letters, [("a", "b")], [r"\\w+"], ignore_merges=False).encode("abc").ids
    [3, 2]
    """
    try:
        model = models.BPE(_numbered(pieces), list(merges), ignore_merges=ignore_merges)
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError("the merges do not fit the vocabulary", found=error) from None
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=add_space_prefix, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    tokenizer.decoder = decoders.ByteLevel()
    _add_whole_tokens(tokenizer, pieces)
    return tokenizer


def sentencepiece_bpe(pieces: Sequence[Piece], *, add_space_prefix: bool) -> Tokenizer:
    """A SentencePiece-BPE tokenizer (scores, byte fallback) without special tokens around a text.

    Raises TokenizerError when a piece stands twice or a score is not a number.
    """
    vocab = _numbered(pieces)
    for index, piece in enumerate(pieces):
        if piece.score != piece.score:
            raise TokenizerError("a piece's score is not a number", where=f"token {index}")
    unknown = next((piece.text for piece in pieces if piece.role == "unknown"), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab, _merges_by_score(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    spaces = normalizers.Replace(" ", METASPACE)
    prefix = [normalizers.Prepend(METASPACE)] if add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_whole_tokens(tokenizer, pieces)
    return tokenizer


def to_transformers(
    tokenizer: Tokenizer,
    *,
    special: Mapping[str, str | None],
    add_bos: bool,
    add_eos: bool,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """The transformers view of `tokenizer`; `special` maps bos_token, eos_token, ... to pieces.

    BOS and EOS are put around a text as `add_bos` and `add_eos` say. The chat template is carried
    along as text, never rendered here.

    >>> plain = byte_level_bpe([Piece("a"), Piece("<s>", role="control")], [], [],
    ...                        ignore_merges=False)
    >>> wrapped = to_transformers(plain, special={"bos_token": "<s>"}, add_bos=True, add_eos=False)
    >>> wrapped("aa")["input_ids"]
    [1, 0, 0]
    """
    named = {key: token for key, token in special.items() if token is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=add_bos,
        add_eos_token=add_eos,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
        **named,
    )


def _numbered(pieces: Sequence[Piece]) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for index, piece in enumerate(pieces):
        if len(piece.text) > MAX_PIECE:
            raise TokenizerError(
                "a token of impossible length",
                where=f"token {index}",
                expected=f"at most {MAX_PIECE} characters",
                found=len(piece.text),
            )
        first = vocab.setdefault(piece.text, index)
        if first != index:
            raise TokenizerError(
                "a token stands twice in the vocabulary",
                where=f"token {index}",
                found=f"{piece.text!r}, which is also token {first}",
            )
    return vocab


def _merges_by_score(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, best score first, as ranks for the BPE model.

    SentencePiece has no merge list: it joins the neighbours that make the best-scoring piece.
    """
    # Control tokens never come out of text, so they are no result and no half of a merge.
    usable = {
        piece.text: (-piece.score, index)
        for index, piece in enumerate(pieces)
        if piece.role in ("normal", "user_defined", "unused") and piece.text
    }
    ranked = []
    for text, rank in usable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in usable and right in usable:
                ranked.append((rank, len(left), left, right))
    ranked.sort()
    return [(left, right) for _, _, left, right in ranked]


def _add_whole_tokens(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> None:
    """Tokens that are found whole in a text instead of being spelled out."""
    # one call per role keeps the ids: every one of them is already in the vocabulary
    control = [piece.text for piece in pieces if piece.role in ("control", "unknown")]
    plain = [piece.text for piece in pieces if piece.role == "user_defined"]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in control if text])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain if text])
