"""Text from a runtime, piece by piece as it is made."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qll.model.generate import encode_prompt, require_room, require_settings
from qll.runtime.llama import Runtime
from qll.runtime.record import decoder
from qll.runtime.sample import Sampling
from qll.runtime.speculate import LENGTH, Acceptance, speculate


def tokens(
    runtime: Runtime,
    ids: Int[Tensor, "batch seq"],
    new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
) -> Iterator[Int[Tensor, "batch one"]]:
    """The next `new_tokens` ids of every text, one step after another.

    Raises UsageError when they do not fit the model's context.
    """
    cache = runtime.cache(ids.shape[0], ids.shape[1] + new_tokens)
    draw, step = sampling.generator(runtime.device), decoder(runtime, cache)
    for made in range(new_tokens):
        with torch.inference_mode():
            logits = step(ids) if made else runtime(ids, cache)
            ids = sampling.choose(logits[:, -1], draw)[:, None]
        yield ids


def stream_text(
    runtime: Runtime,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    ends: Collection[int] = (),
    draft: Runtime | None = None,
    draft_tokens: int = LENGTH,
    counts: Acceptance | None = None,
) -> Iterator[str]:
    """Pieces of text that continue `prompt`, as `qll.model.generate` gives them.

    ends: ids that end the text (`end_tokens`). draft: a cheaper runtime of the same vocabulary that
    proposes `draft_tokens` at a time; counts: is told what became of its proposals. Errors as
    `qll.model.generate`.
    """
    require_settings(max_new_tokens, temperature, top_p)
    ids = encode_prompt(tokenizer, prompt, chat).to(runtime.device)
    longest = min(part.longest for part in (runtime, draft) if part is not None)
    require_room(longest, ids.shape[1], max_new_tokens)
    sampling = Sampling(temperature, top_p, seed)
    if draft is None:
        made = tokens(runtime, ids, max_new_tokens, sampling)
    else:
        settings = {"length": draft_tokens, "sampling": sampling, "counts": counts}
        made = speculate(runtime, draft, ids, max_new_tokens, **settings)
    return decode_pieces(_until(made, ends), tokenizer)


def end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids at which the model's text ends."""
    found = model.generation_config.eos_token_id
    found = model.config.eos_token_id if found is None else found
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (found,)


def decode_pieces(made: Iterator[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Text of ids as soon as its characters are whole; joined, it is the text of all ids."""
    pending: list[int] = []
    shown = 0
    for token in made:
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            continue  # the bytes of a character are still to come
        if piece := text[shown:]:
            yield piece
        shown = len(text)
        if text.endswith("\n"):  # nothing before a line's end changes what follows
            pending, shown = [], 0
    if rest := tokenizer.decode(pending, skip_special_tokens=True)[shown:]:
        yield rest


def _until(made: Iterator[Tensor], ends: Collection[int]) -> Iterator[int]:
    """The ids of the first text, up to the one that ends it."""
    for piece in made:
        for token in piece[0].tolist():
            if token in ends:
                return
            yield token
