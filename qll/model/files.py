"""Everything of a converted folder but its tensors.

    config.json              how to build the model: a Llama config plus one spec per entry
    generation_config.json   special tokens for generate()
    modeling_qll.py          lets transformers open the folder with trust_remote_code=True
    tokenizer files          as transformers saves them
    README.md                the model card
    qll_manifest.json        sha256 of every file, the logits fingerprint; written last, by `seal`

The tensors stand in `model-0000i-of-0000n.safetensors` with `model.safetensors.index.json` (or in
one `model.safetensors`) under the names of `stored_shapes`; dense matrices and norms keep their
Hugging Face names, but a packed dense matrix is `<path>.packed` and `<path>.scales`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qll import store
from qll.errors import IntegrityError
from qll.load import Source
from qll.load.files import read_object

if TYPE_CHECKING:
    from qll.model.packed import Packings
    from qll.model.swap import Entries

CODE_NAME = "modeling_qll.py"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
AUTO_MAP = {
    "AutoConfig": "modeling_qll.LlamaTNConfig",
    "AutoModelForCausalLM": "modeling_qll.LlamaTNForCausalLM",
}
CODE = '''"""Opens this folder with transformers and trust_remote_code=True."""

try:
    from qll.model.llama_tn import LlamaTNConfig, LlamaTNForCausalLM
except ImportError as error:
    raise ImportError("this folder needs: pip install quantum-llama-lens") from error

__all__ = ["LlamaTNConfig", "LlamaTNForCausalLM"]
'''
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [tensor-network, quantum-llama-lens]
---
# {name}, as tensor networks

Converted from `{name}` by Quantum Llama Lens: {converted} of its matrices are tensor networks
({formats}). All of it is classical linear algebra. `qll_manifest.json` lists the sha256 of every
file; `config.json` lists the shape of every network.

```python
import qll
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


def write_static_files(
    folder: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    entries: Entries,
    *,
    dtype: torch.dtype,
    folded_norms: bool = False,
    packings: Packings | None = None,
) -> None:
    """Write all files of a converted folder but tensors and manifest; safe to repeat.

    `entries` are the networks by their members, `dtype` that of the stored cores; `folded_norms`
    records that norm gains were multiplied into the matrices, `packings` what is stored in integers
    by module path. Everything else is as in `source`.
    """
    # imported here: that module imports this one
    from qll.model.llama_tn import LlamaTNConfig
    from qll.model.quantizer import TNConfig

    store.make_folder(folder)
    settings = {
        key: value
        for key, value in source.config.to_dict().items()
        if key not in ("model_type", "architectures", "auto_map", "quantization_config", "dtype")
    }
    converted = LlamaTNConfig(**settings, qll_folded_norms=folded_norms)
    converted.architectures = ["LlamaTNForCausalLM"]
    converted.dtype = str(dtype).removeprefix("torch.")
    converted.quantization_config = TNConfig.from_entries(entries, packings).to_dict()
    store.write_text(folder / "config.json", converted.to_json_string(use_diff=False))
    generation = GenerationConfig.from_model_config(source.config)
    store.write_text(folder / "generation_config.json", generation.to_json_string())
    write_code(folder)
    store.write_text(folder / "README.md", _card(source.name, entries))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_code(folder: Path) -> None:
    """Write modeling_qll.py, which only imports this package."""
    store.write_text(folder / CODE_NAME, CODE)


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Write model.safetensors.index.json: which file holds which tensor."""
    weight_map = dict(sorted(weight_map.items()))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    store.write_json(folder / INDEX_NAME, index)


def read_weight_map(folder: Path) -> dict[str, Path]:
    """The file of every tensor in `folder`.

    Raises IntegrityError when there are no tensors, or when the index points outside the folder.
    """
    if (folder / INDEX_NAME).is_file():
        weight_map = read_object(folder / INDEX_NAME, IntegrityError).get("weight_map")
        if not isinstance(weight_map, dict):
            raise IntegrityError(
                "index without a weight_map",
                where=folder / INDEX_NAME,
                found=type(weight_map).__name__,
                hint="copy the folder again",
            )
        return {name: _inside(folder, file) for name, file in weight_map.items()}
    if not (folder / SINGLE_NAME).is_file():
        raise IntegrityError("no tensors", where=folder, expected=f"{SINGLE_NAME} or {INDEX_NAME}")
    from safetensors import safe_open

    with safe_open(folder / SINGLE_NAME, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / SINGLE_NAME)


def seal(
    folder: Path, fingerprint: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> None:
    """Commit `folder`: write its manifest, the last file of all.

    `fingerprint` is `logits_fingerprint` of the finished model, `facts` whatever else the manifest
    should say (source fingerprint, errors per matrix).
    """
    store.write_manifest(folder, {**(facts or {}), "logits_fingerprint": dict(fingerprint)})


def _inside(folder: Path, file: object) -> Path:
    path = folder / str(file)
    if path.name != file or path.is_symlink() or not path.is_file():
        raise IntegrityError(
            "index names a file that is not a plain file of this folder",
            where=folder / INDEX_NAME,
            found=file,
            hint="copy the folder again",
        )
    return path


def _card(name: str, entries: Entries) -> str:
    formats = sorted({spec.format for spec in entries.values()})
    converted = sum(len(members) for members in entries)
    return CARD.format(name=name, converted=converted, formats=", ".join(formats) or "none")
