"""What a conversion is told: how weights become networks, on which texts, and what is trained.

Frozen dataclasses whose values are checked here; the docstring under a field is its --help.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    """Tensor network of every block linear; auto chooses among dense, --singles and --sharing."""
    sharing: Literal["none", "bonds", "inner", "all"] = "inner"
    """Formats of several matrices offered by auto: joint_tree (bonds), fewer channels between them
    (inner: joint_channels, joint_value_output, joint_query_key), both, or neither."""
    singles: Literal["auto", "dense", "lowrank", "panels"] = "auto"
    """What --format auto may make of one matrix: leave it whole, also low rank, or also panels
    (rows or columns in groups with ranks of their own, refitted in --sweeps); auto: low rank, with
    --effort best panels too. With dense every matrix is one product, also those inside --sharing
    formats: the fastest where starting a product costs as much as reading a small matrix, at a
    higher loss."""
    metric: Literal["kfac", "activation", "plain"] = "kfac"
    """Norm in which weights are truncated: K-FAC (inputs and output gradients), inputs, or none."""
    labels: Literal["sampled", "text"] = "sampled"
    """Next tokens whose loss K-FAC takes gradients of: drawn from the model (true Fisher matrix)
    or those of the text (empirical)."""
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
    bits_per_weight: float = 0.0
    """Budget in stored bits per weight of the block linears, scales and all (3.5, say), in place of
    --keep and --bits: every matrix becomes what loses least at 2, 3, 4 or 8 bits; 0: none."""
    bits_group: int = 32
    """Numbers that share a scale of 16 bits under --bits and --bits_per_weight."""

    def __post_init__(self) -> None:
        require_share("--keep", self.keep)
        require_share("--keep_embeddings", self.keep_embeddings)
        if not 0 <= self.outliers < 1:
            raise UsageError(
                "not a share", where="--outliers", expected="in [0, 1)", found=self.outliers
            )
        self._require_one_budget()
        require_positive("--sites", self.sites, least=2)
        require_positive("--bits_group", self.bits_group, least=1)
        require_positive("--sweeps", self.sweeps, least=0)
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
        has_sharing = self.sharing in ("inner", "all") and self.allocation == "global"
        if self.singles == "dense" and not has_sharing:
            raise UsageError(
                "nothing is left that could shrink",
                where="--singles dense",
                expected="--sharing inner or all, and --allocation global",
                found=f"--sharing {self.sharing} --allocation {self.allocation}",
            )

    @property
    def is_packed(self) -> bool:
        """Whether the block linears are stored as integers."""
        return bool(self.bits or self.bits_per_weight)

    @property
    def is_exact(self) -> bool:
        """Whether the numbers stay those of the dense model, up to their packing."""
        return self.keep == 1.0 and not self.bits_per_weight

    def _require_one_budget(self) -> None:
        if self.bits_per_weight == 0:
            return
        if not 0 < self.bits_per_weight < float("inf"):
            raise UsageError(
                "not a number of bits",
                where="--bits_per_weight",
                expected="a finite number above 0",
                found=self.bits_per_weight,
                hint="for instance --bits_per_weight 3.5",
            )
        others = {
            f"--keep {self.keep}": self.keep not in (ConvertOptions.keep, 1.0),
            f"--bits {self.bits}": self.bits,
            f"--allocation {self.allocation}": self.allocation != "global",
            f"--losses {self.losses}": self.losses == "measured",
            f"--outliers {self.outliers}": self.outliers,
        }
        if found := [flag for flag, is_given in others.items() if is_given]:
            raise UsageError(
                "a budget of bits, and what knows only one of numbers",
                where="--bits_per_weight",
                expected="neither --keep nor --bits, --allocation global, --losses predicted or "
                "depth, no --outliers",
                found=" ".join(found),
                hint=f"leave out {' and '.join(flag.split()[0] for flag in found)}",
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
            require_positive(f"--{name}", getattr(self, name), least=2)
        require_positive("--prior_tokens", self.prior_tokens, least=0)
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
    """fast: no training; balanced: each block refined; best: refined longer, then healed, from a
    plan that has panels (--singles)."""
    refine_passes: int | None = None
    """Passes over the refinement windows per block (fast 0, balanced 2, best 4)."""
    refine_tokens: int = 65536
    """Tokens each block is refined on; one window in eight is held out."""
    refine_rate: float = 2e-4
    """Highest learning rate of the refinement."""
    heal_tokens: int | None = None
    """Tokens of distillation of the whole model (fast 0, balanced 0, best 196,608)."""
    heal_rate: float | None = None
    """Highest learning rate of the healing; default: twice the best one for a sixteenth of the
    steps, which is read off short runs at 3e-6, 1e-5, 3e-5 and 8e-5 (train/healing.py)."""
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
            require_positive(f"--{name}", getattr(self, name), least)
        for name in ("refine_passes", "heal_tokens", "tune_tokens"):
            if getattr(self, name) is not None:
                require_positive(f"--{name}", getattr(self, name), least=0)
        for name in ("refine_rate", "heal_rate", "tune_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < float("inf"):
                raise UsageError(
                    "not a learning rate",
                    where=f"--{name}",
                    expected="a finite number above 0",
                    found=rate,
                )

    @property
    def passes(self) -> int:
        """Passes of block refinement."""
        by_effort = {"fast": 0, "balanced": 2, "best": 4}
        return by_effort[self.effort] if self.refine_passes is None else self.refine_passes

    @property
    def healing(self) -> int:
        """Tokens of healing."""
        by_effort = {"fast": 0, "balanced": 0, "best": 196608}
        return by_effort[self.effort] if self.heal_tokens is None else self.heal_tokens

    @property
    def tuning(self) -> int:
        """Tokens of training of the scales of packed numbers."""
        by_effort = {"fast": 0, "balanced": 0, "best": 131072}
        return by_effort[self.effort] if self.tune_tokens is None else self.tune_tokens


@dataclass(frozen=True)
class ScaleOptions:
    """Who computes the factorisations; the bytes do not depend on it, but in their last bits on how
    many threads a factorisation has: all of the process, or --job_threads."""

    workers: int = 0
    """Processes of this machine that share the factorisations; 0: this process, all its threads."""
    dask: str | None = None
    """Address of a Dask scheduler (tcp://host:8786), or the path of its scheduler file, whose
    workers share the factorisations."""
    job_threads: int = 1
    """Threads of one factorisation under --workers or --dask. Last bits depend on it, but not on
    how many workers there are."""

    def __post_init__(self) -> None:
        require_positive("--workers", self.workers, least=0)
        require_positive("--job_threads", self.job_threads, least=1)
        if self.dask is not None and self.workers:
            raise UsageError(
                "either processes of this machine or workers of a scheduler",
                where="--workers",
                found=f"--workers {self.workers} --dask {self.dask}",
            )
        if self.dask is not None and "://" not in self.dask and not Path(self.dask).is_file():
            raise UsageError(
                "neither an address nor a scheduler file",
                where="--dask",
                expected="tcp://host:8786, or a file that `dask scheduler --scheduler-file` wrote",
                found=self.dask,
            )


def require_share(flag: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UsageError(
            "not a share",
            where=flag,
            expected="a number in (0, 1]",
            found=value,
            hint=f"for instance {flag} 0.8",
        )


def require_positive(flag: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError("too small", where=flag, expected=f"at least {least}", found=value)
