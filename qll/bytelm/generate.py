"""A byte model writes: piece by piece, from the state after the prompt.

The state holds keys and values of a window, or a matrix of fixed size, so no byte is read twice and
the logits are those that `forward` gives on the same bytes. A prompt stands at the start of a
document, after the byte BOUNDARY; the byte BOUNDARY ends what is written. Attention sees the last
`context` bytes: writing goes on beyond them, but a prompt that they cannot hold is refused unless
`slide` allows it. Then a model with recurrent parts reads all of it, window after window; one of
attention alone reads its end.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qll.bytelm.config import VOCAB, ModelConfig
from qll.bytelm.evaluate import BOUNDARY
from qll.bytelm.model import ByteModel
from qll.bytelm.samplers import draw, shape_logits
from qll.bytelm.sampling import SamplingOptions
from qll.bytelm.utf8 import Utf8State, state_after
from qll.errors import NonFiniteError, UsageError


def generate(
    model: ByteModel,
    prompt: str,
    max_new_tokens: int = 256,
    options: SamplingOptions | None = None,
    *,
    seed: int = 0,
    slide: bool = False,
    language: int = 0,
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, each as soon as it is whole characters.

    `max_new_tokens` counts bytes; `language` is the number of the text's, 0 for none. Closing the
    iterator stops the model. Raises UsageError for a prompt longer than the model's window (unless
    `slide`) or not encodable, and NonFiniteError when the model gives NaN.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8)).eval()
    >>> text = "".join(generate(model, "ab", 20, SamplingOptions("creative")))
    >>> len(text.encode()) <= 20
    True
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = encode_prompt(prompt)
    for byte in generate_bytes(
        model, start, max_new_tokens, options, seed=seed, slide=slide, language=language
    ):
        if piece := decoder.decode(bytes([byte])):
            yield piece


def generate_bytes(
    model: ByteModel,
    prompt: bytes,
    max_new_tokens: int,
    options: SamplingOptions | None = None,
    *,
    seed: int = 0,
    slide: bool = False,
    language: int = 0,
) -> Iterator[int]:
    """The bytes of one continuation as they are chosen; see `generate`."""
    for chosen in _rounds(model, prompt, max_new_tokens, options, (seed,), slide, language):
        if chosen[0] is not None:
            yield chosen[0]


def candidates(
    model: ByteModel,
    prompt: bytes,
    max_new_tokens: int,
    options: SamplingOptions | None = None,
    *,
    seeds: Sequence[int],
    slide: bool = False,
    language: int = 0,
) -> list[bytes]:
    """One continuation per seed, made side by side; each is what its seed alone would give.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8)).eval()
    >>> [len(text) <= 5 for text in candidates(model, b"ab", 5, seeds=(0, 1))]
    [True, True]
    """
    texts = [bytearray() for _ in seeds]
    for chosen in _rounds(model, prompt, max_new_tokens, options, tuple(seeds), slide, language):
        for text, byte in zip(texts, chosen, strict=True):
            if byte is not None:
                text.append(byte)
    return [bytes(text) for text in texts]


def encode_prompt(prompt: str) -> bytes:
    """UTF-8 bytes of a prompt; raises UsageError for half of a character (a lone surrogate).

    >>> encode_prompt("\\u00e9")
    b'\\xc3\\xa9'
    """
    try:
        return prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError("not valid text", where="--prompt", found=error.reason) from None


@dataclass
class _Writer:
    """One continuation while it is written."""

    history: bytearray
    utf8: Utf8State
    generator: torch.Generator
    done: bool = False

    def choose(
        self, logits: Float[Tensor, "256"], options: SamplingOptions, remaining: int
    ) -> int | None:
        """The next byte, or None at the end of the document."""
        allowed = torch.tensor(self.utf8.allowed(remaining))
        logits = logits.masked_fill(~allowed, -math.inf)
        byte = draw(shape_logits(logits, self.history, options), self.generator)
        if byte == BOUNDARY:
            self.done = True
            return None
        self.utf8 = self.utf8.after(byte)
        self.history.append(byte)
        return byte


@torch.inference_mode()
def _rounds(
    model: ByteModel,
    prompt: bytes,
    max_new_tokens: int,
    options: SamplingOptions | None,
    seeds: tuple[int, ...],
    slide: bool,
    language: int,
) -> Iterator[list[int | None]]:
    """One byte per continuation and round; None where one has ended."""
    if max_new_tokens < 1:
        raise UsageError("out of range", where="max_new_tokens", expected="1 or more")
    options = (options or SamplingOptions()).resolved()
    device = model.embedding.weight.device
    pieces = _prompt_pieces(prompt, model.config, slide)
    utf8 = state_after(prompt)
    writers = [
        _Writer(bytearray(prompt), utf8, torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    state, tag = model.initial_state(len(seeds), device), VOCAB * language
    for piece in pieces:
        logits, state = model.step((piece + tag).to(device).expand(len(seeds), -1), state)
    for left in range(max_new_tokens, 0, -1):
        last = logits[:, -1].float().cpu()
        if not torch.isfinite(last).all():
            raise NonFiniteError("gives NaN or infinity", where="the model", hint="train it again")
        chosen = [
            None if writer.done else writer.choose(row, options, left)
            for writer, row in zip(writers, last, strict=True)
        ]
        yield chosen
        if left == 1 or all(writer.done for writer in writers):
            return
        # one that has ended reads on what is not used
        step = torch.tensor([[BOUNDARY if byte is None else byte] for byte in chosen])
        logits, state = model.step((step + tag).to(device), state)


def _prompt_pieces(prompt: bytes, config: ModelConfig, slide: bool) -> list[Int[Tensor, "1 seq"]]:
    """The boundary and the prompt, a window at a time; only the last window if nothing in the
    model remembers more."""
    if len(prompt) + 1 > config.context and not slide:
        raise UsageError(
            "longer than the model's window",
            where="--prompt",
            expected=f"at most {config.context - 1} bytes",
            found=len(prompt),
            hint="shorten it, or give --slide to read it window after window",
        )
    ids = torch.tensor([[BOUNDARY, *prompt]], dtype=torch.long)
    recurrent = set(config.mixer.pattern) != {"attention"} or config.memory.memory_tokens
    return list(ids.split(config.context, dim=1)) if recurrent else [ids[:, -config.context :]]
