"""How the next byte is chosen, as settings; `samplers` is the mathematics. No torch here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from qll.errors import UsageError

Preset = Literal["conservative", "balanced", "creative"]
PRESETS: dict[str, dict[str, Any]] = {
    "conservative": {"temperature": 0.6, "top_k": 30, "top_p": 0.8},
    "balanced": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "creative": {"temperature": 0.8, "top_k": 100, "top_p": 0.95},
}
# least and most of each number but top_p, which must be above 0
LIMITS = {
    "temperature": (0, math.inf),
    "top_k": (0, math.inf),
    "min_p": (0, 1),
    "repetition_penalty": (1, math.inf),
    "repetition_window": (0, math.inf),
    "no_repeat_ngram": (0, math.inf),
    "dry": (0, math.inf),
    "dry_length": (1, math.inf),
    "entropy_cooling": (0, math.inf),
}


@dataclass(frozen=True)
class SamplingOptions:
    """How the next byte is chosen; a flag goes before the preset."""

    preset: Preset = "balanced"
    """temperature, top_k and top_p: 0.6, 30, 0.8 or 0.7, 50, 0.9 or 0.8, 100, 0.95."""
    temperature: float | None = None
    """0 always takes the most likely byte; default: the preset's."""
    top_k: int | None = None
    """Choose among so many most likely bytes, 0 for all; default: the preset's."""
    top_p: float | None = None
    """Choose from the fewest bytes with this much probability, in (0, 1]; default: the preset's."""
    min_p: float = 0.0
    """Leave out bytes less likely than this share of the most likely one, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divide the logits of recent bytes by this where positive, multiply where negative."""
    repetition_window: int = 64
    """Bytes that count as recent for --repetition_penalty."""
    no_repeat_ngram: int = 0
    """Never write a sequence of so many bytes twice; 0: allowed."""
    dry: float = 0.0
    """Strength of the penalty on bytes that would lengthen a repetition (DRY); 0: none."""
    dry_length: int = 12
    """Repetitions of up to so many bytes cost nothing."""
    entropy_cooling: float = 0.0
    """Lower the temperature where the model is sure: T * 0.8^(this / entropy in nats)."""

    def __post_init__(self) -> None:
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError("out of range", where="--top_p", expected="(0, 1]", found=self.top_p)
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            # NaN fails every comparison, and infinity the last
            if value is not None and not (least <= value <= most and value < math.inf):
                expected = f"a finite number of at least {least}"
                raise UsageError(
                    "out of range",
                    where=f"--{name}",
                    expected=expected if most == math.inf else f"from {least} to {most}",
                    found=value,
                )

    def resolved(self) -> SamplingOptions:
        """These options with the preset's values where none was given.

        >>> options = SamplingOptions("creative", top_k=5).resolved()
        >>> options.temperature, options.top_k, options.top_p
        (0.8, 5, 0.95)
        """
        given = {name: getattr(self, name) for name in PRESETS[self.preset]}
        values = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self, **{**PRESETS[self.preset], **values})
