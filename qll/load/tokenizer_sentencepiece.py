"""The `tokenizer.model` of Llama 1 and 2 and of TinyLlama: a SentencePiece protobuf.

We read the few fields that matter, so the sentencepiece library is not needed. Field numbers are
those of sentencepiece_model.proto: ModelProto 1 pieces (1 text, 2 score, 3 type), 2 trainer
(3 model_type, 40 unk_id, 41 bos_id, 42 eos_id), 3 normalizer (2 rules, 3 add_dummy_prefix).

>>> is_sentencepiece(b"\\n\\x0e\\n\\x05<unk>"), is_sentencepiece(b"IQ== 0\\n")
(True, False)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from transformers import PreTrainedTokenizerFast

from qll.errors import TokenizerError
from qll.load.tokenizer_build import Piece, sentencepiece_bpe, to_transformers

ROLES = ("", "normal", "unknown", "control", "user_defined", "unused", "byte")
MODEL_TYPE_BPE = 2


def is_sentencepiece(content: bytes) -> bool:
    """Whether `content` starts like the protobuf: field 1, its length, again a field 1."""
    return content[:1] == b"\n" and b"\n" in content[2:4]


def from_sentencepiece(content: bytes) -> PreTrainedTokenizerFast:
    """The Llama 1/2 tokenizer for the bytes of a SentencePiece model file.

    BOS is put before a text, as Meta's own code does. Raises TokenizerError for a malformed file,
    a model that is not of type BPE, or one with text normalisation (Llama has none).
    """
    pieces: list[Piece] = []
    trainer: dict[int, object] = {}
    normalizer: dict[int, object] = {}
    for field, value in _fields(content):
        if field == 1:
            pieces.append(_piece(dict(_fields(value)), len(pieces)))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    model_type = trainer.get(3, 1)
    if model_type != MODEL_TYPE_BPE:
        raise TokenizerError(
            "only SentencePiece models of type BPE can be read",
            expected=f"model_type {MODEL_TYPE_BPE}",
            found=model_type,
        )
    if normalizer.get(2):
        raise TokenizerError("the SentencePiece model has normalisation rules we cannot apply")
    tokenizer = sentencepiece_bpe(pieces, add_space_prefix=bool(normalizer.get(3, 1)))
    special = {
        "unk_token": _named(pieces, trainer.get(40, 0)),
        "bos_token": _named(pieces, trainer.get(41, 1)),
        "eos_token": _named(pieces, trainer.get(42, 2)),
    }
    return to_transformers(tokenizer, special=special, add_bos=True, add_eos=False)


def _piece(fields: dict[int, object], index: int) -> Piece:
    text, score, role = fields.get(1, b""), fields.get(2, 0.0), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, float):
        raise TokenizerError("a SentencePiece entry is malformed", where=f"token {index}")
    if role not in range(1, len(ROLES)):
        raise TokenizerError("a token of unknown type", where=f"token {index}", found=role)
    try:
        return Piece(text.decode("utf-8"), score, ROLES[role])
    except UnicodeDecodeError:
        raise TokenizerError("a token is not UTF-8", where=f"token {index}") from None


def _named(pieces: list[Piece], index: object) -> str | None:
    """The piece with this id; ids of 2^31 and more stand for -1, 'not there'."""
    return pieces[index].text if isinstance(index, int) and index < len(pieces) else None


def _fields(message: object) -> Iterator[tuple[int, bytes | int | float]]:
    """The fields of one protobuf message: (number, bytes | unsigned int | float).

    Wire types of the protobuf encoding: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
    """
    if not isinstance(message, bytes):
        raise TokenizerError("the SentencePiece file is malformed", expected="a message")
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(message, position)
        else:
            size = {1: 8, 5: 4}.get(wire)
            if wire == 2:
                size, position = _varint(message, position)
            if size is None or position + size > len(message):
                raise TokenizerError("the SentencePiece file is malformed", found=f"at {position}")
            value = message[position : position + size]
            if wire == 5:
                value = struct.unpack("<f", value)[0]
            position += size
        yield key >> 3, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise TokenizerError("the SentencePiece file is malformed", found=f"at byte {position}")
