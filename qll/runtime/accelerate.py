"""A converted model of transformers with its matrices in the forms that run fastest here.

For whoever wants transformers' own `generate`: the model stays what it is, attention stays
transformers', and the numbers stay the same, but a converted matrix costs one or two products and
no Python around them, and a norm in float32 on a CPU is that of our own runtime. For inference: the
stored networks are gone afterwards.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from qll.model.groups import TNMember
from qll.model.layers import TNLinear, TNTiedHead
from qll.runtime.costs import DeviceCosts, device_costs
from qll.runtime.llama import Choice, make_site
from qll.runtime.norm import RMSNorm
from qll.runtime.program import Site, choose
from qll.runtime.reading import read_block_mlp, read_matrix
from qll.tn import JointQueryKey, JointValueOutput


class FastLinear(nn.Module):
    """A matrix on vectors of any batch shape; channels that a format dropped come back as zeros.

    taken: the places of the input that are read; placed: where the outputs go among `out`.
    """

    def __init__(
        self,
        site: Site,
        out: int,
        taken: Int[Tensor, " into"] | None = None,
        placed: Int[Tensor, " rows"] | None = None,
    ) -> None:
        super().__init__()
        self.site, self.out_features = site, out
        self.register_buffer("taken", taken, persistent=False)
        self.register_buffer("placed", placed, persistent=False)

    def forward(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """W x for every vector x."""
        flat = x.reshape(-1, x.shape[-1])
        found = self.site(flat if self.taken is None else flat.index_select(1, self.taken))
        if self.placed is not None:
            full = found.new_zeros(found.shape[0], self.out_features)
            found = full.index_copy_(1, self.placed, found)
        return found.reshape(*x.shape[:-1], self.out_features)


class FastMLP(nn.Module):
    """down(silu(gate x) * up x), gate and up in one product."""

    def __init__(self, gate_up: Site, down: Site) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The MLP's output."""
        pieces = self.gate_up.pieces(x.reshape(-1, x.shape[-1]))
        gate, up = pieces if len(pieces) == 2 else pieces[0].chunk(2, 1)
        return self.down(nn.functional.silu(gate) * up).reshape(x.shape)


@torch.no_grad()
def accelerate(
    model: LlamaForCausalLM, costs: DeviceCosts | None = None, *, choice: Choice = choose
) -> LlamaForCausalLM:
    """`model` with fast modules in place of its networks; changed in place and returned.

    costs: of the device; None measures them once and remembers them.
    """
    weight = model.model.norm.weight
    costs = device_costs(weight.device, weight.dtype) if costs is None else costs
    for layer in model.model.layers:
        gate_up, down = read_block_mlp(layer.mlp)
        sites = make_site(gate_up, costs, choice), make_site([down], costs, choice)
        layer.mlp = FastMLP(*sites)
        for name in NORMS:
            setattr(layer, name, _fast_norm(getattr(layer, name)))
        attention = layer.self_attn
        found = {name: _fast(attention, name, costs, choice) for name in PROJECTIONS}
        for name, module in found.items():
            setattr(attention, name, module)
        for name in ("qkv", "qkvo", "query_key", "value_output"):
            if hasattr(attention, name):
                delattr(attention, name)
    model.model.norm = _fast_norm(model.model.norm)
    if isinstance(model.lm_head, TNLinear | TNTiedHead):
        out = model.lm_head.out_features
        model.lm_head = FastLinear(make_site([read_matrix(model.lm_head)], costs, choice), out)
    return model


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def _fast_norm(norm: LlamaRMSNorm) -> nn.Module:
    # transformers computes lower precisions in float32, which ours does not
    if norm.weight.dtype != torch.float32 or norm.weight.device.type != "cpu":
        return norm
    return RMSNorm(norm.weight, norm.variance_epsilon)


def _fast(attention: LlamaAttention, name: str, costs: DeviceCosts, choice: Choice) -> nn.Module:
    module = getattr(attention, name)
    if not isinstance(module, TNLinear | TNMember):
        return module
    taken = placed = None
    if isinstance(module, TNMember):
        network = module.group.network()
        out, into = network.spec.members[module.member]
        if isinstance(network, JointQueryKey):
            placed = network.places(module.member)
        elif isinstance(network, JointValueOutput):
            kept = torch.arange(out if module.member == 0 else into, device=module.weight.device)
            kept = kept[kept % attention.head_dim < network.spec.ranks[0]]
            placed, taken = (kept, None) if module.member == 0 else (None, kept)
    else:
        out = module.out_features
    return FastLinear(make_site([read_matrix(module)], costs, choice), out, taken, placed)
