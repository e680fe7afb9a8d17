"""The loop: steps, lines in metrics.jsonl, validations, stages, checkpoints, and when to stop.

A killed run goes on from its last checkpoint; when its length is given in steps it ends with the
same bytes as one that was never killed (on the same machine, with as many threads). What was logged
after the checkpoint is forgotten, since it will be logged again.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from qll import store
from qll.bytelm.checkpoint import read_checkpoint, write_checkpoint
from qll.bytelm.config import ModelConfig
from qll.bytelm.dataset import BatchLoader
from qll.bytelm.evaluate import bits_per_byte
from qll.bytelm.growth import grow
from qll.bytelm.leak import require_causal, require_plausible
from qll.bytelm.learner import Learner
from qll.bytelm.mixture import Mixture
from qll.bytelm.model import ByteModel
from qll.bytelm.progress import Progress, train_line, validation_line
from qll.bytelm.runfiles import RunFiles
from qll.bytelm.saved import save_model
from qll.bytelm.settings import LMTrainConfig
from qll.bytelm.stages import all_losses, beginnings, stage_at
from qll.bytelm.streaming import StreamLoader
from qll.errors import ConfigError
from qll.train.precision import autocast, fast_attention
from qll.train.schedule import Schedule

VALIDATIONS = 20  # in a run, when it is not said how often
LEAST_WAIT = 10  # times the seconds of a validation, before the next one of a run against time
SAVE_SECONDS, BEAT_SECONDS = 60.0, 2.0


class Trainer:
    """One run: a learner, its data, its folder and how far it is."""

    def __init__(
        self,
        config: LMTrainConfig,
        model: ByteModel,
        loader: BatchLoader | StreamLoader,
        held_out: Sequence[np.ndarray],
        steps: int | None,
        precision: torch.dtype = torch.float32,
        mixture: Mixture | None = None,
    ) -> None:
        self.config, self.loader, self.held_out = config, loader, list(held_out)
        self.mixture = mixture
        self.files, self.stages = RunFiles(config.out), config.curriculum()
        self.precision, self.device = precision, model.embedding.weight.device
        self.schedule = Schedule(steps, config.max_seconds, config.learning.warmup_steps)
        self.seq_length = model.config.context
        self.progress, self.validated_step = Progress(), 0
        self.learner = self._learner(model)
        self.saved_at = self.beaten_at = -float("inf")
        self.validated_at, self.validation_seconds = -float("inf"), 0.0
        self.logged = (0.0, 0)

    def run(self) -> str:
        """Train until the steps, the seconds or the patience are used up; returns which.

        Raises LeakError and NonFiniteError; the last checkpoint and the best model stay as they
        were.
        """
        bar = tqdm(total=100, desc="lm train", unit="%", file=sys.stderr, disable=None, leave=False)
        try:
            require_causal(self.learner.measured, self.seq_length)
            with bar:
                stopped_by = self._loop(bar)
        except Exception:
            self._beat("failed")
            raise
        except KeyboardInterrupt:
            self._beat("stopped")
            raise
        self._beat("validating")
        return stopped_by

    def restore(self) -> None:
        """Continue from the checkpoint in the folder, if there is one."""
        if self.files.checkpoint.is_file():
            groups, facts = read_checkpoint(self.files.checkpoint, self.device)
            config = ModelConfig.from_dict(facts["model"])
            if config != self.learner.model.config:
                self._require_width_of_a_stage(config)
                self.learner = self._learner(ByteModel(config).to(self.device))
            self.learner.restore(groups, facts["counts"])
            self.progress = Progress(**facts["progress"])
            self.validated_step = facts["validated_step"]
            self.loader.restore({**facts["data"], **groups.get("data", {})})
            if self.mixture is not None:
                self.mixture.restore(facts.get("mixture", {}))
            torch.set_rng_state(groups["random"]["cpu"].cpu())
            if "cuda" in groups["random"]:
                torch.cuda.set_rng_state(groups["random"]["cuda"].cpu())
            self._weigh()
        lines = store.read_lines(self.files.metrics)
        kept = [line for line in lines if line.get("step", 0) <= self.progress.step]
        if len(kept) < len(lines):
            store.write_lines(self.files.metrics, kept)

    def save(self) -> None:
        """Write a checkpoint atomically."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        position = self.loader.state()
        rows = {name: value for name, value in position.items() if isinstance(value, torch.Tensor)}
        facts = {
            "progress": vars(self.progress),
            "validated_step": self.validated_step,
            "counts": self.learner.counts,
            "data": {name: value for name, value in position.items() if name not in rows},
            "model": self.learner.model.config.to_dict(),
        }
        if self.mixture is not None:
            facts["mixture"] = self.mixture.state()
        groups = {**self.learner.groups(), "random": random, "data": rows}
        write_checkpoint(self.files.checkpoint, groups, facts)
        self.saved_at = time.monotonic()

    def finish(self) -> None:
        """Say that the run is complete."""
        self._beat("complete")

    def validate(self) -> float:
        """Bits per byte on the held-out sample; keeps the model when it is the best so far.

        Raises LeakError for a number that cannot be honest.
        """
        self._beat("validating")
        model, watch = self.learner.measured, self.config.watch
        bits = self.bits(self.held_out, stride=self.seq_length)  # half the time, and comparable
        require_plausible(bits, watch.leak_below, model, self.seq_length, self.held_out)
        self.validated_step = self.progress.step
        best = self.progress.better(bits)
        stage = self.stages[self.progress.stage].name
        store.append_line(self.files.metrics, validation_line(self.progress, bits, stage))
        if best:
            save_model(self.files.model, model)
        return bits

    def bits(self, documents: Sequence[np.ndarray], stride: int | None = None) -> float:
        """Bits per byte of the measured model; windows overlap by half unless `stride` is given."""
        with autocast(self.precision, self.device):
            model = self.learner.measured
            return bits_per_byte(model, documents, self.seq_length, stride).bits_per_byte

    def _loop(self, bar: tqdm) -> str:
        started, before = time.monotonic(), self.progress.seconds
        self.saved_at, self.logged = started, (before, self.progress.bytes)
        progress, watch = self.progress, self.config.watch
        self.validated_at = started
        self._beat("training")
        while (done := self.schedule.done(progress.step, progress.seconds)) < 1:
            self._enter(stage_at(self.stages, done))
            rate = self.schedule.rate(progress.step, progress.seconds)
            check = self.device.type == "cpu" or (progress.step + 1) % watch.log_every == 0
            norm = self.learner.step(self.loader, progress.step + 1, done, rate, check)
            progress.step += 1
            if self.mixture is not None:
                self.mixture.after_step(self.learner.model, progress.step)
            progress.bytes += self._bytes_per_step
            progress.seconds = before + time.monotonic() - started
            if progress.step % watch.log_every == 0:
                self._log(bar, rate * self.config.learning.lr, float(norm))
            if time.monotonic() - self.beaten_at > BEAT_SECONDS:
                self._beat("training")
            improved = self._validate_if_due()
            progress.seconds = before + time.monotonic() - started
            if improved or self._save_due():
                self.save()
            if watch.patience and progress.stale >= watch.patience:
                return "patience"
        if self.validated_step < progress.step:
            self.validate()
        progress.seconds = before + time.monotonic() - started
        self.save()
        return self._stopped_by()

    @property
    def _bytes_per_step(self) -> int:
        learning = self.config.learning
        return learning.batch_size * learning.accumulate_steps * self.seq_length

    def _stopped_by(self) -> str:
        steps = self.schedule.steps
        return "steps" if steps and self.progress.step >= steps else "seconds"

    def _validate_if_due(self) -> bool:
        """Validate when it is time; whether that found a better model."""
        progress, every = self.progress, self.config.watch.val_every
        done = self.schedule.done(progress.step, progress.seconds)
        due = progress.step // every if every else int(done * VALIDATIONS)
        if due <= progress.validated or (not every and self._too_soon()):
            return False
        progress.validated = due
        started = time.monotonic()
        self.validate()
        self.validated_at = time.monotonic()
        self.validation_seconds = self.validated_at - started
        self._beat("training")
        return progress.best_step == progress.step

    def _too_soon(self) -> bool:
        """Whether validation would take a large share of a run that has only so many seconds."""
        waited = time.monotonic() - self.validated_at
        return self.schedule.seconds is not None and waited < LEAST_WAIT * self.validation_seconds

    def _save_due(self) -> bool:
        if self.config.watch.save_every:
            return self.progress.step % self.config.watch.save_every == 0
        return time.monotonic() - self.saved_at > SAVE_SECONDS

    def _enter(self, stage: int) -> None:
        """Begin stage number `stage`, growing the model when it is to be wider."""
        if stage == self.progress.stage and self.progress.step:
            return
        self.progress.stage = stage
        width, model = self.stages[stage].d_model, self.learner.model
        if width is not None and width != model.config.d_model:
            # optimiser and average begin anew: what they know is of other shapes
            weights = self.learner.objective.state_dict()
            self.learner = self._learner(grow(model, width))
            self.learner.objective.load_state_dict(weights)
        self._weigh()

    def _weigh(self) -> None:
        self.learner.weigh(self.stages[self.progress.stage].weights(self.config.losses))

    def _require_width_of_a_stage(self, config: ModelConfig) -> None:
        """Raise ConfigError when the curriculum never gives the model this config."""
        model, widths = self.learner.model, [stage.d_model for stage in self.stages]
        if config.d_model in widths and grow(model, config.d_model).config == config:
            return
        raise ConfigError(
            "of another architecture",
            where=self.files.checkpoint,
            expected=f"the model of {self.files.run.name}",
            hint="choose another --out, or delete the checkpoint to start over",
        )

    def _learner(self, model: ByteModel) -> Learner:
        # made with every loss of any stage, so that learned weights are there from the beginning
        every = all_losses(self.stages, self.config.losses)
        begins = beginnings(self.stages, self.config.losses)
        return Learner(model, every, self.config.learning, self._context, begins)

    def _context(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(autocast(self.precision, self.device))
        stack.enter_context(fast_attention(self.precision, self.device, self.seq_length))
        return stack

    def _log(self, bar: tqdm, rate: float, norm: float) -> None:
        progress = self.progress
        seconds, read = self.logged
        speed = (progress.bytes - read) / max(1e-9, progress.seconds - seconds)
        self.logged = (progress.seconds, progress.bytes)
        line = train_line(
            progress,
            self.learner.take_terms(),
            speed,
            self.schedule.seconds_left(progress.step, progress.seconds),
            learning_rate=rate,
            gradient_norm=norm,
            stage=self.stages[progress.stage].name,
            **({} if self.mixture is None else {"weights": self.mixture.weights()["last"]}),
        )
        store.append_line(self.files.metrics, line)
        done = self.schedule.done(progress.step, progress.seconds)
        bar.n = round(100 * done, 1)
        best = "" if progress.best_bits is None else f", best {progress.best_bits:.3f}"
        bar.set_postfix_str(f"{line['bits_per_byte']:.3f} bits per byte{best}, {speed:,.0f} B/s")

    def _beat(self, state: str) -> None:
        """Write heartbeat.json."""
        self.beaten_at, progress = time.monotonic(), self.progress
        facts: dict[str, Any] = {
            "state": state,
            "process": os.getpid(),
            "host": platform.node(),
            "time": time.time(),
            "step": progress.step,
            "steps": self.schedule.steps,
            "seconds": round(progress.seconds, 3),
            "max_seconds": self.schedule.seconds,
            "share": self.schedule.done(progress.step, progress.seconds),
        }
        store.write_json(self.files.heartbeat, facts)
