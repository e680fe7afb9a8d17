"""Texts to calibrate and to evaluate on, and their cut into windows of tokens.

A conversion needs two texts that share nothing: one to measure activations on, one to judge the
result by. When the user names none, they come from files that every Python installation carries:
the language reference behind `help()` (`pydoc_data.topics`), split topic by topic into two halves,
and the source code of the standard library as a third text from another domain.

The reference quotes itself: whole sections stand under two topics, so a split by topic alone would
leak a quarter of one half into the other. Every paragraph of the evaluation half that shares eight
consecutive words with the calibration half is therefore dropped.

>>> texts = builtin_texts()
>>> sorted(texts)
['python_source', 'python_topics_calibration', 'python_topics_evaluation']
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from qll.errors import MissingFileError, TextError

LEAK_WORDS = 8
SOURCE_MODULES = (
    "argparse ast configparser dataclasses difflib enum functools inspect json.decoder logging "
    "pathlib pickle random shutil statistics string tarfile tempfile textwrap threading typing"
)

log = logging.getLogger("qll.load")


@dataclass(frozen=True)
class Text:
    """A named text; reports quote the name and the hash, never the text.

    >>> Text("greeting", "hello").sha256[:8]
    '2cf24dba'
    """

    name: str
    """What reports call it."""
    text: str
    """The characters themselves."""

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the text encoded as UTF-8."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


def builtin_texts() -> dict[str, Text]:
    """The three texts every Python ships: two disjoint halves of its reference, and source code.

    Returns a dict from name to `Text`. The contents depend on the Python version, so reports
    print the hash. Raises TextError when this Python was installed without those files.

    >>> builtin_texts()["python_topics_calibration"].text[:24]
    'The "assert" statement\\n*'
    """
    calibration, evaluation = _topic_halves()
    texts = {
        "python_topics_calibration": calibration,
        "python_topics_evaluation": evaluation,
        "python_source": _standard_library_source(),
    }
    return {name: Text(name, text) for name, text in texts.items()}


def read_text(path: str | Path) -> Text:
    """The UTF-8 file at `path` as a `Text` named after the file.

    Line ends are kept as they are. Raises MissingFileError when there is no such file and
    TextError when it is not UTF-8 (with the offset of the first bad byte) or is empty.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "verse.txt").write_text("so much depends", encoding="utf-8")
    ...     read_text(Path(folder, "verse.txt")).name
    'verse'
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError("there is no such text file", where=path, hint="check the path")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            "the text is not UTF-8",
            where=path,
            found=f"byte 0x{error.object[error.start]:02x} at offset {error.start}",
            hint="convert the file, for example with iconv -t UTF-8",
        ) from None
    if not text.strip():
        raise TextError("the text file holds no text", where=path)
    return Text(path.stem, text)


def encode(
    text: Text, tokenizer: PreTrainedTokenizerFast, tokens: int | None, context: int
) -> tuple[Int[Tensor, "windows context"], int]:
    """Cuts `text` into windows of `context` token ids that do not overlap.

    Returns `(windows, bytes_scored)`: int64 ids `[windows, context]` of the first `tokens` tokens
    (all of the text for None; a last, partly filled window is left out), and the number of UTF-8
    bytes of text that the scored tokens stand for. The first token of a window has nothing before
    it and is not scored, so its bytes do not count: total bits / `bytes_scored` is bits per byte
    whatever the tokenizer. A BOS token, where the tokenizer adds one, stands once at the start.

    Raises TextError when the text, or `tokens`, does not fill one window; a text shorter than
    `tokens` is used whole, with a warning.

    >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    >>> backend = Tokenizer(models.BPE({c: i for i, c in enumerate("abcdef")}, []))
    >>> backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> backend.decoder = decoders.ByteLevel()
    >>> letters = PreTrainedTokenizerFast(tokenizer_object=backend)
    >>> windows, bytes_scored = encode(Text("letters", "abcdefab"), letters, None, 4)
    >>> windows.tolist(), bytes_scored
    ([[0, 1, 2, 3], [4, 5, 0, 1]], 6)
    """
    if context < 2:
        raise TextError("a window needs at least two tokens", expected=">= 2", found=context)
    ids = _first_ids(text.text, tokenizer, tokens)
    windows = len(ids) // context
    if windows == 0:
        raise TextError(
            "too few tokens for one window",
            where=text.name,
            expected=f"at least {context}",
            found=len(ids),
            hint="give a longer text, ask for more tokens, or use a shorter context",
        )
    if tokens is not None and len(ids) < tokens:
        log.warning("%s: has %d tokens, fewer than the %d asked for", text.name, len(ids), tokens)
    kept = torch.tensor(ids[: windows * context], dtype=torch.int64).reshape(windows, context)
    sizes = _token_bytes(tokenizer, sorted(set(kept[:, 1:].flatten().tolist())))
    return kept, sum(sizes[token] for token in kept[:, 1:].flatten().tolist())


def _first_ids(text: str, tokenizer: PreTrainedTokenizerFast, tokens: int | None) -> list[int]:
    """The first `tokens` ids; encodes a prefix where it is sure to hold enough of them."""
    if tokens is None:
        return tokenizer(text)["input_ids"]
    prefix = text[: 16 * tokens + 4096]
    ids = tokenizer(prefix)["input_ids"]
    # the last tokens of a cut text may differ from those of the whole one, hence the margin
    if len(prefix) < len(text) and len(ids) < tokens + 256:
        ids = tokenizer(text)["input_ids"]
    return ids[:tokens]


def _token_bytes(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> dict[int, int]:
    """UTF-8 bytes of text each id stands for; BOS, EOS and padding stand for none."""
    silent = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    added = tokenizer.added_tokens_decoder
    # the decoder's own description tells the two vocabularies apart: in a byte-level one each
    # character of a token spells one byte; in a SentencePiece one a metaspace is one space and
    # <0xNN> one byte
    byte_level = b"ByteLevel" in tokenizer.backend_tokenizer.decoder.__getstate__()
    sizes = {}
    for token, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if token in added:
            sizes[token] = 0 if token in silent else len(added[token].content.encode("utf-8"))
        elif byte_level:
            sizes[token] = len(piece)
        elif piece.startswith("<0x") and piece.endswith(">") and len(piece) == 6:
            sizes[token] = 1
        else:
            sizes[token] = len(piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode("utf-8"))
    return sizes


@functools.cache
def _topic_halves() -> tuple[str, str]:
    """Every second topic of the sorted reference; the second half without quotes of the first."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise _no_builtin_text("pydoc_data.topics") from None
    names = sorted(topics)
    calibration = "\n\n".join(topics[name].strip() for name in names[0::2])
    seen = _word_runs(calibration)
    fresh = (_unquoted(topics[name], seen) for name in names[1::2])
    return calibration, "\n\n".join(topic for topic in fresh if topic)


def _word_runs(text: str) -> set[str]:
    """Every run of LEAK_WORDS consecutive words, whatever the line breaks between them."""
    words = text.split()
    return {" ".join(words[i : i + LEAK_WORDS]) for i in range(len(words) - LEAK_WORDS + 1)}


def _unquoted(topic: str, seen: set[str]) -> str:
    """`topic` without the paragraphs that take part in a run of words in `seen`."""
    paragraphs = [part.strip("\n") for part in topic.split("\n\n") if part.strip()]
    words = [(word, owner) for owner, part in enumerate(paragraphs) for word in part.split()]
    quoted: set[int] = set()
    for i in range(len(words) - LEAK_WORDS + 1):
        run = words[i : i + LEAK_WORDS]
        if " ".join(word for word, _ in run) in seen:
            quoted.update(owner for _, owner in run)
    return "\n\n".join(part for owner, part in enumerate(paragraphs) if owner not in quoted)


@functools.cache
def _standard_library_source() -> str:
    """Source files of the standard library, one after the other, in a fixed order."""
    sources = []
    for name in SOURCE_MODULES.split():
        spec = importlib.util.find_spec(name)
        source = spec.loader.get_source(name) if spec is not None and spec.loader else None
        if source is None:
            raise _no_builtin_text(name)
        sources.append(source)
    return "\n".join(sources)


def _no_builtin_text(module: str) -> TextError:
    return TextError(
        "this Python was installed without the text we take as default",
        where=module,
        hint="name texts of your own with --calib_text and --eval_text",
    )
