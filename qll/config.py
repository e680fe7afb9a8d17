"""Every setting of every verb, as frozen dataclasses; the docstring under a field is its --help.

Values are checked here, so a wrong one is refused before torch is imported. No command-line
library here: only `qll.cli` knows one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qll.errors import UsageError
from qll.options import (
    ConvertOptions,
    Device,
    Dtype,
    ScaleOptions,
    TextOptions,
    TrainOptions,
    require_positive,
    require_share,
)


@dataclass(frozen=True)
class MainConfig:
    """The main job: load, calibrate, plan, convert, evaluate, look inside, report."""

    llama_dir: Path | None = None
    """Folder or .gguf file of a Llama checkpoint; default: the embedded SmolLM2-135M-Instruct."""
    sae_dir: Path | None = None
    """Folder of sparse autoencoders (sparsify, SAELens or Llama Scope) to compare features with;
    `embedded`: those of the embedded model that come with the package."""
    sae_layers: str = ""
    """Blocks whose autoencoders to use, for instance 0,1,2; default: all that the folder has."""
    moments: Path | None = None
    """Folder left by `calibrate` (its work/moments), to convert at many budgets from one."""
    plan: Path | None = None
    """A plan.json to follow, perhaps edited, made by `plan` for this model with this --keep."""
    out: Path = Path("runs/qll")
    """Output folder; a second run with the same settings resumes it."""
    device: Device = "auto"
    """Where matrix products run; factorisations run on the CPU."""
    seed: int = 0
    """Seed of everything random."""
    dry_run: bool = False
    """Print what would be done, its size and its memory, and stop."""
    convert: ConvertOptions = field(default_factory=ConvertOptions)
    texts: TextOptions = field(default_factory=TextOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    scale: ScaleOptions = field(default_factory=ScaleOptions)

    def __post_init__(self) -> None:
        if self.sae_layers and self.sae_dir is None:
            raise UsageError("needs --sae_dir", where="--sae_layers", found=self.sae_layers)
        if self.plan is not None and not self.plan.is_file():
            raise UsageError(
                "no such file", where="--plan", found=self.plan, hint="write one with `plan`"
            )
        if self.convert.feature_weight and self.sae_dir is None:
            raise UsageError(
                "needs --sae_dir", where="--feature_weight", found=self.convert.feature_weight
            )
        self.blocks_with_sae()

    def resolved(self) -> MainConfig:
        """The same with what --effort decides about the plan filled in.

        >>> MainConfig(train=TrainOptions("best")).resolved().convert.singles
        'panels'
        """
        if self.convert.singles != "auto":
            return self
        singles = "panels" if self.train.effort == "best" else "lowrank"
        return dataclasses.replace(self, convert=dataclasses.replace(self.convert, singles=singles))

    def blocks_with_sae(self) -> list[int]:
        """The block indices of --sae_layers; raises UsageError when they are not integers."""
        words = [word for word in self.sae_layers.split(",") if word.strip()]
        if not all(word.strip().isdecimal() for word in words):
            raise UsageError(
                "not a list of blocks",
                where="--sae_layers",
                expected="integers separated by commas",
                found=self.sae_layers,
                hint="for instance --sae_layers 0,1,2",
            )
        return [int(word) for word in words]


@dataclass(frozen=True)
class PlannerConfig:
    """What a conversion needs on a machine: time, memory, disk, network; nothing is converted.

    For one low-rank network per matrix. For instance:
    main.py plan --shape llama3-8b --keep 0.6 --machine cluster:64
    """

    shape: Literal["", "tiny", "smollm2-135m", "llama3-8b", "llama3-70b", "llama3-405b", "1t"] = ""
    """Shape of the model; without it, that of --llama_dir."""
    llama_dir: Path | None = None
    """Checkpoint, or folder with a config.json, whose shape to take; default: SmolLM2-135M."""
    machine: str = "cpu2"
    """cpu2, h100, 8xh100, cluster:N (N machines like cpu2), or here (measured now, a minute)."""
    keep: float = 0.8
    """Share of the block linears' parameters to keep, in (0, 1]."""
    metric: Literal["kfac", "activation", "plain"] = "kfac"
    """Norm in which weights are truncated; kfac needs gradients."""
    calib_tokens: int = 262144
    """Tokens to measure moments on."""
    refine_passes: int = 0
    """Passes of block refinement, over 65,536 tokens (--effort balanced: 2)."""
    eval_tokens: int = 4096
    """Tokens of each of two texts that both models score, in memory at once; 0: no evaluation."""
    sae_places: int = 31
    """Places of the model with an autoencoder whose features are followed; 0: none."""
    sae_width: int = 32
    """Latents of an autoencoder over the width of the model."""
    json: bool = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        require_share("--keep", self.keep)
        require_positive("--calib_tokens", self.calib_tokens, least=2)
        require_positive("--sae_width", self.sae_width, least=1)
        for name in ("refine_passes", "eval_tokens", "sae_places"):
            require_positive(f"--{name}", getattr(self, name), least=0)
        if self.shape and self.llama_dir is not None:
            raise UsageError(
                "either a shape or a checkpoint",
                where="--shape",
                found=f"--shape {self.shape} --llama_dir {self.llama_dir}",
            )


@dataclass(frozen=True)
class InspectConfig:
    """Print dimensions, connectivity, row order, parameter counts and bytes of a checkpoint."""

    llama_dir: Path | None = None
    """Checkpoint folder, .gguf file, or a folder with only a config.json or params.json."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True)
class EvalConfig:
    """Score a converted folder against the dense model it came from."""

    model: Path
    """Folder of a converted checkpoint (the model/ of a run)."""
    llama_dir: Path | None = None
    """The dense checkpoint; default: the embedded SmolLM2-135M-Instruct."""
    eval_text: Path | None = None
    """UTF-8 file to score; default: the evaluation half of pydoc_data's topics."""
    eval_tokens: int = 4096
    """Tokens to score."""
    context: int = 1024
    """Tokens per window; windows do not overlap."""
    device: Device = "auto"
    """Where to run."""


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt with a converted folder, or with a dense checkpoint."""

    prompt: str
    """Text to continue."""
    model: Path | None = None
    """Converted folder, dense checkpoint folder or .gguf file; default: the embedded model."""
    max_new_tokens: int = 64
    """Tokens to write at most."""
    temperature: float = 0.0
    """0 always takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability, in (0, 1]."""
    seed: int = 0
    """Seed of the sampling."""
    chat: bool = False
    """Wrap the prompt in the tokenizer's chat template."""
    device: Device = "auto"
    """Where to run."""
    sae_dir: Path | None = None
    """Folder of the sparse autoencoders that --steer names features of, or `embedded`."""
    steer: str = ""
    """Features to push, as block:feature:amount, for instance 7:1234:+8,9:55:-3."""
    runtime: Literal["qll", "transformers"] = "qll"
    """What runs the model: the fast runtime of this package, or transformers (--steer needs it)."""
    draft: Path | None = None
    """Converted folder that proposes tokens for the model to check: the same text, faster if the
    draft is cheap and mostly right."""

    def __post_init__(self) -> None:
        if self.edits() and self.sae_dir is None:
            raise UsageError("needs --sae_dir", where="--steer", found=self.steer)
        if self.draft is not None and (self.steer or self.runtime == "transformers"):
            raise UsageError(
                "works in the runtime of this package alone",
                where="--draft",
                expected="--runtime qll, without --steer",
                found=f"--runtime {self.runtime}" + (" --steer" if self.steer else ""),
            )
        require_positive("--max_new_tokens", self.max_new_tokens, least=1)
        require_share("--top_p", self.top_p)
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(
                "not a temperature",
                where="--temperature",
                expected="a finite number of at least 0",
                found=self.temperature,
            )

    def edits(self) -> list[tuple[str, int, float]]:
        """(hookpoint, feature, amount) of --steer; raises UsageError when it reads otherwise.

        >>> GenerateConfig("hi", sae_dir=Path("saes"), steer="7:12:+8,layers.9.mlp:5:-1").edits()
        [('layers.7', 12, 8.0), ('layers.9.mlp', 5, -1.0)]
        """
        found = []
        for word in filter(None, (part.strip() for part in self.steer.split(","))):
            place, *numbers = word.split(":")
            try:
                feature, amount = int(numbers[0]), float(numbers[1])
                fits = len(numbers) == 2 and abs(amount) < float("inf") and bool(place)
            except (IndexError, ValueError):
                fits = False
            if not fits:
                raise UsageError(
                    "not a feature to steer",
                    where="--steer",
                    expected="block:feature:amount",
                    found=word,
                    hint="for instance --steer 7:1234:+8",
                )
            found.append((f"layers.{place}" if place.isdecimal() else place, feature, amount))
        return found


@dataclass(frozen=True)
class BenchConfig:
    """How fast a converted folder and its dense model run here, and how near to the limits."""

    model: Path | None = None
    """Folder of a converted checkpoint; without it the dense model alone is measured."""
    llama_dir: Path | None = None
    """The dense checkpoint; default: the embedded SmolLM2-135M-Instruct."""
    dtype: Dtype = "auto"
    """Number format of both models; auto is that of the converted folder (dense alone: float32)."""
    batch: int = 1
    """Texts that are continued together."""
    prompt_tokens: int = 512
    """Length of the prompt that is read."""
    new_tokens: int = 16
    """Tokens that are written behind it, per round."""
    rounds: int = 5
    """How often each measurement is taken; models take turns."""
    device: Device = "auto"
    """Where to run."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        for name in ("batch", "new_tokens", "rounds"):
            require_positive(f"--{name}", getattr(self, name), least=1)
        require_positive("--prompt_tokens", self.prompt_tokens, least=2)


@dataclass(frozen=True)
class LensConfig:
    """Which features of sparse autoencoders survive in a model that was converted before.

    Reads a text with the dense and the converted model and leaves lens.json and, per autoencoder,
    features/<place>.html, .json and .safetensors. For instance:
    main.py lens --model runs/mine --sae_dir saes --hookpoints 9 20 --out runs/mine_lens
    """

    model: Path
    """Folder of a finished run, or of a converted checkpoint."""
    sae_dir: Path
    """Folder of sparse autoencoders (sparsify, SAELens or Llama Scope), or `embedded`."""
    hookpoints: tuple[str, ...] = ()
    """Blocks (9 is their residual stream) or places (layers.9.mlp); default: all of the folder."""
    llama_dir: Path | None = None
    """The dense checkpoint; default: the embedded SmolLM2-135M-Instruct."""
    eval_text: Path | None = None
    """UTF-8 text to read; default: the evaluation half of pydoc_data's topics."""
    eval_tokens: int = 4096
    """Tokens of it to read; features that fire on fewer than 30 are counted as unmeasured."""
    moments: Path | None = None
    """Folder left by `calibrate`: critical bonds are then cut in its metric, not in the plain."""
    reach: int = 2
    """Blocks before and after a place whose matrices are asked about every feature."""
    run_again: int = 16
    """Windows on which the models run again with an autoencoder in place, or a feature taken away:
    more of them, surer CE scores and effects, more time."""
    out: Path = Path("runs/lens")
    """Output folder; a second run with the same settings resumes it."""
    device: Device = "auto"
    """Where to run."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        require_positive("--eval_tokens", self.eval_tokens, least=2)
        require_positive("--reach", self.reach, least=1)
        require_positive("--run_again", self.run_again, least=1)
        if self.eval_text is not None and not self.eval_text.is_file():
            raise UsageError(
                "no such file",
                where="--eval_text",
                found=self.eval_text,
                hint="give the path of a text",
            )

    def places(self) -> list[str]:
        """The names of --hookpoints, a number standing for the stream after that block.

        >>> LensConfig(Path("m"), Path("s"), hookpoints=("9", "layers.3.mlp")).places()
        ['layers.9', 'layers.3.mlp']
        """
        named = dict.fromkeys(word for part in self.hookpoints for word in part.split(",") if word)
        return [f"layers.{word}" if word.isdecimal() else word for word in named]


@dataclass(frozen=True)
class VerifyConfig:
    """Check every byte, key and the logits fingerprint of a converted folder."""

    model: Path
    """Folder of a converted checkpoint."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a converted folder as a plain Llama, or its low-rank factors as pairs of linears."""

    model: Path
    """Folder of a converted checkpoint."""
    out: Path
    """New folder."""
    layout: Literal["dense", "two_linear"] = "dense"
    """dense: opens everywhere; two_linear: factors as two Linear weights each."""


@dataclass(frozen=True)
class ReportConfig:
    """Draw report.html and the table again from a report.json."""

    run: Path
    """Folder of a finished run."""


def to_json(config: Any) -> Any:
    """A config dataclass as JSON values; paths become strings.

    >>> to_json(VerifyConfig(model=Path("runs/x/model")))
    {'model': 'runs/x/model'}
    """
    if dataclasses.is_dataclass(config):
        return {
            item.name: to_json(getattr(config, item.name)) for item in dataclasses.fields(config)
        }
    if isinstance(config, tuple):
        return [to_json(item) for item in config]
    return str(config) if isinstance(config, Path) else config


def main_config_from_json(value: dict[str, Any], where: Path) -> MainConfig:
    """The MainConfig that `to_json` wrote; raises UsageError for keys we do not know."""
    parts = {"convert": ConvertOptions, "texts": TextOptions, "train": TrainOptions}
    parts["scale"] = ScaleOptions
    known = {item.name for item in dataclasses.fields(MainConfig)}
    _require_known(where, set(value), known)
    settings = dict(value)
    for name, kind in parts.items():
        inner = dict(settings.get(name, {}))
        _require_known(where, set(inner), {item.name for item in dataclasses.fields(kind)})
        settings[name] = kind(**{key: _path(key, item) for key, item in inner.items()})
    return MainConfig(**{key: _path(key, item) for key, item in settings.items()})


def _path(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_path(key, item) for item in value)
    is_path = key in (
        "llama_dir",
        "sae_dir",
        "moments",
        "plan",
        "out",
        "calib_text",
        "eval_text",
    )
    return Path(value) if is_path and value is not None else value


def _require_known(where: Path, found: set[str], known: set[str]) -> None:
    if unknown := found - known:
        raise UsageError(
            "unknown settings",
            where=where,
            expected=f"some of {', '.join(sorted(known))}",
            found=", ".join(sorted(unknown)),
        )
