"""In which number format training multiplies; parameters and sums stay float32 everywhere.

bfloat16 products are four times as fast as float32 on a CPU with the instructions for them (such
as AVX512_BF16) and on every recent GPU, and several times slower on one without: so it is asked.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qll.train.attention import ATTENTION

LONGEST_EAGER = 1024  # positions; beyond, the scores of plain attention would not stay in cache


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of products for --precision `wanted` ("auto", "float32", "bfloat16") on `device`.

    >>> choose_precision("float32", torch.device("cpu"))
    torch.float32
    """
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        has_instructions = torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if has_instructions else torch.float32
    return torch.float32


def autocast(precision: torch.dtype, device: torch.device) -> AbstractContextManager:
    """A context in which matrix products run in `precision`; for float32 it does nothing.

    >>> with autocast(torch.bfloat16, torch.device("cpu")):
    ...     (torch.eye(2) @ torch.eye(2)).dtype
    torch.bfloat16
    """
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, precision)


def prepare_training(model: nn.Module, precision: torch.dtype, device: torch.device) -> None:
    """Choose the attention of `model` (a Llama or a block of one) that trains fastest there.

    On a CPU in bfloat16 that is `qll.train.attention`, else torch's own.
    """
    products = device.type == "cpu" and precision == torch.bfloat16
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = ATTENTION if products else "sdpa"


def fast_attention(
    precision: torch.dtype, device: torch.device, context: int
) -> AbstractContextManager:
    """A context in which torch's attention takes the way that trains fastest there.

    On a CPU in bfloat16 that is the plain product: forward and backward of 16 windows of 256 bytes
    with 4 heads of 64 channels took 38 ms of one core, and 63 ms fused.

    >>> with fast_attention(torch.float32, torch.device("cpu"), 256):
    ...     torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 2)] * 3).shape
    torch.Size([1, 1, 2, 2])
    """
    if device.type != "cpu" or precision == torch.float32 or context > LONGEST_EAGER:
        return nullcontext()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return sdpa_kernel(SDPBackend.MATH)
