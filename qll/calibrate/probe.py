"""Hooks on one decoder block that sum the second moments of its linear layers.

Output gradients are conditioned before they enter a moment, as KFAC-SVD does against a collapse of
the Fisher matrix onto a few tokens: the first and last eighth of every window is left out, and the
length of each remaining token's gradient is brought to within a tenth and ten times the window's
mean length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qll.calibrate.gram import GramSum
from qll.calibrate.moments import INPUTS, LINEARS

TRIM = 0.125
CLIP = (0.1, 10.0)


class BlockProbe:
    """Sums x x^T (and g g^T) of every linear layer of `block` while `attached`."""

    def __init__(self, block: nn.Module, gradients: bool) -> None:
        self.linears = {name: block.get_submodule(name) for name in LINEARS}
        self.inputs = {
            name: GramSum(self.linears[members[0]].in_features) for name, members in INPUTS.items()
        }
        self.grads = {
            name: GramSum(linear.out_features) for name, linear in self.linears.items() if gradients
        }

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the forward passes (and their backward passes) made inside the `with`."""
        with contextlib.ExitStack() as hooks:
            for name, members in INPUTS.items():
                hooks.callback(self._watch_input(name, members[0]).remove)
            for name in self.grads:
                hooks.callback(self._watch_grad(name).remove)
            yield

    def tensors(self) -> dict[str, Tensor]:
        """The packed sums by their names in the block's file; each sum is given up for them, since
        those of a block of Llama 3 8B take 2.9 GB."""
        packed = {}
        for kind, sums in (("input", self.inputs), ("grad", self.grads)):
            for name in list(sums):
                packed[f"{name}.{kind}"] = sums.pop(name).packed()
        return packed

    def _watch_input(self, name: str, linear: str):
        def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name].add(arguments[0].flatten(0, -2))

        return self.linears[linear].register_forward_hook(add)

    def _watch_grad(self, name: str):
        def add(grad: Tensor) -> None:
            self.grads[name].add(condition(grad))

        def watch(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(add)

        return self.linears[name].register_forward_hook(watch)


def condition(grad: Float[Tensor, "windows context width"]) -> Float[Tensor, "tokens width"]:
    """Token gradients without the ends of each window, lengths clipped to CLIP x the window's mean.

    A gradient of length zero stays zero.

    >>> grad = torch.ones(1, 8, 1); grad[0, 4] = 1000
    >>> condition(grad).flatten().tolist()
    [16.75, 16.75, 16.75, 1000.0, 16.75, 16.75]
    """
    context = grad.shape[1]
    ends = trimmed(context)
    kept = grad[:, ends : context - ends].float()
    length = kept.norm(dim=-1, keepdim=True)
    mean = length.mean(dim=1, keepdim=True)
    wanted = length.clamp(CLIP[0] * mean, CLIP[1] * mean)
    scale = torch.where(length > 0, wanted / length, 0.0)
    return (kept * scale).flatten(0, 1)


def trimmed(context: int) -> int:
    """Positions left out at each end of a window of `context` tokens.

    >>> trimmed(1024), trimmed(4)
    (128, 0)
    """
    return int(TRIM * context)
