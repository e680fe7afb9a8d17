"""The plan: which matrix becomes which network at which ranks, under one budget.

Plain data between the planner and the fit: JSON that a person can edit and pass back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qll import store
from qll.convert.units import Unit
from qll.errors import ConfigError
from qll.tn import tensor_shapes
from qll.tn.network import NetworkSpec


@dataclass(frozen=True)
class PlanEntry:
    """One unit and what it becomes; spec None leaves it dense. loss: predicted, of its metric."""

    unit: Unit
    spec: NetworkSpec | None
    loss: float

    @property
    def params(self) -> int:
        """Numbers stored for the unit."""
        return self.unit.dense_params if self.spec is None else tensor_shapes(self.spec).num_params

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the counts beside the choice."""
        return {
            "members": list(self.unit.members),
            "shapes": [list(shape) for shape in self.unit.shapes],
            "format": "dense" if self.spec is None else self.spec.format,
            "spec": None if self.spec is None else self.spec.to_json(),
            "predicted_loss": self.loss,
            "params": self.params,
            "params_dense": self.unit.dense_params,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PlanEntry:
        """The entry written by `to_json`; the counts are computed anew."""
        unit = Unit(tuple(value["members"]), tuple(tuple(shape) for shape in value["shapes"]))
        spec = None if value["spec"] is None else NetworkSpec.from_json(value["spec"])
        return cls(unit, spec, float(value["predicted_loss"]))


@dataclass(frozen=True)
class Plan:
    """Entries in model order, and what they were chosen under."""

    entries: tuple[PlanEntry, ...]
    keep: float
    metric: str
    budget: int

    def of_block(self, block: int | None) -> list[PlanEntry]:
        """Entries of one block; None: embedding and head."""
        return [entry for entry in self.entries if entry.unit.block == block]

    @property
    def block_params(self) -> int:
        """Numbers stored for all block linears."""
        return sum(entry.params for entry in self.entries if entry.unit.block is not None)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` is its inverse."""
        return {
            "keep": self.keep,
            "metric": self.metric,
            "budget": self.budget,
            "block_params": self.block_params,
            "entries": [entry.to_json() for entry in self.entries],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """The plan written by `to_json`, perhaps edited."""
        entries = tuple(PlanEntry.from_json(entry) for entry in value["entries"])
        return cls(entries, value["keep"], value["metric"], value["budget"])

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        store.write_json(path, self.to_json())


def load_plan(path: Path) -> Plan:
    """The plan saved at `path`; raises ConfigError when it is not one."""
    try:
        return Plan.from_json(store.read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "not a plan", where=path, found=repr(error), hint="write one with `qll plan`"
        ) from None
