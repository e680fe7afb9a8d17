"""Blocks compiled for training, and for nothing else.

One compilation serves all blocks with the same parts. Validation and generation see windows of many
lengths, each of which would be compiled anew: they stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qll.errors import UsageError

# what torch says of its own ways (rotations of complex numbers run as they are)
OF_TORCH = ("Torchinductor does not support code generation for complex", "`torch.jit.script")


def compiled_training(block: nn.Module) -> Callable[..., Any]:
    """A forward function for `block` that runs compiled while the block trains.

    Raises UsageError at its first call when there is no compiler to compile with.

    >>> from qll.bytelm.norm import RMSNorm
    >>> norm = RMSNorm(2).eval()
    >>> compiled_training(norm)(torch.tensor([3.0, 3.0])).round(decimals=3).tolist()
    [1.0, 1.0]
    """
    for message in OF_TORCH:
        warnings.filterwarnings("ignore", message)
    plain = block.forward
    fused = torch.compile(plain, dynamic=False)

    def forward(*arguments: Any) -> Any:
        if not block.training:
            return plain(*arguments)
        try:
            return fused(*arguments)
        except Exception as error:
            if not _lacks_compiler(error):
                raise
            raise UsageError(
                "no working C++ compiler",
                where="--compile",
                expected="g++ or clang++ on the path, or CXX set to one",
                hint="install one, or train without --compile",
            ) from None

    return forward


def _lacks_compiler(error: Exception) -> bool:
    """By name: the class lies where torch.compile keeps what it imports only when it is used."""
    return "InvalidCxxCompiler" in (type(error).__name__, str(error).partition(": ")[0])
