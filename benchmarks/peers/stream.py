"""Block after block on the stream of the model as it is compressed so far, as the published code of
GPTQ, SparseGPT and MPIFA does: what a matrix reads has the errors of all before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from benchmarks.peers.case import Case, Method, Replacement
from qll.calibrate import LinearMoments
from qll.calibrate.moments import INPUTS
from qll.model import build_block, embed, run_block


def on_the_stream(
    method: Callable[[Float64[Tensor, "out into"], LinearMoments, float], Replacement],
) -> Method:
    """`method` on every matrix, with the inputs it has in the compressed model."""

    @torch.no_grad()
    def convert(case: Case) -> Iterator[tuple[str, Replacement]]:
        stream = embed(case.source, case.windows)
        for index in range(case.source.config.num_hidden_layers):
            block = build_block(case.source, index)
            for group, members in INPUTS.items():
                inputs = inputs_of(block, group, stream)
                moments = LinearMoments((inputs.T @ inputs).double(), None, len(inputs))
                for member in members:
                    linear = block.get_submodule(member)
                    found = method(linear.weight.double(), moments, case.keep)
                    linear.weight = nn.Parameter(found.matrix, requires_grad=False)
                    yield f"model.layers.{index}.{member}", found
            stream = after(block, stream)

    return convert


class _Reached(Exception):
    """The input that was wanted is there; the rest of the block need not run."""


def inputs_of(block: nn.Module, group: str, hidden: Tensor) -> Tensor:
    """What the linears of `group` read while `block` runs on `hidden`, [tokens, width]."""
    found: list[Tensor] = []

    def catch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0].flatten(0, -2))
        raise _Reached

    hook = block.get_submodule(INPUTS[group][0]).register_forward_pre_hook(catch)
    for window in hidden:
        try:
            run_block(block, window[None])
        except _Reached:
            continue
    hook.remove()
    return torch.cat(found)


def after(block: nn.Module, hidden: Float[Tensor, "windows context d"]) -> Tensor:
    """What `block` gives on `hidden`, window by window."""
    return torch.cat([run_block(block, window[None]) for window in hidden])
