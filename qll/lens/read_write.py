"""Weight-only survival: what matrices still do with a feature's direction, without any text.

A matrix that reads the residual stream answers a direction d with W (g * d), g the gain of the
norm in front of it; a matrix that writes into the stream answers with W^T d. Of the two answers,

    rho = 1 - |answer' - answer|^2 / |answer|^2        1: nothing lost, 0 and below: all of it

compares the original with the converted model, each with its own gains. Answers go straight
through the tensor network, d by d; no matrix is rebuilt. W'^T d is the derivative of the linear map
W' x in the direction of d, so every format has it. Source of the idea and of rho: none that we
know; it is the relative squared error of one input (or output) direction.

A shared value-output network is free to mix the channels of a head, so v alone means nothing
there: both matrices are then compared by what the pair does, head by head (O_h V_h (g * d), and
V_h^T O_h^T d).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from qll.load.sae_names import EMBEDDING, hookpoint_of
from qll.model import TNMember, gain_of

logger = logging.getLogger("qll.lens")

READERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
# where a place lies among the four steps of a block: attention reads, writes, MLP reads, writes
STEPS = {"": 4, ".mlp": 4, ".self_attn": 2, ".post_attention_layernorm.input": 2}
STEP_OF = {
    "self_attn.q_proj": 1,
    "self_attn.k_proj": 1,
    "self_attn.v_proj": 1,
    "self_attn.o_proj": 2,
    "mlp.gate_proj": 3,
    "mlp.up_proj": 3,
    "mlp.down_proj": 4,
}
# features answered for at a time
CHUNK = 1024


class Crossing(NamedTuple):
    """A matrix next to a place, and whether it reads what is there or writes it."""

    matrix: str
    """Module path, for instance model.layers.3.mlp.up_proj."""
    side: str
    """read or write."""


def crossings(hookpoint: str, n_layers: int, reach: int) -> list[Crossing]:
    """The matrices within `reach` blocks that read what a place holds, or write into it.

    A module's output (attention, MLP) is written by its own last matrix alone. Empty, with a
    warning, for places outside the residual stream other than the inputs of o_proj and down_proj.

    >>> [found.matrix for found in crossings("layers.0.mlp", 2, reach=1)][:2]
    ['model.layers.0.mlp.down_proj', 'model.layers.1.self_attn.q_proj']
    """
    name = hookpoint_of(hookpoint)
    found = re.fullmatch(r"layers\.(\d+)(.*)", name)
    if found and found[2] in (".self_attn.o_proj.input", ".mlp.down_proj.input"):
        return [Crossing(f"model.{name.removesuffix('.input')}", "read")]
    if name != EMBEDDING and found[2] not in STEPS:
        logger.warning("no matrix reads or writes %s alone: no weight-only survival there", name)
        return []
    block, step = (-1, 4) if name == EMBEDDING else (int(found[1]), STEPS[found[2]])
    place, span = 4 * block + step, 4 * reach
    own = {".mlp": "mlp.down_proj", ".self_attn": "self_attn.o_proj"}.get(found[2] if found else "")
    every = [
        (number, path, 4 * number + STEP_OF[path]) for number in range(n_layers) for path in STEP_OF
    ]
    writers = [
        Crossing(f"model.layers.{number}.{path}", "write")
        for number, path, at in every
        if path in WRITERS
        and (at == place if own else place - span < at <= place)
        and own in (None, path)
    ]
    readers = [
        Crossing(f"model.layers.{number}.{path}", "read")
        for number, path, at in every
        if path in READERS and place < at <= place + span
    ]
    return writers + readers


@torch.no_grad()
def weight_survival(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    crossing: Crossing,
    directions: Float[Tensor, "n width"],
) -> Float[Tensor, " n"]:
    """rho of every direction at one matrix, float64; NaN where the original answers nothing.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model, place = LlamaForCausalLM(config), Crossing("model.layers.0.mlp.up_proj", "read")
    >>> weight_survival(model, model, place, torch.eye(4)).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    pair = any(_mixes_channels(model, crossing.matrix) for model in (dense, converted))
    parts = []
    for chunk in directions.float().split(CHUNK):
        before, after = (
            answers(model, crossing, chunk, pair=pair).double() for model in (dense, converted)
        )
        lost, whole = (after - before).square().sum(1), before.square().sum(1)
        parts.append(torch.where(whole > 0, 1 - lost / whole, torch.nan))
    return torch.cat(parts)


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    crossing: Crossing,
    directions: Float[Tensor, "n width"],
    *,
    pair: bool = False,
) -> Float[Tensor, "n answer"]:
    """What one matrix makes of directions, float32 on the CPU: W (g * d), or W^T d where it writes.

    pair: what value and output matrix make of them together, one head after the other.
    """
    x = directions.to(model.device, model.dtype)
    if crossing.side == "read" and (gain := gain_of(crossing.matrix, model.config)):
        x = x * model.get_parameter(gain)
    step = _through if crossing.side == "read" else _back
    if not pair:
        return step(model.get_submodule(crossing.matrix), x).float().cpu()
    attention = crossing.matrix.rpartition(".")[0]
    both = [model.get_submodule(f"{attention}.{name}") for name in ("v_proj", "o_proj")]
    first, second = both if crossing.side == "read" else reversed(both)
    config = model.config
    heads = step(first, x).unflatten(1, (-1, config.head_dim))
    found = []
    for head in range(config.num_attention_heads):
        group = head * config.num_key_value_heads // config.num_attention_heads
        come, go = (group, head) if crossing.side == "read" else (head, group)
        count = (
            config.num_attention_heads if crossing.side == "read" else config.num_key_value_heads
        )
        one = x.new_zeros(len(x), count, config.head_dim)
        one[:, go] = heads[:, come]
        found.append(step(second, one.flatten(1)))
    return torch.cat(found, dim=1).float().cpu()


def _mixes_channels(model: PreTrainedModel, name: str) -> bool:
    """Whether v and o of this model are known only as a pair."""
    module = model.get_submodule(name)
    return isinstance(module, TNMember) and module.group.spec.format == "joint_value_output"


def _network_call(module: nn.Module) -> tuple[Callable[[Tensor], Tensor], int, Tensor | None]:
    """x -> W x, the width of x, and the inner channels that are left (None: all of them)."""
    if not isinstance(module, TNMember):
        return module.forward, module.in_features, None
    network, member = module.group.network(), module.member
    kept = network.indices[0].long() if network.spec.format == "joint_channels" else None
    # past the module, which remembers projections from one member to the next
    return lambda x: network.apply(x, member), module.in_features, kept


def _through(module: nn.Module, x: Float[Tensor, "n into"]) -> Float[Tensor, "n out"]:
    """W x; zero in channels that the conversion dropped."""
    call, width, kept = _network_call(module)
    if kept is None:
        return call(x)
    if width != x.shape[1]:  # down_proj reads the channels that are left
        return call(x[:, kept])
    return _spread(call(x), kept, module.group.spec.members[module.member][0])


def _back(module: nn.Module, y: Float[Tensor, "n out"]) -> Float[Tensor, "n into"]:
    """W^T y, the derivative of y . W x; zero in channels that the conversion dropped."""
    call, width, kept = _network_call(module)
    with torch.enable_grad():
        x = torch.zeros(len(y), width, device=y.device, dtype=y.dtype, requires_grad=True)
        (found,) = torch.autograd.grad(call(x), x, y)
    return (
        found if kept is None else _spread(found, kept, module.group.spec.members[module.member][1])
    )


def _spread(found: Tensor, kept: Tensor, width: int) -> Tensor:
    return found.new_zeros(len(found), width).index_copy(1, kept, found)
