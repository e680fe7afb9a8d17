"""Text from a model, piece by piece as it is made.

transformers' own `generate` runs in a thread and hands over pieces of text. A chat template is a
program that came with the weights: it is rendered only on request, and only by transformers, which
uses jinja2's ImmutableSandboxedEnvironment.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator

import torch
from jaxtyping import Int
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from qll.errors import UnsafeCheckpointError, UsageError

OMP_PAUSE_SOFT = 1  # of omp.h

# A template is a program by a stranger; besides its own errors it can fail as programs do
TEMPLATE_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
) -> Iterator[str]:
    """Pieces of text that continue `prompt`; joined, they are the whole continuation.

    temperature 0 is greedy; above, tokens are drawn (from the `top_p` most probable mass) with
    `seed`. `chat` wraps the prompt in the tokenizer's chat template. Closing the iterator stops
    the model. Raises UsageError for arguments out of range or a prompt that does not fit,
    UnsafeCheckpointError for a template that tries to leave its sandbox.
    """
    require_settings(max_new_tokens, temperature, top_p)
    ids = encode_prompt(tokenizer, prompt, chat).to(model.device)
    require_room(model.config.max_position_embeddings, ids.shape[1], max_new_tokens)
    settings = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "pad_token_id": tokenizer.pad_token_id or 0,
    }
    if temperature > 0:
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    return _stream(model, tokenizer, settings, seed)


def _stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict, seed: int
) -> Iterator[str]:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failures = threading.Event(), []

    def work() -> None:
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model.generate(
                    **settings,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
                )
        # handed over to the reader, who raises it
        except Exception as error:
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    end_idle_threads()
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def end_idle_threads() -> None:
    """Let OpenMP end the caller's threads, which come back with its next computation.

    The thread that generates has OpenMP threads too. Both together are more than there are cores,
    and libgomp then puts threads to sleep at every barrier: half as many tokens a second.
    (OpenMP 5.0, section 3.2.44.)
    """
    runtime = None if sys.platform == "win32" else ctypes.CDLL(None)
    if hasattr(runtime, "omp_pause_resource_all"):
        runtime.omp_pause_resource_all(OMP_PAUSE_SOFT)


class _Stop(StoppingCriteria):
    """Ends generation when the reader has gone."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: object) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool
) -> Int[Tensor, "one tokens"]:
    """The ids of a prompt, as it is or in the chat template; UsageError for an empty one."""
    text = _render(tokenizer, prompt) if chat else prompt
    # a rendered template already holds its special tokens
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if ids.numel() == 0:
        raise UsageError("the prompt is empty", hint="give some text to continue")
    return ids.long()


def _render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    if tokenizer.chat_template is None:
        raise UsageError("the tokenizer has no chat template", hint="generate without chat")
    messages = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except SecurityError as error:
        raise UnsafeCheckpointError(
            "the chat template tries to run code",
            where="tokenizer",
            found=str(error),
            hint="do not use this tokenizer's template",
        ) from None
    except TEMPLATE_FAILURES as error:
        raise UnsafeCheckpointError(
            "the chat template cannot be rendered",
            where="tokenizer",
            found=str(error),
            hint="generate without chat",
        ) from None


def require_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise UsageError for a setting out of its range.

    >>> require_settings(1, 0.0, 1.0)
    """
    ranges = {
        "max_new_tokens": (max_new_tokens, max_new_tokens >= 1, "1 or more"),
        "temperature": (temperature, temperature >= 0, "0 (greedy) or more"),
        "top_p": (top_p, 0 < top_p <= 1, "above 0, at most 1"),
    }
    for name, (value, fits, expected) in ranges.items():
        if not fits:
            raise UsageError("out of range", where=name, expected=expected, found=value)


def require_room(limit: int, prompt: int, new: int) -> None:
    """Raise UsageError unless `prompt` and `new` tokens fit a context of `limit`."""
    if prompt + new > limit:
        raise UsageError(
            "prompt and continuation do not fit the context of the model",
            expected=f"at most {limit} tokens",
            found=f"{prompt} + {new}",
            hint="shorten the prompt or lower max_new_tokens",
        )
