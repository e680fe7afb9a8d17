"""`qll lm generate` and `qll lm compare`: folders in, text out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from qll.bytelm.compare import PROMPTS, continuations, read_prompts, table
from qll.bytelm.generate import candidates, encode_prompt, generate
from qll.bytelm.languages import number_of
from qll.bytelm.rerank import rerank
from qll.bytelm.saved import load_lm
from qll.bytelm.verb_settings import LmCompareConfig, LmGenerateConfig


def write(config: LmGenerateConfig, device: torch.device) -> Iterator[str]:
    """Pieces of the continuation; with several candidates, the best of them in one piece."""
    model = load_lm(config.folder, device)
    language = number_of(config.language, model.config.stream.languages)
    if config.candidates == 1:
        yield from generate(
            model,
            config.prompt,
            config.max_new_tokens,
            config.sampling,
            seed=config.seed,
            slide=config.slide,
            language=language,
        )
        return
    prompt = encode_prompt(config.prompt)
    seeds = range(config.seed, config.seed + config.candidates)
    texts = candidates(
        model,
        prompt,
        config.max_new_tokens,
        config.sampling,
        seeds=seeds,
        slide=config.slide,
        language=language,
    )
    yield rerank(model, prompt, texts, language=language)[0].text.decode()


def compare(config: LmCompareConfig, device: torch.device) -> str:
    """The tables of `lm compare`, the texts under them when asked for, or JSON."""
    prompts = list(PROMPTS) if config.prompts is None else read_prompts(config.prompts)
    names = [str(folder) for folder in config.models]
    rows = []
    for folder in config.models:
        model = load_lm(folder, device)
        options = config.sampling
        rows.append(continuations(model, prompts, config.max_new_tokens, options, config.seed))
    if config.json:
        found = {name: list(map(asdict, row)) for name, row in zip(names, rows, strict=True)}
        return json.dumps({"prompts": prompts, "models": found}, indent=1, ensure_ascii=False)
    parts = [table(list(map(_label, config.models)), prompts, rows)]
    if config.texts:
        for number, prompt in enumerate(prompts):
            parts.append(f"> {prompt}")
            parts += [f"[{name}]{row[number].text}" for name, row in zip(names, rows, strict=True)]
    return "\n\n".join(parts)


def _label(folder: Path) -> str:
    """The name of a run, also when its model/ was given."""
    return folder.parent.name if folder.name == "model" else folder.name
