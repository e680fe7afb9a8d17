"""Text from the command line: by our own runtime, or by transformers where hooks are needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qll import store
from qll.config import GenerateConfig
from qll.load import open_source, open_tokenizer
from qll.pipeline import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate_text(config: GenerateConfig) -> Iterator[str]:
    """Pieces of a continuation by a converted folder or by a dense checkpoint."""
    device = choose_device(config.device)
    model, tokenizer = open_model(config.model, device)
    settings = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "seed": config.seed,
        "chat": config.chat,
    }
    if config.runtime == "transformers" or config.edits():
        yield from through_transformers(config, model, tokenizer, settings)
    else:
        yield from through_runtime(config, model, tokenizer, settings)


def open_model(
    path: Path | None, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, Any]:
    """The model in a converted folder (dtype None: as stored) or a dense checkpoint (float32), and
    its tokenizer."""
    from qll.model import load, load_dense

    if path is not None and (path / store.MANIFEST_NAME).is_file():
        return load(path, device=device, dtype=dtype), open_tokenizer(path)
    source = open_source(path)
    return load_dense(source, dtype or torch.float32, device), open_tokenizer(source)


def through_runtime(
    config: GenerateConfig, model: PreTrainedModel, tokenizer: Any, settings: dict[str, Any]
) -> Iterator[str]:
    """The text of our runtime; with --draft, what became of the proposals goes to stderr."""
    from qll.runtime import Acceptance, Runtime, end_tokens, stream_text

    ends, counts, draft = end_tokens(model), Acceptance(), None
    runtime = Runtime.from_model(model, consume=True)
    if config.draft is not None:
        other, _ = open_model(config.draft, runtime.device, model.dtype)
        draft = Runtime.from_model(other, consume=True)
    yield from stream_text(
        runtime, tokenizer, config.prompt, **settings, ends=ends, draft=draft, counts=counts
    )
    if draft is not None:
        print(
            f"\ndraft: {counts.accepted} of {counts.proposed} proposals accepted, "
            f"{counts.rounds} passes of the model for {counts.tokens} tokens",
            file=sys.stderr,
        )


def through_transformers(
    config: GenerateConfig, model: PreTrainedModel, tokenizer: Any, settings: dict[str, Any]
) -> Iterator[str]:
    """The text of transformers' generate, with the features of --steer added."""
    from contextlib import nullcontext

    from qll.model import generate

    steering = nullcontext()
    if config.edits():
        from qll.lens.steer import steered

        if config.runtime != "transformers":
            print("--steer hooks into the model: transformers runs it", file=sys.stderr)
        steering = steered(model, config.sae_dir, config.edits())
    with steering:
        yield from generate(model, tokenizer, config.prompt, **settings)
