"""The whole state of a run in one safetensors file: tensors by group, facts as JSON beside them.

Written atomically and read without pickle. The model's config is among the facts, since a model
that grows is not the one the run began with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qll import store
from qll.errors import IntegrityError

Groups = dict[str, dict[str, Tensor]]
VERSION = 2


def write_checkpoint(path: Path, groups: Mapping[str, Mapping[str, Tensor]], facts: Any) -> None:
    """Replace `path` by the tensors of `groups` and the JSON value `facts`.

    Tensors that share memory (tied weights) are written as often as they are named.
    """
    tensors = {
        f"{group}/{name}": tensor.detach().to("cpu", copy=True)
        for group, members in groups.items()
        for name, tensor in members.items()
    }
    text = json.dumps({"version": VERSION, "facts": facts}, allow_nan=False)
    store.write_tensors(path, tensors, {"qll": text})


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[Groups, Any]:
    """The groups and the facts of `path`; raises IntegrityError for a file that is not whole.

    >>> import tempfile; path = Path(tempfile.mkdtemp()) / "state"
    >>> write_checkpoint(path, {"model": {"w": torch.ones(2)}}, {"step": 3})
    >>> groups, facts = read_checkpoint(path)
    >>> groups["model"]["w"].tolist(), facts
    ([1.0, 1.0], {'step': 3})
    """
    groups: Groups = {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            value = json.loads((file.metadata() or {})["qll"])
            for full in file.keys():  # noqa: SIM118
                group, _, name = full.partition("/")
                groups.setdefault(group, {})[name] = file.get_tensor(full)
        if value["version"] != VERSION:
            raise ValueError(f"version {value['version']}")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            "not a checkpoint of a run",
            where=path,
            found=str(error),
            hint="delete it to start the run again from its first step",
        ) from None
    return groups, value["facts"]
