"""Any Llama tokenizer file -> one transformers tokenizer.

A checkpoint carries its tokenizer in one of three ways: `tokenizer.json` (Hugging Face),
`tokenizer.model` (Meta: a tiktoken rank file for Llama 3, SentencePiece before), or in the
metadata of a GGUF file. Each becomes the same class with the same ids as the original, so the
rest of the project never asks where a tokenizer came from. Nothing here uses the network, runs
code of the folder, or renders its chat template.

>>> from qll.load.source import open_source
>>> tokenizer = open_tokenizer(open_source(None))
>>> tokenizer("In 2024")["input_ids"]  # SmolLM2 splits digits: In, space, 2, 0, 2, 4
[788, 216, 34, 32, 34, 36]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qll.errors import MissingFileError, TokenizerError
from qll.load.config import MAX_VOCAB
from qll.load.files import MAX_JSON_BYTES, read_object, reject_pointer
from qll.load.gguf_header import read_header
from qll.load.source import Source
from qll.load.tokenizer_gguf import from_gguf_metadata
from qll.load.tokenizer_meta import from_ranks
from qll.load.tokenizer_sentencepiece import from_sentencepiece, is_sentencepiece

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
# A Hugging Face folder may hold Meta's files in original/; a Source may point at either of them
PLACES = (
    "tokenizer.json",
    "tokenizer.model",
    "original/tokenizer.model",
    "../tokenizer.json",
)


def open_tokenizer(source: Source | str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint, given as a Source, a folder, or the tokenizer file itself.

    Its vocabulary may be smaller than the model's (tables are padded) but not larger: the number
    of tokens is compared with the config of the Source, or with config.json or params.json of the
    folder. Raises MissingFileError when there is no tokenizer, TokenizerError when it is broken
    or belongs to another model.

    >>> open_tokenizer("no/such/folder")
    Traceback (most recent call last):
    qll.errors.MissingFileError: no/such/folder: there is no such file or folder; check the path
    """
    path = Path(source) if isinstance(source, str | Path) else source.path
    file = _find(path)
    try:
        tokenizer = _read(file)
    except TokenizerError as error:
        raise _in_file(file, error) from None
    if isinstance(source, str | Path):
        _require_fit(tokenizer, _declared_size(file.parent), file)
    else:
        _require_fit(tokenizer, source.config.vocab_size, file)
        _name_bos_and_eos(tokenizer, source)
    # set afterwards: given to the constructor, it would make transformers ask the Hub about it
    tokenizer.name_or_path = str(path)
    return tokenizer


def _find(path: Path) -> Path:
    """The tokenizer file that belongs to `path`."""
    if path.is_file():
        if path.suffix == ".model" or path.name == "tokenizer.json" or _is_gguf(path):
            return path
        path = path.parent
    elif not path.is_dir():
        raise MissingFileError("there is no such file or folder", where=path, hint="check the path")
    for place in PLACES:
        # the folder above is looked at only from original/, where Hugging Face puts Meta's files
        if place.startswith("..") and path.name != "original":
            continue
        if (path / place).is_file():
            reject_pointer(path / place)
            return path / place
    raise MissingFileError(
        "no tokenizer beside the weights",
        where=path,
        expected="tokenizer.json or tokenizer.model",
        hint="copy it there from the place where the weights come from",
    )


def _is_gguf(file: Path) -> bool:
    with open(file, "rb") as content:
        return content.read(4) == b"GGUF" or file.suffix == ".gguf"


def _read(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in `file`, whichever of the formats it has."""
    if _is_gguf(file):
        return from_gguf_metadata(read_header(file).metadata)
    _require_possible_size(file)
    if file.suffix == ".json":
        return _from_hf(file)
    content = file.read_bytes()
    return from_sentencepiece(content) if is_sentencepiece(content) else from_ranks(content)


def _require_possible_size(file: Path) -> None:
    size = file.stat().st_size
    if not 0 < size <= MAX_JSON_BYTES:
        raise TokenizerError(
            "the tokenizer file has an impossible size",
            expected=f"1 to {MAX_JSON_BYTES} bytes",
            found=size,
        )


def _in_file(file: Path, error: TokenizerError) -> TokenizerError:
    """`error` with the file in front of the place in it, unless it names a file already."""
    if isinstance(error.where, Path):
        return error
    hint = "download the file again, or use the Hugging Face folder of the same model"
    where = file if error.where is None else f"{file}, {error.where}"
    facts = {"expected": error.expected, "found": error.found, "hint": error.hint or hint}
    return TokenizerError(error.what, where=where, **facts)


def _from_hf(file: Path) -> PreTrainedTokenizerFast:
    """tokenizer.json as it stands, with what the two files beside it say about special tokens.

    AutoTokenizer is not used: for a class named in tokenizer_config.json it builds a pre-tokenizer
    of its own instead of the one in the file.
    """
    backend = _read_backend(file)
    facts = _beside(file, "special_tokens_map.json") | _beside(file, "tokenizer_config.json")
    special = {name: text for name in SPECIAL_NAMES if (text := _token_text(facts.get(name)))}
    more = facts.get("extra_special_tokens") or facts.get("additional_special_tokens")
    listed = more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
    flags = ("add_bos_token", "add_eos_token")
    try:
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            chat_template=_chat_template(file, facts),
            extra_special_tokens=[text for text in map(_token_text, listed) if text],
            **{flag: facts[flag] for flag in flags if isinstance(facts.get(flag), bool)},
            **special,
        )
    except Exception as error:  # from three libraries, each with classes of its own
        raise TokenizerError(
            "tokenizer.json and the special tokens beside it do not fit together",
            found=str(error)[:200],
        ) from None


def _read_backend(file: Path) -> Tokenizer:
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(
            "not a tokenizer.json that the tokenizers library can read",
            found=str(error)[:200],
        ) from None
    # the library copies a tokenizer by walking through all ids up to the highest
    if (highest := max(backend.get_vocab().values(), default=0)) > MAX_VOCAB:
        raise TokenizerError("an impossible token id", found=highest)
    # some files ask for texts to be cut or filled up to a length; ours are not
    backend.no_truncation()
    backend.no_padding()
    return backend


def _beside(file: Path, name: str) -> dict[str, Any]:
    neighbour = file.parent / name
    return read_object(neighbour, TokenizerError) if neighbour.is_file() else {}


def _token_text(value: object) -> str | None:
    """A special token is written as a string or as {"content": string, ...}."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _chat_template(file: Path, facts: Mapping[str, Any]) -> str | None:
    """The template as text; transformers renders it, when asked to, in a Jinja sandbox."""
    template = file.parent / "chat_template.jinja"
    if template.is_file() and template.stat().st_size <= MAX_JSON_BYTES:
        return template.read_text(encoding="utf-8", errors="replace")
    stated = facts.get("chat_template")
    return stated if isinstance(stated, str) else None


def _declared_size(folder: Path) -> int | None:
    """Vocabulary size that the model files in `folder` declare, if any does."""
    for name in ("config.json", "params.json"):
        if (folder / name).is_file():
            size = read_object(folder / name).get("vocab_size")
            return size if isinstance(size, int) and size > 0 else None
    return None


def _require_fit(tokenizer: PreTrainedTokenizerFast, vocab_size: int | None, file: Path) -> None:
    """Raise unless every id of the tokenizer has a row in the embedding table."""
    needed = max(tokenizer.get_vocab().values(), default=-1) + 1
    if needed == 0:
        raise TokenizerError("the tokenizer has no tokens", where=file)
    if vocab_size is not None and needed > vocab_size:
        raise TokenizerError(
            "the tokenizer has more tokens than the model has embeddings",
            where=file,
            expected=f"at most {vocab_size}",
            found=needed,
            hint="tokenizer and weights belong to different models",
        )


def _name_bos_and_eos(tokenizer: PreTrainedTokenizerFast, source: Source) -> None:
    """Fill in BOS and EOS from the model's config where the tokenizer files name none."""
    for name in ("bos_token", "eos_token"):
        index = getattr(source.config, f"{name}_id")
        index = index[0] if isinstance(index, list) and index else index
        if getattr(tokenizer, name) is None and isinstance(index, int):
            token = tokenizer.convert_ids_to_tokens(index)
            if token is not None:
                setattr(tokenizer, name, token)
