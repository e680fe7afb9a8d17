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

Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Format = Literal[
    "auto",
    "dense",
    "lowrank",
    "mpo",
    "tucker",
    "tree",
    "kron",
    "panels",
    "sparse",
    "joint_tree",
    "joint_tucker",
    "joint_channels",
    "joint_value_output",
    "joint_query_key",
]


@dataclass(frozen=True)
class ConvertOptions:
    """How weights become tensor networks."""

    keep: float = 0.8
    """Share of the block linears' parameters to keep, in (0, 1]."""
    format: Format = "auto"
    """Tensor network of every block linear; auto chooses among dense, lowrank and --sharing."""
    sharing: Literal["none", "bonds", "inner", "all"] = "inner"
    """Formats of several matrices offered by auto: joint_tree (bonds), fewer channels between them
    (inner: joint_channels, joint_value_output, joint_query_key), both, or neither."""
    metric: Literal["kfac", "activation", "plain"] = "kfac"
    """Norm in which weights are truncated: K-FAC (inputs and output gradients), inputs, or none."""
    feature_weight: float = 0.0
    """Weight of keeping every feature of --sae_dir apart, beside the loss, in the kfac metric."""
    allocation: Literal["global", "uniform"] = "global"
    """One budget over all matrices by predicted loss, or equal shares (auto is then lowrank)."""
    outliers: float = 0.0
    """Also offer auto a low-rank matrix plus this share of single entries (0.001, say); 0: none."""
    losses: Literal["predicted", "depth", "measured"] = "predicted"
    """What the budget minimises: losses predicted in the metric, these weighted by depth, or scaled
    to a KL divergence measured per kind of matrix and depth."""
    gauge: Literal["interpolative", "none"] = "interpolative"
    """Store an identity block per bond for free, or every number of every core."""
    sites: int = 3
    """Cores per matrix of --format mpo and tree."""
    sweeps: int = 2
    """Rounds of refitting every core under the whole metric (mpo, tucker, tree, kron, panels)."""
    disentangle: Literal["none", "channels", "heads", "rotary", "all"] = "none"
    """Bases chosen for what splits an index, absorbed for free: order of the MLP's channels, values
    of each head, rotary pairs. Low rank does not see them."""
    norms: Literal["keep", "fold"] = "keep"
    """Leave RMSNorm gains where they are, or multiply them into the next linear (both exact)."""
    keep_embeddings: float = 1.0
    """Share of the embedding (and output head) parameters to keep; 1 leaves them dense."""
    dtype: Dtype = "auto"
    """Dtype of the saved tensors; auto is the source's (float32 for quantised GGUF files)."""
    bits: Literal[0, 2, 3, 4, 8] = 0
    """Store the block linears (cores and dense matrices) as integers of this width; 0 does not."""
    bits_group: int = 32
    """Numbers that share a scale of 16 bits under --bits."""

    def __post_init__(self) -> None:
        _require_share("--keep", self.keep)
        _require_share("--keep_embeddings", self.keep_embeddings)
        if not 0 <= self.outliers < 1:
            raise UsageError(
                "not a share", where="--outliers", expected="in [0, 1)", found=self.outliers
            )
        _require_positive("--sites", self.sites, least=2)
        _require_positive("--bits_group", self.bits_group, least=1)
        _require_positive("--sweeps", self.sweeps, least=0)
        if not 0 <= self.feature_weight < float("inf"):
            raise UsageError(
                "not a weight",
                where="--feature_weight",
                expected="a finite number of at least 0",
                found=self.feature_weight,
            )
        if self.feature_weight and self.metric != "kfac":
            raise UsageError(
                "features are weighed in output gradients, which this metric has not",
                where="--feature_weight",
                expected="--metric kfac",
                found=self.metric,
            )


@dataclass(frozen=True)
class TextOptions:
    """Which texts the moments are measured on and the models are scored on."""

    calib_text: tuple[Path, ...] = ()
    """UTF-8 files for calibration, mixed; default: half of the topics in Python's pydoc_data."""
    calib_weights: tuple[float, ...] = ()
    """Share of each calibration file; default: equal shares."""
    eval_text: Path | None = None
    """UTF-8 file for evaluation; default: the other half."""
    calib_tokens: int = 4096
    """Tokens to measure moments on, in windows drawn from everywhere in the calibration texts."""
    prior_tokens: int = 0
    """Random tokens, drawn by rank, towards whose input moments those of the text are shrunk (2048,
    say, for a calibration of a few hundred tokens); 0 does not."""
    eval_tokens: int = 4096
    """Tokens of each evaluation text to score."""
    context: int = 1024
    """Tokens per window; windows do not overlap."""

    def __post_init__(self) -> None:
        for name in ("calib_tokens", "eval_tokens", "context"):
            _require_positive(f"--{name}", getattr(self, name), least=2)
        _require_positive("--prior_tokens", self.prior_tokens, least=0)
        named = [("calib_text", path) for path in self.calib_text]
        for name, path in [*named, ("eval_text", self.eval_text)]:
            if path is not None and not path.is_file():
                raise UsageError(
                    "no such file", where=f"--{name}", found=path, hint="give the path of a text"
                )
        self._require_weights()

    def _require_weights(self) -> None:
        positive = all(0 < weight < float("inf") for weight in self.calib_weights)
        if self.calib_weights and not (
            positive and len(self.calib_weights) == len(self.calib_text)
        ):
            raise UsageError(
                "not one weight per calibration file",
                where="--calib_weights",
                expected=f"{len(self.calib_text)} positive numbers",
                found=" ".join(map(str, self.calib_weights)),
                hint="give as many weights as files of --calib_text, or none",
            )


@dataclass(frozen=True)
class TrainOptions:
    """What is trained after the closed forms; unset numbers follow --effort."""

    effort: Literal["fast", "balanced", "best"] = "balanced"
    """fast: no training; balanced: each block refined, then a short healing; best: a long one."""
    refine_passes: int | None = None
    """Passes over the refinement windows per block (fast 0, balanced 4, best 4)."""
    refine_tokens: int = 16384
    """Tokens each block is refined on; one window in eight is held out."""
    refine_rate: float = 2e-4
    """Highest learning rate of the refinement."""
    heal_tokens: int | None = None
    """Tokens of distillation of the whole model (fast 0, balanced 65,536, best 393,216)."""
    heal_rate: float = 1.5e-4
    """Highest learning rate of the healing."""
    tune_tokens: int | None = None
    """Under --bits, tokens of distillation that train scales, codes fixed (0, 0, best 131,072)."""
    tune_rate: float = 1e-3
    """Highest learning rate of the scales, relative to themselves, and of the norm gains."""
    train_context: int = 512
    """Tokens per training window."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of matrix products in training; auto: bfloat16 where it is fast."""

    def __post_init__(self) -> None:
        for name, least in (("refine_tokens", 2), ("train_context", 2)):
            _require_positive(f"--{name}", getattr(self, name), least)
        for name in ("refine_passes", "heal_tokens", "tune_tokens"):
            if getattr(self, name) is not None:
                _require_positive(f"--{name}", getattr(self, name), least=0)
        for name in ("refine_rate", "heal_rate", "tune_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(
                    "not a learning rate",
                    where=f"--{name}",
                    expected="a finite number above 0",
                    found=getattr(self, name),
                )

    @property
    def passes(self) -> int:
        """Passes of block refinement."""
        by_effort = {"fast": 0, "balanced": 4, "best": 4}
        return by_effort[self.effort] if self.refine_passes is None else self.refine_passes

    @property
    def healing(self) -> int:
        """Tokens of healing."""
        by_effort = {"fast": 0, "balanced": 65536, "best": 393216}
        return by_effort[self.effort] if self.heal_tokens is None else self.heal_tokens

    @property
    def tuning(self) -> int:
        """Tokens of training of the scales of packed numbers."""
        by_effort = {"fast": 0, "balanced": 0, "best": 131072}
        return by_effort[self.effort] if self.tune_tokens is None else self.tune_tokens


@dataclass(frozen=True)
class MainConfig:
    """The main job: load, calibrate, plan, convert, evaluate, look inside, report."""

    llama_dir: Path | None = None
    """Folder or .gguf file of a Llama checkpoint; default: the embedded SmolLM2-135M-Instruct."""
    sae_dir: Path | None = None
    """Folder of sparse autoencoders (sparsify, SAELens or Llama Scope) to compare features with."""
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
    """Folder of the sparse autoencoders that --steer names features of."""
    steer: str = ""
    """Features to push, as block:feature:amount, for instance 7:1234:+8,9:55:-3."""

    def __post_init__(self) -> None:
        if self.edits() and self.sae_dir is None:
            raise UsageError("needs --sae_dir", where="--steer", found=self.steer)
        _require_positive("--max_new_tokens", self.max_new_tokens, least=1)
        _require_share("--top_p", self.top_p)
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
class LensConfig:
    """Which features of sparse autoencoders survive in a model that was converted before.

    Reads a text with the dense and the converted model and leaves lens.json and, per autoencoder,
    features/<place>.html, .json and .safetensors. For instance:
    main.py lens --model runs/mine --sae_dir saes --hookpoints 9 20 --out runs/mine_lens
    """

    model: Path
    """Folder of a finished run, or of a converted checkpoint."""
    sae_dir: Path
    """Folder of sparse autoencoders (sparsify, SAELens or Llama Scope)."""
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
    out: Path = Path("runs/lens")
    """Output folder; a second run with the same settings resumes it."""
    device: Device = "auto"
    """Where to run."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        _require_positive("--eval_tokens", self.eval_tokens, least=2)
        _require_positive("--reach", self.reach, least=1)
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


def _require_share(flag: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UsageError(
            "not a share",
            where=flag,
            expected="a number in (0, 1]",
            found=value,
            hint=f"for instance {flag} 0.8",
        )


def _require_positive(flag: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError("too small", where=flag, expected=f"at least {least}", found=value)
