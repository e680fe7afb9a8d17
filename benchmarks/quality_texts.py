"""The texts of the quality table: what is calibrated on, per seed, and what is scored.

Every seed has its own calibration files in the cache, cut where the tokens of the seed before
end, so that the peers and `main.py --calib_text` read the same tokens.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qll import store
from qll.calibrate import MomentStore, collect
from qll.evaluate import score
from qll.load import Source, Text, builtin_texts, encode, open_source, open_tokenizer, read_text
from qll.model import load_dense


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
        return [read_text(self.arguments.eval), topics, read_text(self.arguments.third)]

    @cached_property
    def calibration(self) -> list[Text]:
        """The texts that are calibrated on, whole; a word may name one that Python ships."""
        builtin = builtin_texts()
        return [
            builtin[word] if word in builtin else read_text(word) for word in self.arguments.calib
        ]

    def calibration_files(self, seed: int) -> list[Path]:
        """The calibration texts from this seed's first token on, as files."""
        folder = self.cache / "texts"
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for text in self.calibration:
            path = folder / f"{text.name}.seed{seed}.{self.arguments.calib_tokens}.txt"
            if not path.exists():
                store.write_text(path, self._tail(text, seed * self.arguments.calib_tokens))
            paths.append(path)
        return paths

    def windows(self, seed: int) -> Int[Tensor, "windows context"]:
        """This seed's calibration tokens, one text after the other."""
        return torch.cat([self._encoded(read_text(path)) for path in self.calibration_files(seed)])

    def seed_folder(self, seed: int) -> Path:
        """Where cells of this seed keep what they share."""
        tokens, context = self.arguments.calib_tokens, self.arguments.context
        return self.cache / f"{self.source.name}.{tokens}x{context}.seed{seed}"

    def moments(self, seed: int) -> MomentStore:
        """This seed's second moments with gradients."""
        folder = self.seed_folder(seed) / "moments"
        return collect(self.source, self.windows(seed), folder, gradients=True)

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

    def _encoded(self, text: Text) -> Tensor:
        tokens, context = self.arguments.calib_tokens, self.arguments.context
        return encode(text, self.tokenizer, tokens, context)[0]

    def _scored(self, text: Text) -> tuple[Tensor, int]:
        tokens, context = self.arguments.eval_tokens, self.arguments.context
        return encode(text, self.tokenizer, tokens, context)

    def _tail(self, text: Text, tokens: int) -> str:
        """`text` without its first `tokens` tokens."""
        offsets = self.tokenizer(text.text, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) < tokens + self.arguments.calib_tokens:
            raise SystemExit(f"{text.name} has {len(offsets)} tokens, too few for this seed")
        return text.text[offsets[tokens][0] :]
