"""The settings of `qll sae train`; the docstring under a field is its --help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qll.errors import UsageError
from qll.options import Device

Kind = Literal["topk", "multitopk", "jumprelu", "transcoder"]
MOST_DEAD_AFTER = 10_000_000  # tokens; the habit of long runs


@dataclass(frozen=True)
class JumpReLUOptions:
    """What only --kind jumprelu has."""

    l0_weight: float = 1.0
    """Weight of (L0 / k - 1)^2 in the loss."""
    bandwidth: float = 0.05
    """Width of the window around a threshold in which it learns, in units of the activations' root
    mean square distance from their centre."""

    def __post_init__(self) -> None:
        _require("--l0_weight", 0 <= self.l0_weight < float("inf"), "at least 0", self)
        _require("--bandwidth", 0 < self.bandwidth < float("inf"), "above 0", self)


@dataclass(frozen=True)
class LearningOptions:
    """How an autoencoder learns; the defaults suit a few million tokens."""

    rate: float = 4e-3
    """Highest learning rate of Adam; it warms up over 4 % of the tokens, then falls to 0."""
    batch_tokens: int = 1024
    """Tokens per step, about; a short run gains more from many steps than from large ones."""
    context: int = 512
    """Tokens per window of text."""
    buffer_tokens: int = 65536
    """Tokens whose activations are held in memory and shuffled; less where they would not fit."""
    passes: int = 4
    """Times that all activations in memory are learned from; on a CPU most of the time goes into
    making them."""
    center: Literal["geometric_median", "mean"] = "geometric_median"
    """What b_dec starts as, of the activations of the first buffer."""
    auxk: float = 1 / 32
    """Weight of the AuxK loss, in which dead features learn what the others leave; 0 is without."""
    dead_after: int | None = None
    """Tokens without firing after which a feature is dead (after twice as many it starts anew);
    default: an eighth of --tokens, at most 10,000,000."""
    skip: bool = False
    """Give a transcoder a linear path from input to output beside its features."""
    eval_tokens: int = 16384
    """Held-out tokens to measure FVU, L0, dead features and CE score on; 0 does not measure."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the saved weights."""
    jumprelu: JumpReLUOptions = field(default_factory=JumpReLUOptions)

    def __post_init__(self) -> None:
        least = {"batch_tokens": 1, "context": 2, "buffer_tokens": 1, "passes": 1}
        for name, number in least.items():
            _require(f"--{name}", getattr(self, name) >= number, f"at least {number}", self)
        _require("--rate", 0 < self.rate < float("inf"), "above 0", self)
        for name in ("auxk", "eval_tokens"):
            _require(f"--{name}", 0 <= getattr(self, name) < float("inf"), "at least 0", self)
        if self.dead_after is not None:
            _require("--dead_after", self.dead_after >= 1, "at least 1", self)


@dataclass(frozen=True)
class SAETrainConfig:
    """Train sparse autoencoders on what passes through a Llama, several places in one pass.

    Leaves OUT/<hookpoint>/ in the layout of EleutherAI's sparsify (jumprelu, which that has not, in
    SAELens'), OUT/metrics.jsonl and OUT/training.json. A killed run resumes and ends with the same
    bytes. Place the result with --sae_dir OUT.
    """

    llama_dir: Path | None = None
    """Folder or .gguf file of a Llama checkpoint; default: the embedded SmolLM2-135M-Instruct."""
    text: tuple[Path, ...] = ()
    """UTF-8 files to train on, mixed by length; default: half of the topics in Python's pydoc_data.
    The last windows of each are held out."""
    hookpoints: tuple[str, ...] = ()
    """Places, for instance layers.9 layers.20, or layers.9.mlp (a transcoder predicts the output of
    that module from its input); default: the block in the middle."""
    out: Path = Path("runs/sae")
    """Output folder; a second run with the same settings resumes it."""
    tokens: int = 2_000_000
    """Tokens of text to read; a shorter text is read several times."""
    kind: Kind = "topk"
    """topk; multitopk (good at several k); jumprelu (a threshold per feature, k on average);
    transcoder (topk)."""
    expansion: int = 8
    """Features per dimension of the input."""
    k: int = 32
    """Features per token."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the big matrix products; auto: bfloat16 where it is fast."""
    device: Device = "auto"
    """Where to run."""
    seed: int = 0
    """Seed of everything random."""
    learning: LearningOptions = field(default_factory=LearningOptions)

    def __post_init__(self) -> None:
        for name in ("tokens", "expansion", "k"):
            _require(f"--{name}", getattr(self, name) >= 1, "at least 1", self)
        _require("--tokens", self.tokens >= self.learning.context, "at least --context", self)
        if self.learning.skip and self.kind != "transcoder":
            raise UsageError("only a transcoder has one", where="--skip", found=self.kind)
        if len(set(self.hookpoints)) < len(self.hookpoints):
            raise UsageError(
                "names a place twice", where="--hookpoints", found=" ".join(self.hookpoints)
            )
        for path in self.text:
            if not path.is_file():
                raise UsageError(
                    "no such file", where="--text", found=path, hint="give the path of a text"
                )

    @property
    def dead_after(self) -> int:
        """Tokens without firing after which a feature is dead."""
        default = min(MOST_DEAD_AFTER, max(1, self.tokens // 8))
        return default if self.learning.dead_after is None else self.learning.dead_after


def _require(flag: str, fits: bool, expected: str, options: Any) -> None:
    if not fits:
        found = getattr(options, flag.removeprefix("--"))
        raise UsageError("out of range", where=flag, expected=expected, found=found)
