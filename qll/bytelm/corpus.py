"""What a run is trained on and what it is measured on: named parts, each with a weight.

A corpus is local (files and folders) or named (data sets of the hub); either way it is a list of
parts that give their documents again as often as they are asked.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qll.bytelm.documents import Document, check_documents, find_documents, split_documents
from qll.bytelm.languages import require_every_language, tagged
from qll.bytelm.quality import quality_of
from qll.bytelm.registry import HUB, mix_of
from qll.errors import TextError, UsageError

LEAST_HELD_OUT = 64  # bytes


@dataclass(frozen=True)
class Part:
    """One text of a mixture."""

    name: str
    weight: float
    training: Callable[[], Iterable[Document]]
    held_out: Callable[[], Iterable[Document]]
    facts: dict[str, Any]
    """What is known of it before it is packed: sha256, bytes and documents, or the data set."""


def local_parts(
    paths: Sequence[Path],
    weights: Sequence[float] = (),
    pattern: str = "*",
    validation: Sequence[Path] = (),
    languages: Sequence[str] = (),
    min_quality: float = 0.0,
) -> list[Part]:
    """A part for each of `paths`, all of which are read once and checked.

    Weights are in proportion to the bytes unless given. With `validation` all of `paths` is trained
    on, and those texts are held out, by the first part. Documents are tagged with `languages`, and
    of what is trained on those below `min_quality` are left out. Raises TextError for what is
    missing, no text, empty, too short or of too low a quality, or when a language has no text.
    """
    if weights and len(weights) != len(paths):
        raise UsageError(
            "not one weight per text",
            where="--data_weights",
            expected=f"{len(paths)} positive numbers",
            found=" ".join(map(str, weights)),
        )
    parts, every = [], []
    for number, path in enumerate(paths):
        documents = tagged(find_documents([path], pattern), languages)
        every += documents
        facts = {"name": path.name, **check_documents(documents)}
        if validation:
            others = [] if number else tagged(find_documents(validation, pattern), languages)
            trained, held = documents, others
        else:
            trained, held = split_documents(documents)
        if min_quality > 0:
            kept = list(_kept(trained, min_quality))
            facts["documents_left_out"] = len(trained) - len(kept)
            _require_kept(kept, path.name, min_quality)
            trained = kept
        facts["trained_bytes"] = sum(map(len, trained))
        weight = weights[number] if weights else float(max(1, facts["trained_bytes"]))
        parts.append(Part(path.name, weight, _again(trained), _again(held), facts))
    require_every_language(every, languages)
    if validation:
        check_documents(parts[0].held_out())
    _require_held_out(parts, paths)
    return parts


def named_parts(
    name: str,
    max_samples_bytes: int | None = None,
    streaming: bool = False,
    min_quality: float = 0.0,
) -> list[Part]:
    """A part for each data set of `name`; nothing is read yet. Raises UsageError for a name we do
    not know. Documents below `min_quality` are not trained on.

    >>> [(part.name, part.weight) for part in named_parts("multi")]
    [('wikitext2', 0.4), ('tinystories', 0.3), ('openwebtext', 0.3)]
    """
    parts = []
    for key, weight in mix_of(name).items():
        text = HUB[key]
        identity = f"{text} {max_samples_bytes}"
        facts = {"name": key, "sha256": hashlib.sha256(identity.encode()).hexdigest()}
        parts.append(
            Part(
                key,
                weight,
                lambda text=text: _kept(text.training(streaming), min_quality),
                lambda text=text: text.held_out(streaming),
                {**facts, "data_set": text.path},
            )
        )
    return parts


def held_out_documents(parts: Sequence[Part], limit: int) -> Iterator[Document]:
    """The held-out documents of all parts, whole ones of about `limit` bytes together at most."""
    for part in parts:
        left = limit // len(parts)
        for document in part.held_out():
            if left <= 0:
                break
            left -= len(document)
            yield document


def endless(part: Part, first: int = 0) -> Iterator[Document]:
    """The training documents of a part from number `first` on, again and again."""
    skipped = first
    for _ in itertools.count():
        found = 0
        for document in part.training():
            found += 1
            if skipped:
                skipped -= 1
                continue
            yield document
        if not found:
            raise TextError("gives no document", where=part.name, hint="give another text")


def _kept(documents: Iterable[Document], min_quality: float) -> Iterator[Document]:
    """The documents of at least this quality; 0 looks at none."""
    for document in documents:
        if min_quality <= 0 or quality_of(document) >= min_quality:
            yield document


def _require_kept(documents: Sequence[Document], name: str, min_quality: float) -> None:
    if not documents:
        raise TextError(
            "no document is of this quality",
            where=name,
            expected=f"at least {min_quality:g}",
            hint="give a lower --min_quality; qll/bytelm/quality.py says what is asked for",
        )


def _again(documents: list[Document]) -> Callable[[], Iterable[Document]]:
    return lambda: documents


def _require_held_out(parts: Sequence[Part], paths: Sequence[Path]) -> None:
    size = sum(len(document) for part in parts for document in part.held_out())
    if size < LEAST_HELD_OUT:
        raise TextError(
            "too short to hold a part out for validation",
            where=", ".join(map(str, paths)),
            expected=f"at least {LEAST_HELD_OUT} bytes held out, a tenth of the text",
            found=f"{size} bytes",
            hint="give a longer text",
        )
