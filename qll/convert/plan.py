"""The plan: which matrix becomes which network at which ranks, under one budget.

Plain data between the planner and the fit: JSON that a person can edit and pass back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from qll import store
from qll.convert.candidates import stored_bits
from qll.convert.sensitivity import Sensitivity
from qll.convert.units import Unit, matrix_shapes
from qll.errors import ConfigError
from qll.tn import require_valid, tensor_shapes
from qll.tn.network import NetworkSpec
from qll.tn.packed import BITS, Packing


@dataclass(frozen=True)
class PlanEntry:
    """One unit and what it becomes; spec None leaves it dense. loss: predicted, of its metric.

    bits: width of its numbers as integers; 0 leaves that to --bits.
    """

    unit: Unit
    spec: NetworkSpec | None
    loss: float
    bits: int = 0

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
            **({"bits": self.bits} if self.bits else {}),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PlanEntry:
        """The entry written by `to_json`; the counts are computed anew."""
        unit = Unit(tuple(value["members"]), tuple(tuple(shape) for shape in value["shapes"]))
        spec = None if value["spec"] is None else NetworkSpec.from_json(value["spec"])
        if spec is not None:
            require_valid(spec, where=unit.name)
        bits = value.get("bits", 0)
        if type(bits) is not int or bits not in (0, *BITS):
            raise ConfigError(
                "not a width of integers",
                where=unit.name,
                expected=f"bits of {', '.join(map(str, BITS))}, or 0 for none of its own",
                found=bits,
            )
        return cls(unit, spec, float(value["predicted_loss"]), bits)


@dataclass(frozen=True)
class BitBudget:
    """A budget in bits: how many per weight of the block linears, numbers per shared scale."""

    per_weight: float
    group: int


@dataclass(frozen=True)
class Plan:
    """Entries in model order, and what they were chosen under."""

    entries: tuple[PlanEntry, ...]
    keep: float
    metric: str
    budget: int
    measured: tuple[Sensitivity, ...] = ()
    """The groups of cuts whose loss was measured, on the way to the entries."""
    bits: BitBudget | None = None
    """Where the budget counts stored bits and not numbers."""

    def of_block(self, block: int | None) -> list[PlanEntry]:
        """Entries of one block; None: embedding and head."""
        return [entry for entry in self.entries if entry.unit.block == block]

    @property
    def block_params(self) -> int:
        """Numbers stored for all block linears."""
        return sum(entry.params for entry in self.entries if entry.unit.block is not None)

    @property
    def size(self) -> int:
        """What all block linears take of the budget: numbers, or stored bits."""
        if self.bits is None:
            return self.block_params
        return sum(
            stored_bits(entry.unit, entry.spec, Packing(entry.bits, self.bits.group))
            for entry in self.entries
            if entry.unit.block is not None
        )

    @property
    def size_unit(self) -> str:
        """What the budget counts."""
        return "parameters" if self.bits is None else "bits"

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` is its inverse."""
        return {
            "keep": self.keep,
            "metric": self.metric,
            "budget": self.budget,
            "block_params": self.block_params,
            "measured": [asdict(line) for line in self.measured],
            **({} if self.bits is None else {"bits": asdict(self.bits)}),
            "entries": [entry.to_json() for entry in self.entries],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """The plan written by `to_json`, perhaps edited."""
        entries = tuple(PlanEntry.from_json(entry) for entry in value["entries"])
        measured = tuple(Sensitivity(**line) for line in value.get("measured", ()))
        sizes = (value["keep"], value["metric"], value["budget"])
        bits = BitBudget(**value["bits"]) if "bits" in value else None
        _require_widths(entries, bits)
        return cls(entries, *sizes, measured, bits)

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        store.write_json(path, self.to_json())


def load_plan(path: Path, config: LlamaConfig | None = None) -> Plan:
    """The plan saved at `path`, perhaps edited by hand.

    Raises ConfigError when it is not a plan or holds an impossible network and, given the `config`
    of a model, when its entries are not that model's matrices, each once.
    """
    try:
        plan = Plan.from_json(store.read_json(path))
    except ConfigError as error:
        raise ConfigError(f"impossible entry: {error}", where=path) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            "not a plan", where=path, found=repr(error), hint="write one with `qll plan`"
        ) from None
    if config is not None:
        _require_matrices(plan, config, path)
    return plan


def _require_widths(entries: Sequence[PlanEntry], bits: BitBudget | None) -> None:
    """A width of its own for every block linear where the budget counts bits."""
    for entry in entries:
        if bits is not None and entry.unit.block is not None and not entry.bits:
            raise ConfigError(
                "an entry without a width, in a plan whose budget counts bits",
                where=entry.unit.name,
                expected=f"bits of {', '.join(map(str, BITS))}",
                found="none",
            )


def _require_matrices(plan: Plan, config: LlamaConfig, path: Path) -> None:
    """Every matrix of the model once, with its shape, in a network of that shape."""
    wanted = matrix_shapes(config)
    pairs = [
        pair
        for entry in plan.entries
        for pair in zip(entry.unit.members, entry.unit.shapes, strict=True)
    ]
    found = dict(pairs)
    if found != wanted or len(pairs) != len(found):
        differing = sorted(dict(set(found.items()) ^ set(wanted.items())))
        raise ConfigError(
            "the entries are not the matrices of the model, each once",
            where=path,
            found=", ".join(differing[:3]) or "a matrix in two entries",
            hint="edit formats and ranks only, or write a new plan with `qll plan`",
        )
    for entry in plan.entries:
        shape = (sum(out for out, _ in entry.unit.shapes), entry.unit.shapes[0][1])
        joint = entry.unit.shapes if len(entry.unit.members) > 1 else ()
        if entry.spec is not None and (entry.spec.shape, entry.spec.members) != (shape, joint):
            raise ConfigError(
                "network of another shape than its matrices",
                where=f"{path}: {entry.unit.name}",
                expected=shape,
                found=entry.spec.shape,
            )
