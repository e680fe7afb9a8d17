"""Modules that hold a tensor network where a Linear or an Embedding was.

    TNLinear     y = W x            cores at `<path>.cores.<i>`, pivots at `<path>.indices.<i>`
    TNEmbedding  rows of W by id    the table is never built
    TNTiedHead   y = W x with the W of a TNEmbedding; holds nothing of its own

With a packing each core is a PackedTensor (qll.model.packed). Otherwise the numbers are plain
parameters and buffers, so state_dict, .to(), deepcopy, pickle and optimisers see nothing unusual.
`.weight` rebuilds the matrix on every read; it exists for tools that want to look at it. Cores are
NaN until they are loaded: a forgotten load shows at once.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qll.model.packed import PackedTensor
from qll.tn import JointNetwork, build, tensor_shapes
from qll.tn.network import MatrixNetwork, NetworkSpec
from qll.tn.packed import Packing

# Pivots count rows of one matrix; half the bytes of torch's default.
INDEX_DTYPE = torch.int32


class NetworkModule(nn.Module):
    """Cores and pivot indices of one network, as parameters and buffers."""

    def __init__(
        self,
        spec: NetworkSpec,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        packing: Packing | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        shapes = tensor_shapes(spec)
        self.cores: nn.ParameterList | nn.ModuleList
        if packing is None:
            self.cores = nn.ParameterList(
                torch.full(shape, torch.nan, dtype=dtype, device=device) for shape in shapes.cores
            )
        else:
            self.cores = nn.ModuleList(
                PackedTensor(shape, packing, dtype=dtype, device=device) for shape in shapes.cores
            )
        self.indices = nn.Module()
        for position, shape in enumerate(shapes.indices):
            # distinct, so that an unloaded network computes NaN and not an index error
            pivots = torch.arange(math.prod(shape), dtype=INDEX_DTYPE, device=device)
            self.indices.register_buffer(str(position), pivots.reshape(shape))

    @classmethod
    def from_network(cls, network: MatrixNetwork | JointNetwork) -> NetworkModule:
        """The module that computes with `network`; cores become trainable parameters."""
        module = cls(network.spec, device="meta")
        tensors = {f"cores.{i}": core.detach() for i, core in enumerate(network.cores)}
        tensors |= {
            f"indices.{i}": index.to(INDEX_DTYPE) for i, index in enumerate(network.indices)
        }
        module.load_state_dict(tensors, strict=True, assign=True)
        return module

    def network(self) -> MatrixNetwork | JointNetwork:
        """The network on the module's own tensors (no copies): gradients reach unpacked cores."""
        cores = tuple(c.values() if isinstance(c, PackedTensor) else c for c in self.cores)
        return build(self.spec, cores, tuple(self.indices.buffers()))

    def extra_repr(self) -> str:
        """Format, shape and ranks, for print(model)."""
        return f"{self.spec.format}, shape={self.spec.shape}, ranks={self.spec.ranks}"


class TNLinear(NetworkModule):
    """A Linear without bias whose weight is a tensor network.

    >>> layer = TNLinear(NetworkSpec("lowrank", (6, 4), (2,)))
    >>> sorted(layer.state_dict()), layer.in_features, layer.out_features
    (['cores.0', 'cores.1'], 4, 6)
    """

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.spec.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return self.spec.shape[1]

    @property
    def bias(self) -> None:
        """None: matrices with a bias are never converted."""
        return None

    @property
    def weight(self) -> Float[Tensor, "out into"]:
        """The matrix, rebuilt on every read."""
        return self.network().to_matrix()

    def forward(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """W x for every vector x."""
        return self.network().apply(x)


class TNEmbedding(NetworkModule):
    """An Embedding whose table is a tensor network; a lookup contracts only the rows it needs.

    >>> table = TNEmbedding(NetworkSpec("lowrank", (100, 4), (2,)))
    >>> table(torch.tensor([[5, 7, 5]])).shape
    torch.Size([1, 3, 4])
    """

    @property
    def num_embeddings(self) -> int:
        """Size of the vocabulary."""
        return self.spec.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Length of a vector."""
        return self.spec.shape[1]

    @property
    def weight(self) -> Float[Tensor, "vocab d_model"]:
        """The table, rebuilt on every read."""
        return self.network().to_matrix()

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        """The vectors of `ids`."""
        return self.network().rows(ids)


class TNTiedHead(nn.Module):
    """An output head that is the network of the token embedding, used as a matrix."""

    def __init__(self, embedding: TNEmbedding) -> None:
        super().__init__()
        # past nn.Module's registration: the cores belong to the embedding alone
        self.__dict__["embedding"] = embedding

    @property
    def out_features(self) -> int:
        """Size of the vocabulary."""
        return self.embedding.num_embeddings

    @property
    def in_features(self) -> int:
        """Length of a hidden vector."""
        return self.embedding.embedding_dim

    @property
    def bias(self) -> None:
        """None, as in every Llama."""
        return None

    @property
    def weight(self) -> Float[Tensor, "vocab d_model"]:
        """The table, rebuilt on every read."""
        return self.embedding.weight

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of hidden vectors."""
        return self.embedding.network().apply(x)
