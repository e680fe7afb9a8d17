"""Do states of a line and of its translation lie close? Retrieval across two languages.

A line is the mean of the residual stream over its bytes, less the mean over the lines of its
language, which says only what language it is. A line is found when its translation is nearest to it
of all lines of the other language, by the cosine; a tie is not. Beside it stand chance, 1 / lines,
and the same with histograms of bytes, which find names and numbers that both languages write alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qll.bytelm.coherence import streams
from qll.bytelm.config import VOCAB
from qll.bytelm.evaluate import BOUNDARY
from qll.bytelm.languages import language_of, with_language
from qll.bytelm.model import ByteModel
from qll.errors import TextError


@dataclass(frozen=True)
class Retrieval:
    """Shares of lines that are found, both ways together."""

    lines: int
    chance: float
    byte_histogram: float
    blocks: tuple[float, ...]
    """By the stream after each block."""


def parallel_lines(
    first: Path, second: Path, languages: Sequence[str] = ()
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The lines of two files as ids, in the languages that their names say; empty pairs left out.

    Raises TextError for files that are not UTF-8, not of equally many lines, or of less than two.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> paths = folder / "a.en.txt", folder / "a.de.txt"
    >>> _ = [path.write_text("1\\n\\n2\\n") for path in paths]
    >>> [ids.tolist() for ids in parallel_lines(*paths, ("en", "de"))[1]]
    [[561], [562]]
    """
    texts = [_lines(path) for path in (first, second)]
    if len(texts[0]) != len(texts[1]):
        raise TextError(
            "not a translation line by line",
            where=f"{first}, {second}",
            expected="as many lines in one as in the other",
            found=f"{len(texts[0])} and {len(texts[1])}",
        )
    pairs = [pair for pair in zip(*texts, strict=True) if all(line.strip() for line in pair)]
    if len(pairs) < 2:
        raise TextError("too few lines", where=first, expected="2 or more", found=len(pairs))
    one, two = (
        [with_language(np.frombuffer(line, dtype=np.uint8), number) for line in lines]
        for lines, number in zip(
            zip(*pairs, strict=True),
            (language_of(path, languages) for path in (first, second)),
            strict=True,
        )
    )
    return one, two


def parallel_retrieval(
    model: ByteModel, first: Sequence[np.ndarray], second: Sequence[np.ndarray]
) -> Retrieval:
    """How often a line of one text finds that of the other; line i belongs to line i.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=2, context=8)).eval()
    >>> lines = [np.array(line) for line in ([97, 98], [99], [100, 101])]
    >>> parallel_retrieval(model, lines, lines)
    Retrieval(lines=3, chance=0.3333333333333333, byte_histogram=1.0, blocks=(1.0, 1.0))
    """
    pooled = [torch.stack([_pooled(model, line) for line in lines]) for lines in (first, second)]
    histograms = [torch.stack([_histogram(line) for line in lines]) for lines in (first, second)]
    blocks = [found(*states) for states in zip(*(item.unbind(1) for item in pooled), strict=True)]
    return Retrieval(len(first), 1 / len(first), found(*histograms), tuple(blocks))


def found(first: Float[Tensor, "lines width"], second: Float[Tensor, "lines width"]) -> float:
    """Share of rows of either that are nearest to the same row of the other.

    >>> found(torch.eye(4), torch.eye(4)), found(torch.eye(4), torch.eye(4).roll(1, 0))
    (1.0, 0.0)
    >>> found(torch.ones(4, 2), torch.ones(4, 2))  # all alike
    0.0
    """
    units = [
        torch.nn.functional.normalize(rows.double() - rows.double().mean(0), dim=1)
        for rows in (first, second)
    ]
    cosines = units[0] @ units[1].T
    own = cosines.diagonal()
    others = cosines - torch.diag(torch.full_like(own, torch.inf))
    right = [own > others.amax(dim) for dim in (0, 1)]
    return float(torch.stack(right).double().mean())


@torch.inference_mode()
def _pooled(model: ByteModel, line: np.ndarray) -> Float[Tensor, "blocks d_model"]:
    """The mean over a line's bytes of the stream after every block."""
    boundary = BOUNDARY + VOCAB * (int(line[0]) // VOCAB)
    ids = torch.tensor([[boundary, *line.tolist()]], device=model.embedding.weight.device)
    return torch.stack([stream[0, 1:].mean(0).cpu() for stream in streams(model, ids)[1:]])


def _histogram(line: np.ndarray) -> Float[Tensor, "256"]:
    return torch.from_numpy(np.bincount(line % VOCAB, minlength=VOCAB)).double()


def _lines(path: Path) -> list[bytes]:
    """The lines of a file; raises TextError when it is no text."""
    try:
        text = path.read_bytes()
        text.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError("cannot be read as UTF-8 text", where=path, found=error) from None
    return text.splitlines()
