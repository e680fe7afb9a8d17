"""A converted folder as named tensors, one at a time, without building the model.

`matrix(path)` is the dense matrix at a module path, whether the folder stores it as such, as a
network, or as a member of a group. What an export needs, in the memory of one entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from qll.errors import IntegrityError
from qll.load import expected_specs
from qll.model.files import read_weight_map
from qll.model.llama_tn import LlamaTNConfig
from qll.model.packed import packed_shapes, require_finite
from qll.model.swap import entry_path
from qll.tn import JointNetwork, build, tensor_shapes
from qll.tn.network import MatrixNetwork, NetworkSpec
from qll.tn.packed import Packing, dequantise


@dataclass(frozen=True)
class StoredModel:
    """The tensors of a converted folder, read lazily."""

    folder: Path

    @cached_property
    def config(self) -> LlamaTNConfig:
        """config.json of the folder."""
        return LlamaTNConfig.from_pretrained(self.folder)

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of every tensor."""
        return read_weight_map(self.folder)

    @cached_property
    def entries(self) -> dict[str, tuple[tuple[str, ...], NetworkSpec]]:
        """Member path -> (all members of its entry, spec)."""
        return {
            member: (members, spec)
            for members, spec in self.config.entries.items()
            for member in members
        }

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the folder was saved in."""
        dtype = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A stored tensor; raises IntegrityError when it is missing or not of `shape`."""
        if name not in self.files:
            raise IntegrityError("tensor is missing", where=f"{self.folder}: {name}")
        with safe_open(self.files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise IntegrityError(
                "tensor has the wrong shape",
                where=f"{self.folder}: {name}",
                expected=shape,
                found=tuple(tensor.shape),
            )
        return tensor

    def network(self, path: str) -> MatrixNetwork | JointNetwork:
        """The network that `path` is (a member of), its cores in float32."""
        members, spec = self.entries[path]
        home, shapes = entry_path(members), tensor_shapes(spec)
        packing = self.config.packings.get(home)
        cores = []
        for i, shape in enumerate(shapes.cores):
            core = self._numbers(f"{home}.cores.{i}", shape, packing)
            cores.append(core.to(torch.promote_types(core.dtype, torch.float32)))
        indices = tuple(
            self.read(f"{home}.indices.{i}", shape) for i, shape in enumerate(shapes.indices)
        )
        return build(spec, tuple(cores), indices)

    def tensor(self, name: str) -> Tensor:
        """The tensor that a plain Llama has at `name`, rebuilt where it is a network or packed."""
        path = name.removesuffix(".weight")
        rebuilt = path in self.entries or path in self.config.packings
        return self.matrix(path) if rebuilt else self.read(name)

    def matrix(self, path: str) -> Float[Tensor, "out into"]:
        """The dense matrix at module path `path`; float32 if it had to be rebuilt."""
        if path in self.config.packings and path not in self.entries:
            shape = expected_specs(self.config)[f"{path}.weight"]
            return self._numbers(path, shape, self.config.packings[path])
        if path not in self.entries:
            return self.read(f"{path}.weight")
        members, _ = self.entries[path]
        network = self.network(path)
        return network.to_matrix(*(() if len(members) == 1 else (members.index(path),)))

    def _numbers(self, name: str, shape: tuple[int, ...], packing: Packing | None) -> Tensor:
        """The tensor stored at `name`; float32 when it is packed."""
        if packing is None:
            return self.read(name, shape)
        codes, scales = (
            self.read(part, size) for part, size in packed_shapes(name, shape, packing).items()
        )
        require_finite(scales, f"{self.folder}: {name}.scales")
        return dequantise(codes, scales.to(torch.float32), shape, packing)
