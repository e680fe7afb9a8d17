"""The texts of the quality table: what is calibrated on, per seed, and what is scored."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qll import store
from qll.calibrate import Labels, MomentStore, collect
from qll.evaluate import score
from qll.load import (
    Source,
    Text,
    builtin_texts,
    encode,
    mixed_windows,
    open_source,
    open_tokenizer,
    read_text,
)
from qll.model import load_dense
from qll.runtexts import is_part_of


class Texts:
    """The dense model with its tokens, moments and scores, each computed once and kept."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.source: Source = open_source(arguments.llama_dir)
        self.tokenizer: PreTrainedTokenizerFast = open_tokenizer(self.source)
        self.cache: Path = arguments.cache

    @cached_property
    def evaluation(self) -> list[Text]:
        """The three texts that are scored."""
        topics = builtin_texts()["python_topics_evaluation"]
        texts = [read_text(self.arguments.eval), topics, read_text(self.arguments.third)]
        if seen := [text.name for text in texts if is_part_of(text, self.calibration)]:
            raise SystemExit(f"calibrated on, so not to be scored: {', '.join(seen)}")
        return texts

    @cached_property
    def calibration(self) -> list[Text]:
        """The texts that are calibrated on, whole; a word may name one that Python ships."""
        builtin = builtin_texts()
        return [
            builtin[word] if word in builtin else read_text(word) for word in self.arguments.calib
        ]

    def calibration_files(self) -> list[Path]:
        """The calibration texts as files, for main.py; one that Python ships is written out."""
        paths = []
        for word, text in zip(self.arguments.calib, self.calibration, strict=True):
            path = Path(word)
            if word in builtin_texts():
                path = self.cache / "texts" / f"{word}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                store.write_text(path, text.text)
            paths.append(path)
        return paths

    def windows(self, seed: int) -> Int[Tensor, "windows context"]:
        """This seed's calibration tokens, the same number of each text: those that main.py draws
        with `--calib_tokens` and `--seed`."""
        texts, arguments = self.calibration, self.arguments
        tokens = arguments.calib_tokens * len(texts)
        weights = (1.0,) * len(texts)
        return mixed_windows(texts, weights, self.tokenizer, tokens, arguments.context, seed)

    def seed_folder(self, seed: int) -> Path:
        """Where cells of this seed keep what they share."""
        tokens, context = self.arguments.calib_tokens, self.arguments.context
        return self.cache / f"{self.source.name}.{tokens}x{context}.seed{seed}"

    def moments(self, seed: int, labels: Labels = "text") -> MomentStore:
        """This seed's second moments with gradients; peers take those of the text's own labels."""
        folder = self.seed_folder(seed) / f"moments.{labels}"
        windows = self.windows(seed)
        return collect(self.source, windows, folder, gradients=True, labels=labels)

    def scores(self, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """Perplexity of `model` beside the dense model's, per evaluation text."""
        dense = self.dense_scores()
        found = {}
        for text in self.evaluation:
            windows, size = self._scored(text)
            result = score(model, windows, size)
            found[text.name] = {
                "ppl_dense": dense[text.name]["ppl"],
                "ppl": result.ppl,
                "ratio": result.ppl / dense[text.name]["ppl"],
                "bits_per_byte": result.bits_per_byte,
                "tokens": result.tokens,
                "sha256": text.sha256,
            }
        return found

    def dense_scores(self) -> dict[str, dict[str, float]]:
        """The dense model's scores, from the cache where they are there."""
        path = self.cache / "dense.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        tokens, context = self.arguments.eval_tokens, self.arguments.context
        found, model = {}, None
        for text in self.evaluation:
            key = f"{self.source.fingerprint}/{text.sha256}/{tokens}x{context}"
            if key not in known:
                model = model or load_dense(self.source)
                known[key] = asdict(score(model, *self._scored(text)))
                store.write_json(path, known)
            found[text.name] = known[key]
        return found

    def facts(self) -> dict[str, Any]:
        """What every row of a result file depends on."""
        arguments = self.arguments
        return {
            "model": {"name": self.source.name, "fingerprint": self.source.fingerprint},
            "calib_tokens_per_text": arguments.calib_tokens,
            "eval_tokens": arguments.eval_tokens,
            "context": arguments.context,
            "calib": {text.name: text.sha256 for text in self.calibration},
            "eval": {text.name: text.sha256 for text in self.evaluation},
        }

    def _scored(self, text: Text) -> tuple[Tensor, int]:
        tokens, context = self.arguments.eval_tokens, self.arguments.context
        return encode(text, self.tokenizer, tokens, context)
