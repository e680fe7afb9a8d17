"""What the budget bought: a plan as text, and predicted beside measured losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qll.convert import Plan
from qll.report import units
from qll.report.layout import table

LOSS_HEADER = ("loss of the first plan's cuts", "blocks", "predicted", "measured KL", "ratio")


def plan_text(plan: Plan) -> str:
    """One line per entry (what it becomes, its width, share of its parameters kept, predicted
    loss), the measured losses, and the sums."""
    rows = []
    for entry in plan.entries:
        spec = entry.spec
        shape = "dense" if spec is None else f"{spec.format} {list(spec.ranks)}"
        share = entry.params / entry.unit.dense_params
        bits = str(entry.bits) if entry.bits else ""
        rows.append((entry.unit.name, shape, bits, f"{share:.3f}", f"{entry.loss:.3e}"))
    loss = sum(entry.loss for entry in plan.entries)
    lines = [
        *table(("unit", "becomes", "bits", "kept", "loss"), rows),
        "",
        *loss_table([asdict(line) for line in plan.measured]),
        f"{plan.size:,} {plan.size_unit} of {plan.budget:,}, predicted loss {loss:.4f}",
    ]
    return "\n".join(lines)


def loss_table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table of the groups that were measured, with their sums; [] without any.

    >>> line = {"kind": "a", "first": 0, "last": 4, "predicted": 0.1, "measured": 0.2}
    >>> loss_table([line])[2].split()
    ['a', '0-4', '0.1000', '0.2000', '2.00']
    """
    return table(LOSS_HEADER, [tuple(row.values()) for row in losses(lines)])


def losses(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The measured groups as texts, nats per token, and their sum."""
    if not lines:
        return []
    predicted, measured = (sum(line[key] for line in lines) for key in ("predicted", "measured"))
    total = {"kind": "sum", "first": None, "predicted": predicted, "measured": measured}
    return [
        {
            "kind": line["kind"],
            "blocks": "" if line["first"] is None else f"{line['first']}-{line['last']}",
            "predicted": units.number(line["predicted"]),
            "measured": units.number(line["measured"]),
            "ratio": units.rounded(units.ratio(line["predicted"], line["measured"])),
        }
        for line in (*lines, total)
    ]
