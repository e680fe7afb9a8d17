"""The folder of one training run: which files it has, who writes them and when.

    RUN/
      run.json            settings, versions, what the texts are; written before the first step
      metrics.jsonl       one JSON line per logged step and per validation, appended, fsynced
      heartbeat.json      where the run is now, replaced at least every few seconds
      checkpoint.safetensors   full state (weights, optimiser, EMA, data cursors, random numbers),
                          replaced atomically; deleted when the run is complete
      model/              best weights by validation (the EMA's, when there is one): `load_model`
      last/               weights at the end of training, in the same layout
      training.json       the result; its presence says that the run is complete
      data/               packed texts (uint8 with document boundaries, or shards of that by
                          --compress; languages beside them), kept for `lm eval`

A line of metrics.jsonl with "kind": "train" has: step, bytes (trained on so far), loss (nats per
byte, cross-entropy alone), bits_per_byte, learning_rate, gradient_norm, tokens_per_second (bytes
per second since the line before), seconds (of training, over all attempts), eta_seconds (null when
unknown), rss_bytes, device_bytes (0 on a CPU), stage (name of the curriculum's stage), weights (of
the texts, when they move), and one "loss_<name>" per auxiliary loss. With "kind": "validation":
step, bytes, seconds, stage, bits_per_byte, best_bits_per_byte, best_step.

heartbeat.json has: state ("training", "validating", "complete", "stopped", "failed"), process,
host, time (seconds since 1970), step, steps (null when only a time limit is known), seconds,
max_seconds (null without), share (of the run, 0 to 1).

training.json has: settings, model (its config), parameters, steps, bytes, seconds,
tokens_per_second, best {bits_per_byte, step, bytes, seconds}, held_out {bits_per_byte, bytes,
documents, context, stride}, stopped_by ("steps", "seconds", "patience"), texts (name, sha256,
bytes, documents of each), stages, weights {last, average} (when they move), and the environment.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qll import store
from qll.errors import MissingFileError


@dataclass(frozen=True)
class RunFiles:
    """The paths of a run folder.

    >>> RunFiles(Path("runs/lm")).metrics.as_posix()
    'runs/lm/metrics.jsonl'
    """

    out: Path

    @property
    def run(self) -> Path:
        """Settings and versions."""
        return self.out / "run.json"

    @property
    def metrics(self) -> Path:
        """The curves."""
        return self.out / "metrics.jsonl"

    @property
    def heartbeat(self) -> Path:
        """Where the run is now."""
        return self.out / "heartbeat.json"

    @property
    def checkpoint(self) -> Path:
        """Everything a run needs to go on."""
        return self.out / "checkpoint.safetensors"

    @property
    def model(self) -> Path:
        """The best weights."""
        return self.out / "model"

    @property
    def last(self) -> Path:
        """The weights at the end."""
        return self.out / "last"

    @property
    def result(self) -> Path:
        """The result of a complete run."""
        return self.out / "training.json"

    @property
    def data(self) -> Path:
        """Packed texts."""
        return self.out / "data"

    @property
    def complete(self) -> bool:
        """Whether the run has ended."""
        return self.result.is_file()

    def lines(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, all or those of one kind; a torn last line is left out."""
        return [line for line in store.read_lines(self.metrics) if kind in (None, line.get("kind"))]

    def beat(self) -> dict[str, Any] | None:
        """heartbeat.json, or None when there is none that can be read."""
        try:
            return json.loads(self.heartbeat.read_text("utf-8"))
        except (OSError, ValueError):
            return None


def model_folder(path: Path) -> Path:
    """The folder to load a model from: that of a run's best weights, or `path` itself.

    Raises MissingFileError when there is neither.

    >>> import tempfile; run = Path(tempfile.mkdtemp()); (run / "model").mkdir()
    >>> model_folder(run) == run / "model", model_folder(run / "model") == run / "model"
    (True, True)
    """
    if RunFiles(path).model.is_dir():
        return RunFiles(path).model
    if path.is_dir():
        return path
    raise MissingFileError(
        "no such folder", where=path, hint="give the --out folder of `qll lm train`"
    )
