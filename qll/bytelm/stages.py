"""A curriculum: the parts of a run, one after the other, as shares of it.

A stage may change the weights of the losses and the width of the model; growing keeps the function,
so that learning goes on where it was. No torch here.

>>> [stage.name for stage in stages_of("seed")][:2]
['phase_alignment', 'local_interference']
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qll.bytelm.config import LossConfig
from qll.errors import UsageError

# losses that a stage may switch on
OPTIONAL = ("coherence", "interference", "entanglement", "unlikelihood")


@dataclass(frozen=True)
class Stage:
    """One part of a run."""

    name: str
    share: float = 1.0
    """How long it is, in proportion to the others."""
    losses: tuple[tuple[str, float], ...] = ()
    """Weights that replace those of the run, by name of the loss."""
    scale: float = 1.0
    """What the run's weights of other losses are multiplied by."""
    d_model: int | None = None
    """Channels of the model from here on; default: as before."""

    def weights(self, losses: LossConfig) -> LossConfig:
        """The losses of the run `losses` in this stage.

        >>> Stage("language", scale=0.0).weights(LossConfig(coherence=0.1)).coherence
        0.0
        """
        scaled = {name: getattr(losses, name) * self.scale for name in OPTIONAL}
        return dataclasses.replace(losses, **(scaled | dict(self.losses)))


STAGES: dict[str, tuple[Stage, ...]] = {
    "language_first": (Stage("language", 0.7, scale=0.0), Stage("structure", 0.3)),
    # epochs and weights of the founding document, its energies with the right sign
    "seed": (
        Stage("phase_alignment", 2.0, (("interference", 0.001), ("coherence", 0.02))),
        Stage("local_interference", 3.0, (("interference", 0.02), ("coherence", 0.005))),
        Stage("global_interference", 4.0, (("interference", 0.015), ("coherence", 0.01))),
        Stage("concept_learning", 5.0, (("interference", 0.01), ("coherence", 0.005))),
    ),
    "growth": (
        Stage("256 channels", 0.4, d_model=256),
        Stage("512 channels", 0.3, d_model=512),
        Stage("768 channels", 0.3, d_model=768),
    ),
}


def stages_of(name: str) -> tuple[Stage, ...]:
    """The curriculum called `name`, or the one in the JSON file `name`.

    Raises UsageError when there is neither, or when the file is not a list of stages.
    """
    if name in STAGES:
        return STAGES[name]
    path = Path(name)
    if not path.is_file():
        raise UsageError(
            "no such curriculum",
            where="--stages",
            expected=f"{', '.join(STAGES)} or a JSON file",
            found=name,
        )
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _not_stages(name, str(error)) from None
    if not isinstance(value, list) or not value:
        raise _not_stages(name, "not a list")
    return tuple(_stage(name, item) for item in value)


def stage_at(stages: Sequence[Stage], share: float) -> int:
    """Which stage the run is in after `share` of it.

    >>> [stage_at(STAGES["language_first"], share) for share in (0.0, 0.69, 0.71, 1.0)]
    [0, 0, 1, 1]
    """
    total, done = sum(stage.share for stage in stages), 0.0
    for number, stage in enumerate(stages):
        done += stage.share / total
        if share < done - 1e-9:
            return number
    return len(stages) - 1


def beginnings(stages: Sequence[Stage], losses: LossConfig) -> dict[str, float]:
    """The share of the run after which each of the OPTIONAL losses is first on, by name.

    >>> beginnings(STAGES["language_first"], LossConfig(coherence=0.1))
    {'coherence': 0.7}
    """
    total, before, found = sum(stage.share for stage in stages), 0.0, {}
    for stage in stages:
        weights = stage.weights(losses)
        for name in OPTIONAL:
            if getattr(weights, name):
                found.setdefault(name, before)
        before += stage.share / total
    return found


def all_losses(stages: Sequence[Stage], losses: LossConfig) -> LossConfig:
    """The run's `losses` with the largest weight that each has in any stage.

    >>> all_losses(STAGES["seed"], LossConfig()).coherence
    0.02
    """
    found = [dataclasses.asdict(stage.weights(losses)) for stage in stages]
    names = [name for name, value in found[0].items() if isinstance(value, float)]
    return dataclasses.replace(losses, **{name: max(f[name] for f in found) for name in names})


def _stage(name: str, item: Any) -> Stage:
    known = {field.name for field in dataclasses.fields(Stage)}
    if not isinstance(item, dict) or "name" not in item or set(item) - known:
        raise _not_stages(name, str(item))
    losses = item.get("losses", {})
    if not isinstance(losses, dict):
        raise _not_stages(name, str(losses))
    try:
        LossConfig(**losses)  # names and numbers are checked there
    except TypeError as error:
        raise _not_stages(name, str(error)) from None
    numbers = {"share": item.get("share", 1.0), "scale": item.get("scale", 1.0)}
    for key, value in numbers.items():
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            raise _not_stages(name, f"{key} {value}")
    if not numbers["share"]:
        raise _not_stages(name, "share 0")
    width = item.get("d_model")
    if width is not None and (type(width) is not int or width < 1):
        raise _not_stages(name, f"d_model {width}")
    weights = tuple((key, float(value)) for key, value in losses.items())
    return Stage(
        str(item["name"]), float(numbers["share"]), weights, float(numbers["scale"]), width
    )


def _not_stages(name: str, found: str) -> UsageError:
    return UsageError(
        "not a list of stages",
        where=name,
        expected='[{"name": "language", "share": 0.7, "scale": 0}, ...]',
        found=found,
    )
