"""The logits fingerprint of a converted folder with one block in memory at a time.

Every key and shape is checked on the way, as opening the whole model would; 16 tokens and 16
columns of logits need only those rows of embedding and head. For folders that are large beside the
memory at hand.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qll.errors import IntegrityError
from qll.model.blocks import build_network_block, run_block
from qll.model.dense import assign
from qll.model.fingerprint import fixed_places, recorded
from qll.model.stored import StoredModel
from qll.model.swap import EMBEDDING, HEAD, stored_shapes

LARGE = 4 << 30  # bytes of tensors from which on a folder is not held whole
NORM = "model.norm.weight"
BLOCK = re.compile(r"model\.layers\.(\d+)\.")


def is_large(folder: Path) -> bool:
    """Whether the folder is to be read block by block; packed ones are small and never are."""
    stored = StoredModel(folder)
    if stored.config.packings:
        return False
    return sum(file.stat().st_size for file in set(stored.files.values())) > LARGE


@torch.no_grad()
def streamed_fingerprint(folder: Path) -> dict[str, Any]:
    """`logits_fingerprint` of the model in `folder`, computed in float32.

    Raises IntegrityError, MissingTensorError or ShapeError when the tensors are not those that
    config.json asks for, NonFiniteError for NaN logits.
    """
    stored = StoredModel(folder)
    config = stored.config
    _require_rest(stored)
    ids, columns = fixed_places(config.vocab_size)
    hidden = _rows(stored, EMBEDDING, ids)[None]
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        names = [name for name in stored.files if name.startswith(prefix)]
        entries = {
            members: spec
            for members, spec in config.entries.items()
            if members[0].startswith(prefix)
        }
        tensors = {name: stored.read(name) for name in names}
        block = build_network_block(config, index, entries, tensors)
        del tensors
        hidden = run_block(block, hidden)
    with torch.device("meta"):
        norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    assign(norm, {"weight": stored.read(NORM).float()}, where=str(folder))
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    return recorded(norm(hidden)[0] @ _rows(stored, head, columns).T, "float32", where=folder)


def _rows(stored: StoredModel, path: str, ids: list[int]) -> Float[Tensor, "ids d_model"]:
    """Rows `ids` of embedding or head; the table is not read."""
    if path in stored.entries:
        return stored.network(path).rows(torch.tensor(ids)).float()
    name = f"{path}.weight"
    with safe_open(stored.files[name], framework="pt") as file:
        table = file.get_slice(name)
        return torch.cat([table[row : row + 1] for row in ids]).float()


def _require_rest(stored: StoredModel) -> None:
    """Raise IntegrityError unless what lies outside the known blocks is what the config asks for;
    the blocks themselves are checked when they are built."""
    config, layers = stored.config, stored.config.num_hidden_layers
    paths = [EMBEDDING] if config.tie_word_embeddings else [EMBEDDING, HEAD]
    wanted = {NORM: (config.hidden_size,)}
    for path in paths:
        if path in stored.entries:
            wanted |= stored_shapes(*stored.entries[path])
        else:
            wanted[f"{path}.weight"] = (config.vocab_size, config.hidden_size)
    found = {
        name for name in stored.files if not (match := BLOCK.match(name)) or int(match[1]) >= layers
    }
    if different := sorted(found ^ set(wanted)):
        missing = different[0] in wanted
        raise IntegrityError(
            "tensor is missing" if missing else "tensor has no place in this architecture",
            where=f"{stored.folder}: {different[0]}",
            hint="convert again",
        )
    for name, shape in wanted.items():
        with safe_open(stored.files[name], framework="pt") as file:
            held = tuple(file.get_slice(name).get_shape())
        if held != shape:
            raise IntegrityError(
                "tensor has the wrong shape",
                where=f"{stored.folder}: {name}",
                expected=shape,
                found=held,
            )
