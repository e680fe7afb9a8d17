"""A converted folder in layouts that need no package of ours.

`export_dense` writes a plain Llama folder: every network is multiplied out, and stock transformers,
vLLM or llama.cpp's converter open it. `export_two_linear` keeps low-rank matrices as two plain
Linears, for runtimes that can put two in the place of one:

    <path>.0.weight  [rank, in]   applied first
    <path>.1.weight  [out, rank]  applied second

Both write one shard per block, so memory holds one block.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig

from qll import store
from qll.errors import UsageError
from qll.load import expected_specs
from qll.model.files import write_index
from qll.model.folder import require_converted
from qll.model.stored import StoredModel

logger = logging.getLogger("qll.model")

PAIRS_NAME = "two_linear.json"
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Keys of the converted config that mean nothing to a plain Llama.
OWN_KEYS = ("quantization_config", "auto_map", "original_architecture", "qll_folded_norms")
PAIRS_CARD = """# {name} with low-rank matrices as pairs of Linears

`two_linear.json` lists them. Put this together with plain torch and transformers:

```python
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

folder = Path(folder)
plan = json.loads((folder / "two_linear.json").read_text())
config = LlamaConfig(**plan["llama_config"])
model = LlamaForCausalLM(config)
for path, pair in plan["modules"].items():
    first = torch.nn.Linear(pair["in"], pair["rank"], bias=False)
    second = torch.nn.Linear(pair["rank"], pair["out"], bias=False)
    model.set_submodule(path, torch.nn.Sequential(first, second))
weights = {{}}
for file in plan["files"]:
    weights |= load_file(folder / file)
if config.tie_word_embeddings:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
model.load_state_dict(weights, strict=True)
```
"""


def export_dense(folder: str | Path, out: str | Path) -> Path:
    """Write the converted `folder` as a plain Llama folder `out`, in the same dtype; returns `out`.

    Raises IntegrityError for a folder that does not match its manifest, UsageError when `out` is
    not an empty or new folder of its own.
    """
    stored, out = _open(folder, out)
    config = _plain_config(stored) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    store.write_json(out / "config.json", config)
    _copy(stored.folder, out)

    def tensors(name: str) -> dict[str, Tensor]:
        return {name: stored.tensor(name)}

    _write_shards(stored, out, tensors)
    _finish(stored, out)
    return out


def export_two_linear(folder: str | Path, out: str | Path) -> Path:
    """Write the converted `folder` into `out` with low-rank matrices as pairs; returns `out`.

    Any other network is multiplied out, with a warning, and so is a low-rank embedding, which is
    not a Linear. `two_linear.json` lists the pairs, README.md assembles them; transformers refuses
    the folder, because it would invent the missing weights. Errors as `export_dense`.
    """
    stored, out = _open(folder, out)
    pairs = {path: _pair_facts(stored, path) for path in stored.entries if _is_pair(stored, path)}
    for path in sorted(stored.entries.keys() - pairs.keys()):
        kind = stored.entries[path][1].format
        logger.warning("%s (%s) has no form as two Linears: written dense", path, kind)
    config = _plain_config(stored)
    store.write_json(out / "config.json", config | {"model_type": "llama_two_linear"})
    _copy(stored.folder, out)

    def tensors(name: str) -> dict[str, Tensor]:
        path = name.removesuffix(".weight")
        if path in pairs:
            second, first = stored.network(path).expand().cores
            return {f"{path}.0.weight": first, f"{path}.1.weight": second}
        return {name: stored.tensor(name)}

    files = _write_shards(stored, out, tensors)
    plan = {
        "format_version": 1,
        "llama_config": config,
        "files": files,
        "modules": pairs,
    }
    store.write_json(out / PAIRS_NAME, plan)
    store.write_text(out / "README.md", PAIRS_CARD.format(name=stored.folder.name))
    _finish(stored, out)
    return out


def _open(folder: str | Path, out: str | Path) -> tuple[StoredModel, Path]:
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    require_converted(folder)
    inside, outside = out.resolve(), folder.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise UsageError(
            "an export cannot go into its own input",
            where=out,
            hint="choose a folder beside it",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            "the output folder is not empty", where=out, hint="choose a new one, or empty it"
        )
    store.verify_manifest(folder)
    store.make_folder(out)
    return StoredModel(folder), out


def _plain_config(stored: StoredModel) -> dict[str, Any]:
    config = stored.config.to_dict()
    left_out = (*OWN_KEYS, "model_type", "architectures")
    return {key: value for key, value in config.items() if key not in left_out}


def _copy(folder: Path, out: Path) -> None:
    for name in COPIED:
        if (folder / name).is_file():
            store.write_bytes(out / name, (folder / name).read_bytes())


def _shards(config: LlamaConfig) -> Iterator[list[str]]:
    """Names of a plain Llama's tensors: embedding, each block, final norm and head."""
    names = list(expected_specs(config))
    blocks = [
        [name for name in names if name.startswith(f"model.layers.{index}.")]
        for index in range(config.num_hidden_layers)
    ]
    rest = [name for name in names if not name.startswith("model.layers.")]
    yield [name for name in rest if "embed" in name]
    yield from blocks
    yield [name for name in rest if "embed" not in name]


def _write_shards(
    stored: StoredModel, out: Path, tensors: Callable[[str], dict[str, Tensor]]
) -> list[str]:
    """Write what `tensors` gives for each dense name, a shard at a time; returns the file names."""
    shards = list(_shards(stored.config))
    files, weight_map, size = [], {}, 0
    bar = tqdm(shards, "export", unit="shard", file=sys.stderr, disable=None)
    for number, names in enumerate(bar, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        written = {
            key: tensor.to(stored.dtype) for name in names for key, tensor in tensors(name).items()
        }
        store.write_tensors(out / file, written)
        files.append(file)
        weight_map |= dict.fromkeys(written, file)
        size += sum(tensor.nbytes for tensor in written.values())
    write_index(out, weight_map, size)
    return files


def _finish(stored: StoredModel, out: Path) -> None:
    store.write_manifest(out, {"exported_from": store.sha256(stored.folder / store.MANIFEST_NAME)})


def _is_pair(stored: StoredModel, path: str) -> bool:
    members, spec = stored.entries[path]
    return len(members) == 1 and spec.format == "lowrank" and path != "model.embed_tokens"


def _pair_facts(stored: StoredModel, path: str) -> dict[str, Any]:
    _, spec = stored.entries[path]
    return {
        "in": spec.shape[1],
        "out": spec.shape[0],
        "rank": spec.ranks[0],
        "first": f"{path}.0.weight",
        "second": f"{path}.1.weight",
    }
