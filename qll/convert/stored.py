"""Where conversion and training leave the tensors of a unit before they become shards.

cores/<unit>.safetensors          the closed form
cores/<unit>.packed.safetensors   as integers, under --bits
<trained>/block.NNNN.safetensors  everything of a block that training moved, norms too
"""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Shaped
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qll.convert.plan import PlanEntry
from qll.errors import IntegrityError

Tensors = dict[str, Shaped[Tensor, "..."]]


def unit_path(cores: Path, entry: PlanEntry, *, packed: bool = False) -> Path:
    """The file of one unit in the folder of the cores."""
    return cores / f"{entry.unit.name}{'.packed' if packed else ''}.safetensors"


def trained_path(trained: Path, block: int | None) -> Path:
    """The file of the trained tensors of a block, or of what is in none."""
    name = "rest.safetensors" if block is None else f"block.{block:04d}.safetensors"
    return trained / name


def unit_tensors(cores: Path, trained: Path | None, entry: PlanEntry) -> Tensors:
    """The tensors of one unit by name: the closed form, or what training made of it."""
    tensors = load_file(unit_path(cores, entry))
    return with_trained(tensors, trained, entry.unit.block)


def with_trained(tensors: Tensors, trained: Path | None, block: int | None) -> Tensors:
    """`tensors` of a block, each replaced by what training left under its name, if anything.

    Raises IntegrityError when the trained tensor has another shape.
    """
    if trained is None or not (path := trained_path(trained, block)).is_file():
        return tensors
    with safe_open(path, framework="pt") as file:
        changed = {name: file.get_tensor(name) for name in file.keys() if name in tensors}  # noqa: SIM118
    for name, tensor in changed.items():
        if tensor.shape != tensors[name].shape:
            raise IntegrityError(
                "trained tensor of another plan",
                where=f"{path}: {name}",
                expected=tuple(tensors[name].shape),
                found=tuple(tensor.shape),
                hint="delete the work folder of the run and start it again",
            )
    return tensors | changed
