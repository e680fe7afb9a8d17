"""Settings of `qll lm generate`, `monitor` and `compare`; the docstring under a field is its help.

No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qll.bytelm.sampling import SamplingOptions
from qll.errors import UsageError
from qll.options import Device, require_positive


@dataclass(frozen=True)
class LmGenerateConfig:
    """Continue a prompt with a byte model, printing characters as they come."""

    prompt: str
    """Text to continue."""
    model: Path | None = None
    """Run folder of `lm train`, or the model/ in it."""
    checkpoint: Path | None = None
    """Another name of --model."""
    max_new_tokens: int = 256
    """Bytes to write at most."""
    candidates: int = 1
    """Write so many continuations and print the best: likely, about the prompt, not repeating."""
    slide: bool = False
    """Take a prompt longer than the model's window: all of it where the model has recurrent parts,
    else its end."""
    language: str = ""
    """Language of the text, for a model that was trained with --languages; default: none."""
    seed: int = 0
    """Seed of the sampling."""
    device: Device = "auto"
    """Where to run."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        require_positive("--max_new_tokens", self.max_new_tokens, least=1)
        require_positive("--candidates", self.candidates, least=1)
        if (self.model is None) == (self.checkpoint is None):
            raise UsageError(
                "needs a folder, by one of its two names",
                where="--model",
                hint="give the --out folder of `lm train`",
            )

    @property
    def folder(self) -> Path:
        """Where the model is."""
        return self.model or self.checkpoint


@dataclass(frozen=True)
class LmMonitorConfig:
    """Watch a run of `lm train`: live in a terminal until it ends, once anywhere else."""

    run: Path
    """Its --out folder."""
    every: float = 2.0
    """Seconds between two looks."""

    def __post_init__(self) -> None:
        if not 0.1 <= self.every <= 3600:
            raise UsageError(
                "out of range", where="--every", expected="0.1 to 3600", found=self.every
            )


@dataclass(frozen=True)
class LmCompareConfig:
    """Byte models side by side on the same prompts and seeds: bits per byte and repetition."""

    models: tuple[Path, ...]
    """Run folders of `lm train`, two or more; differences are against the first."""
    prompts: Path | None = None
    """UTF-8 file with a prompt per line; default: ten that come with the program."""
    max_new_tokens: int = 256
    """Bytes to write per prompt at most."""
    seed: int = 0
    """Seed of the sampling; prompt number n is continued with seed + n by every model."""
    texts: bool = False
    """Print what was written too."""
    json: bool = False
    """Print everything as JSON instead of tables."""
    device: Device = "auto"
    """Where to run."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        require_positive("--max_new_tokens", self.max_new_tokens, least=1)
        if len(self.models) < 2:
            raise UsageError("needs two folders or more", where="--models", found=len(self.models))
