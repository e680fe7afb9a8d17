"""Autoencoders at several places, trained side by side on one stream of activations.

After every few buffers all that matters is written to a checkpoint; a run that was killed goes on
from there and ends with the same bytes (on the same machine with as many threads). What was logged
after the checkpoint is forgotten, since it will be logged again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from qll import store
from qll.saetrain.learner import Learner
from qll.saetrain.stream import Buffer

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"
# Tokens of text between two checkpoints: so many, or a sixteenth of a shorter run
CHECKPOINT_TOKENS = 262144
REVIVE_UNTIL = 0.8  # share of the run; a feature started anew later could not learn any more
START_TOKENS = 8192  # a centre and a scale of these are as good as of millions


class Trainer:
    """The learners of one run, its folder, and how far it is."""

    def __init__(self, learners: Sequence[Learner], out: Path, tokens: int, seed: int = 0) -> None:
        self.learners, self.out, self.tokens, self.seed = list(learners), out, tokens, seed
        self.buffers_done, self.read, self.saved = 0, 0, 0
        self.seconds = 0.0

    def run(self, buffers: Iterable[Buffer]) -> None:
        """Train on every buffer, log each, and save now and then.

        Raises NonFiniteError when a loss is not a number.
        """
        bar = tqdm(
            total=self.tokens,
            initial=self.read,
            desc="sae train",
            unit="token",
            unit_scale=True,
            file=sys.stderr,
            disable=None,
        )
        store.make_folder(self.out)
        with bar:
            started, before = time.monotonic(), self.seconds
            for buffer in buffers:
                tokens = buffer.read - self.read
                self.learn(buffer)
                self.seconds = before + time.monotonic() - started
                self._log(bar, tokens)
                if self.read - self.saved >= min(CHECKPOINT_TOKENS, self.tokens // 16):
                    self.save()
        if self.saved < self.read:
            self.save()

    def learn(self, buffer: Buffer) -> None:
        """Use up one buffer: shuffled anew for each pass, in steps of about the batch size."""
        generator = torch.Generator()
        generator.manual_seed(self.seed * 1_000_003 + buffer.number)
        if not self.read:
            self._start(buffer, generator)
        options = self.learners[0].options
        batches = -(-len(buffer) // options.batch_tokens)
        shuffles = [torch.randperm(len(buffer), generator=generator) for _ in range(options.passes)]
        parts = [places for order in shuffles for places in order.tensor_split(batches)]
        share = (buffer.read - self.read) / self.tokens
        for number, places in enumerate(parts):
            done = self.read / self.tokens + share * number / len(parts)
            for learner in self.learners:
                learner.step(*_activations(learner, buffer, places), done)
        if buffer.read <= REVIVE_UNTIL * self.tokens:
            for learner in self.learners:
                learner.revive(generator)
        self.buffers_done, self.read = buffer.number + 1, buffer.read

    def _start(self, buffer: Buffer, generator: torch.Generator) -> None:
        few = torch.randperm(len(buffer), generator=generator)[:START_TOKENS]
        for learner in self.learners:
            learner.start(*_activations(learner, buffer, few))

    def save(self) -> None:
        """Write a checkpoint atomically."""
        tensors = {
            f"{learner.shape.hookpoint}:{name}": value
            for learner in self.learners
            for name, value in learner.tensors().items()
        }
        facts = {"buffers": self.buffers_done, "read": self.read, "seconds": self.seconds}
        metadata = {key: str(value) for key, value in facts.items()}
        store.write_tensors(self.out / CHECKPOINT, tensors, metadata)
        self.saved = self.read

    def restore(self) -> None:
        """Continue from the checkpoint in the folder, if there is one."""
        path, lines = self.out / CHECKPOINT, store.read_lines(self.out / METRICS)
        if path.is_file():
            self._read(path)
        kept = [line for line in lines if line["read"] <= self.read]
        if len(kept) < len(lines):
            store.remove(self.out / METRICS)
            for line in kept:
                store.append_line(self.out / METRICS, line)

    def _read(self, path: Path) -> None:
        device = str(self.learners[0].silent.device)
        with safe_open(path, framework="pt", device=device) as file:
            facts = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.buffers_done, self.read = int(facts["buffers"]), int(facts["read"])
        self.saved, self.seconds = self.read, float(facts["seconds"])
        for learner in self.learners:
            learner.restore(_below(tensors, f"{learner.shape.hookpoint}:"))

    def _log(self, bar: tqdm, tokens: int) -> None:
        """One line per place in metrics.jsonl, and a word in the progress bar."""
        words = []
        for learner in self.learners:
            found: dict[str, Any] = {
                "hookpoint": learner.shape.hookpoint,
                "read": self.read,
                **learner.report(),
                "tokens_per_second": self.read / max(self.seconds, 1e-9),
            }
            store.append_line(self.out / METRICS, found)
            words.append(
                f"{learner.shape.hookpoint} FVU {found['fvu']:.3f} L0 {found['l0']:.0f} "
                f"dead {found['dead_share']:.1%}"
            )
        bar.update(tokens)
        bar.set_postfix_str(", ".join(words))


def _activations(learner: Learner, buffer: Buffer, places: Tensor) -> tuple[Tensor, Tensor]:
    """What `learner` reads and what it has to write on the tokens `places`."""
    reads, writes = learner.shape.reads, learner.shape.hookpoint
    y = buffer.values[writes][places.to(buffer.values[writes].device)]
    return (y if reads == writes else buffer.values[reads][places.to(y.device)]), y


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
