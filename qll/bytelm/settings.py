"""The settings of `qll lm train` and `qll lm eval`; the docstring under a field is its --help.

Names are those of the founding scripts where they had one. What is left unset comes from --preset.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from qll.bytelm.config import LossConfig, ModelConfig
from qll.bytelm.runfiles import model_folder
from qll.bytelm.stages import Stage, stages_of
from qll.errors import UsageError
from qll.options import Device

PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "model_dim": 256,
        "num_layers": 4,
        "num_heads": 4,
        "seq_length": 256,
        "dropout": 0.0,
        "global_tokens": 0,
        "lora_rank": 0,
        "lora_alpha": 64.0,
        "lr": 4e-3,
        "batch_size": 16,
        "accumulate_steps": 1,
    },
    # the founding documents' improved run; their learning rate of 5e-5 is low without pretraining
    "improved": {
        "model_dim": 768,
        "num_layers": 12,
        "num_heads": 12,
        "seq_length": 256,
        "dropout": 0.1,
        "global_tokens": 16,
        "lora_rank": 32,
        "lora_alpha": 64.0,
        "lr": 1e-3,
        "batch_size": 32,
        "accumulate_steps": 4,
        "epochs": 20.0,
    },
}
DEFAULT_EPOCHS = 3.0  # when no length is given at all


@dataclass(frozen=True)
class TextSettings:
    """Which texts, and how they are read."""

    dataset: str = ""
    """Data set or mix of data sets from the hub in place of --data: wikitext2, tinystories,
    openwebtext, pile, c4, fineweb; single, multi, large."""
    data_weights: tuple[float, ...] = ()
    """Weight of each text of --data in the mixture; default: its bytes."""
    pattern: str = "*"
    """Which files of a folder to read, for instance '*.md'; all of them must be texts."""
    validation: tuple[Path, ...] = ()
    """Texts to measure on; default: every tenth document of --data in name order is held out, or
    the last tenth of each when there are fewer than ten."""
    streaming: bool = False
    """Read the texts as a stream through a shuffle buffer, without packing them on disk first."""
    max_samples: int | None = None
    """Windows' worth of each text to train on at most."""
    buffer_size: int = 10_000
    """Windows in the shuffle buffer of --streaming."""
    min_quality: float = 0.0
    """Train on documents that obey at least this share of eight rules of prose (see
    qll/bytelm/quality.py), from 0 (all) to 1."""
    compress: bool = False
    """Keep packed texts in compressed shards on disk, which are read at random places."""
    reference: Path | None = None
    """Run on the same texts with fixed weights: the weights of the texts then follow what is left
    to learn of each, which is what this model needs more bits for than that one (DoReMi)."""


@dataclass(frozen=True)
class SizeSettings:
    """What model is trained."""

    model_args: Path | None = None
    """JSON file of a model config (see qll/bytelm/config.py), perhaps of another run."""
    set: tuple[str, ...] = ()
    """Single settings of the model config, as name=value, for instance mixer.pattern=interference
    stream.phase=rotation."""
    checkpoint: Path | None = None
    """Run or model folder whose weights to start from; adapters and global tokens that it has not
    got start afresh."""
    embedding: Literal["normal", "orthogonal", "ppmi", "spectral", "frequency"] = "normal"
    """Where the byte embedding starts: at random, orthogonal, or from statistics of byte pairs in
    the texts (see qll/bytelm/embedding.py)."""
    model_dim: int | None = None
    """Channels of the residual stream (default 256)."""
    num_layers: int | None = None
    """Blocks (default 4)."""
    num_heads: int | None = None
    """Heads (default 4)."""
    seq_length: int | None = None
    """Bytes per window (default 256)."""
    dropout: float | None = None
    """Share of each block's output dropped in training (default 0)."""
    global_tokens: int | None = None
    """Learned keys and values that every position sees (default 0)."""
    lora_rank: int | None = None
    """Rank of low-rank adapters (default 0: none)."""
    lora_alpha: float | None = None
    """Scale of the adapters, divided by their rank (default 64)."""
    lora_train_only: bool = False
    """Train the adapters alone."""
    languages: tuple[str, ...] = ()
    """Languages of --data, for instance en de: of files name.en.txt or in folders en/. The phase
    rotation, which must be on, then turns by an angle of each (--set stream.phase=rotation)."""


@dataclass(frozen=True)
class LearningSettings:
    """How it learns."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: matrices inside the blocks by Muon, everything else by AdamW."""
    lr: float | None = None
    """Highest learning rate (default 4e-3)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    batch_size: int | None = None
    """Windows per micro-batch (default 16)."""
    accumulate_steps: int | None = None
    """Micro-batches per step (default 1)."""
    epochs: float | None = None
    """Passes over the texts (default 3 when neither --max_steps nor --max_seconds is given)."""
    max_steps: int | None = None
    """Steps at most."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; default: a fiftieth of the run."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    ema: float = 0.0
    """Decay per step of an average of the weights, which is then what is measured and kept; 0 is
    without."""
    use_checkpoint: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Fuse the operations of every block with torch.compile: pays in runs of many minutes, after
    about one of compiling (which needs a C++ compiler on a CPU)."""
    stages: str = "language_first"
    """Curriculum: language_first (other losses come after 70 % of the run), seed (four stages),
    growth (256 -> 512 -> 768 channels), or a JSON file with a list of stages."""


@dataclass(frozen=True)
class WatchSettings:
    """What is written down on the way, and what stops a run."""

    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    save_every: int | None = None
    """Steps between two checkpoints; default: one a minute."""
    val_every: int | None = None
    """Steps between two validations; default: twenty in the run."""
    val_max_chunks: int = 128
    """Windows' worth of held-out text per validation."""
    eval_bytes: int = 262_144
    """Held-out bytes measured at the end; `qll lm eval` measures all of them."""
    patience: int = 0
    """Validations without a better one after which training stops early; 0 never does."""
    leak_below: float = 1.0
    """Validation bits per byte below which a run is stopped on suspicion that the model sees what
    it should predict; 0 never does."""


@dataclass(frozen=True)
class LMTrainConfig:
    """Train a byte-level language model on local texts, with defaults that just work.

    Leaves OUT/model (the best weights), OUT/metrics.jsonl and OUT/training.json. A run that was
    killed resumes with the same command and ends with the same bytes when its length is given in
    steps or epochs. For instance: qll lm train --data texts/ --out runs/lm --max_seconds 900
    """

    data: tuple[Path, ...] = ()
    """UTF-8 files and folders (read recursively) to train on."""
    out: Path = Path("runs/lm")
    """Output folder; a second run with the same settings resumes it."""
    preset: Literal["default", "improved"] = "default"
    """improved: 768 channels, 12 blocks, 12 heads, 16 global tokens, LoRA 32/64, 20 epochs."""
    max_seconds: float | None = None
    """Seconds of training at most; the learning rate falls to its end in that time."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of matrix products; auto: bfloat16 where it is fast."""
    device: Device = "auto"
    """Where to run."""
    seed: int = 0
    """Seed of everything random."""
    texts: TextSettings = field(default_factory=TextSettings)
    size: SizeSettings = field(default_factory=SizeSettings)
    learning: LearningSettings = field(default_factory=LearningSettings)
    losses: LossConfig = field(default_factory=LossConfig)
    watch: WatchSettings = field(default_factory=WatchSettings)

    def __post_init__(self) -> None:
        if bool(self.data) == bool(self.texts.dataset):
            raise UsageError(
                "give texts to train on, either local or named",
                where="--data",
                found="both" if self.data else "neither",
                hint="--data FILE_OR_FOLDER, or --dataset wikitext2",
            )
        _check_numbers(self)
        if self.texts.streaming and (self.texts.compress or self.texts.reference is not None):
            raise UsageError(
                "is for texts that are packed",
                where="--compress" if self.texts.compress else "--reference",
                found="--streaming",
                hint="leave one of the two out",
            )
        if not 0 <= self.texts.min_quality <= 1:
            raise UsageError(
                "out of range",
                where="--min_quality",
                expected="0 to 1",
                found=self.texts.min_quality,
            )
        if self.size.checkpoint is not None and self.size.embedding != "normal":
            raise UsageError(
                "the checkpoint has an embedding already", where="--embedding", hint="leave it out"
            )

    def resolved(self) -> LMTrainConfig:
        """The same with the preset's value wherever none was given.

        >>> config = LMTrainConfig(data=(Path("text"),), preset="improved").resolved()
        >>> config.size.model_dim, config.learning.epochs, config.learning.accumulate_steps
        (768, 20.0, 4)
        """
        preset = PRESETS[self.preset]
        # a model that is given has its own sizes
        given = self.size.model_args is not None or self.size.checkpoint is not None
        size = self.size if given else _filled(self.size, preset)
        learning = _filled(self.learning, preset)
        lengths = (learning.epochs, learning.max_steps, self.max_seconds)
        if all(length is None for length in lengths):
            learning = replace(learning, epochs=DEFAULT_EPOCHS)
        return replace(self, size=size, learning=learning)

    def model_config(self) -> ModelConfig:
        """The model to train: --model_args or --checkpoint, then sizes, then --set.

        Raises UsageError for a setting the model does not have.

        >>> size = SizeSettings(num_layers=2, set=("stream.phase=rotation",))
        >>> found = LMTrainConfig(data=(Path("text"),), size=size).model_config()
        >>> found.n_layers, found.stream.phase
        (2, 'rotation')
        """
        size = self.resolved().size
        if size.model_args is not None:
            value = _model_args(size.model_args)
        elif size.checkpoint is not None:
            value = _model_args(model_folder(size.checkpoint) / "model.json")
        else:
            value = ModelConfig().to_dict()
        for name, place in _PLACES.items():
            given = getattr(size, name)
            if given is not None and given is not False and given != ():
                _put(value, place, list(given) if isinstance(given, tuple) else given)
        first = self.curriculum()[0].d_model
        if first is not None and first != value["d_model"]:
            _put(value, "n_heads", max(1, value["n_heads"] * first // value["d_model"]))
            _put(value, "d_model", first)
        for item in size.set:
            place, equals, text = item.partition("=")
            if not equals:
                raise UsageError("not name=value", where="--set", found=item)
            _put(value, place, _value(text))
        return ModelConfig.from_dict(value)

    def curriculum(self) -> tuple[Stage, ...]:
        """The stages of the run."""
        return stages_of(self.learning.stages)


@dataclass(frozen=True)
class LMEvalConfig:
    """Print the bits per byte of a byte model, with document boundaries and a sliding window."""

    model: Path
    """Folder of a run of `qll lm train`, or of a model."""
    data: tuple[Path, ...] = ()
    """UTF-8 files and folders; default: what the run held out."""
    pattern: str = "*"
    """Which files of a folder to read, for instance '*.md'."""
    split: Literal["all", "held_out"] = "all"
    """All documents, or only those that training on the same --data would hold out."""
    context: int | None = None
    """Bytes per window; default: the model's context."""
    stride: int | None = None
    """Bytes that a window moves; default: half the context."""
    max_bytes: int | None = None
    """Bytes to score at most, taken evenly from the documents; default: all."""
    parallel: tuple[Path, ...] = ()
    """Two texts of as many lines, each line a translation of that of the other: how often the state
    of a line is nearest to that of its translation, beside chance and its bytes' histogram."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Number format of matrix products."""
    device: Device = "auto"
    """Where to run."""

    def __post_init__(self) -> None:
        if len(self.parallel) not in (0, 2):
            raise UsageError("needs two texts", where="--parallel", found=len(self.parallel))
        for name in ("context", "stride", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError("too small", where=f"--{name}", expected="at least 1", found=value)


# where each setting of a size is in a model config
_PLACES = {
    "model_dim": "d_model",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "seq_length": "context",
    "dropout": "dropout",
    "global_tokens": "memory.global_tokens",
    "lora_rank": "weights.lora_rank",
    "lora_alpha": "weights.lora_alpha",
    "lora_train_only": "weights.lora_train_only",
    "languages": "stream.languages",
}


def _filled(part: Any, preset: dict[str, Any]) -> Any:
    """`part` with the preset's value where it has none."""
    missing = {
        item.name: preset[item.name]
        for item in fields(part)
        if item.name in preset and getattr(part, item.name) is None
    }
    return replace(part, **missing)


def _model_args(path: Path) -> dict[str, Any]:
    """The model config in a JSON file: alone, or under "config" as in a model folder."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            "not a model config", where="--model_args", found=f"{path}: {error}"
        ) from None
    value = value.get("config", value) if isinstance(value, dict) else value
    return ModelConfig.from_dict(value).to_dict()


def _put(value: dict[str, Any], place: str, item: Any) -> None:
    """Set `place`, a dotted name, in nested dicts."""
    *groups, name = place.split(".")
    for group in groups:
        value = value.get(group, {})
    if not isinstance(value, dict) or name not in value:
        raise UsageError("the model has no such setting", where="--set", found=place)
    # a pattern of one mixer may be written without brackets
    value[name] = [item] if isinstance(value[name], list) and isinstance(item, str) else item


def _value(text: str) -> Any:
    """A value as JSON, or else a word, or words separated by commas."""
    try:
        return json.loads(text)
    except ValueError:
        return text.split(",") if "," in text else text


def _check_numbers(config: LMTrainConfig) -> None:
    positive = {
        "size": ("model_dim", "num_layers", "num_heads", "seq_length"),
        "learning": ("lr", "batch_size", "accumulate_steps", "epochs", "max_steps"),
        "texts": ("max_samples", "buffer_size"),
        "watch": ("log_every", "save_every", "val_every", "val_max_chunks", "eval_bytes"),
    }
    at_least_zero = {
        "size": ("global_tokens", "lora_rank"),
        "learning": ("warmup_steps", "weight_decay", "grad_clip"),
        "watch": ("patience", "leak_below"),
    }
    for group, names in positive.items():
        for name in names:
            _require(name, getattr(getattr(config, group), name), 0, exclusive=True)
    for group, names in at_least_zero.items():
        for name in names:
            _require(name, getattr(getattr(config, group), name), 0)
    _require("max_seconds", config.max_seconds, 0, exclusive=True)
    _require("seed", config.seed, 0)
    for weight in config.texts.data_weights:
        _require("data_weights", weight, 0, exclusive=True)
    if not 0 <= config.learning.ema < 1:
        raise UsageError(
            "out of range", where="--ema", expected="in [0, 1)", found=config.learning.ema
        )


def _require(name: str, value: float | int | None, least: int, exclusive: bool = False) -> None:
    if value is None:
        return
    if not least <= value < float("inf") or (exclusive and value == least):
        raise UsageError(
            "out of range",
            where=f"--{name}",
            expected=f"{'above' if exclusive else 'at least'} {least}, finite",
            found=value,
        )
