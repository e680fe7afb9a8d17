"""Bytes that a pass of a runtime reads and FLOPs that it does, counted from what it runs.

Weights are read once per pass, whatever the number of tokens; the cache once per text. One
multiply-add is two FLOPs. Norms, rotations and softmax are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qll.runtime.kernels import CODED, KERNELS
from qll.runtime.llama import Runtime
from qll.runtime.program import Network, Program, Site

KINDS = (*KERNELS.values(), *CODED.values())


@dataclass(frozen=True)
class Work:
    """What one pass asks of the machine."""

    bytes: int
    flops: int

    def seconds(self, bandwidth: float, flops: float) -> float:
        """The least time on a machine that reads `bandwidth` bytes and does `flops` a second.

        >>> Work(100, 30).seconds(10.0, 1.0)
        30.0
        """
        return max(self.bytes / bandwidth, self.flops / flops)


def work_of(runtime: Runtime, batch: int, tokens: int, context: int) -> Work:
    """The work of `tokens` new tokens in each of `batch` texts that see `context` places.

    Logits are computed for the last token of each text alone.
    """
    rows, size, flops = batch * tokens, 0, 0
    for site in (module for module in runtime.modules() if isinstance(module, Site)):
        here = batch if site is runtime.head else rows
        read, numbers = _numbers(site.program(here))
        size += read
        flops += 2 * here * numbers
    for block in runtime.blocks:
        kv_heads, d_key, d_value = block.cache_sizes
        size += batch * context * kv_heads * (d_key + d_value) * runtime.dtype.itemsize
        flops += 2 * rows * context * block.attention.heads * (d_key + d_value)
    return Work(size, flops)


def _numbers(program: Program) -> tuple[int, int]:
    """(bytes read, multiplications per token) of a program."""
    size = count = 0
    for module in program.modules():
        if isinstance(module, KINDS):
            size += module.num_bytes
            count += module.numbers
        elif isinstance(module, Network):
            size += module.form.num_bytes
            count += module.form.flops // 2
    return size, count


def held_bytes(module: nn.Module) -> int:
    """Bytes of all kernels of a runtime: both programs of a site, where there are two."""
    return sum(part.num_bytes for part in module.modules() if isinstance(part, KINDS))
