"""Published methods, rebuilt from their formulas, one file each; `load_method` finds one by name.

A method takes a `Case` and yields (path, Replacement) for every block linear. No code of other
projects is in here.
"""

from __future__ import annotations

from importlib import import_module

from benchmarks.peers.case import Case, Method, Replacement

# name of the row -> file and function
METHODS = {
    "svd": ("svd", "convert"),
    "asvd": ("asvd", "convert"),
    "svd_llm": ("svd_llm", "convert"),
    "swift_svd": ("swift_svd", "convert"),
    "whitened_interpolative": ("pifa", "convert"),
    "mpifa": ("pifa", "convert_refitted"),
    "kfac_lems": ("kfac_lems", "convert"),
    "modegpt": ("modegpt", "convert"),
    "sparsegpt": ("sparsegpt", "convert"),
    "tensorly_tt": ("tensorly_formats", "tensor_train_cells"),
    "tensorly_tucker": ("tensorly_formats", "tucker_cells"),
    "tltorch_blocktt": ("tensorly_formats", "blocktt_cells"),
    "tltorch_tucker": ("tensorly_formats", "factorized_tucker_cells"),
    "fp16": ("quantise", "half"),
    "rtn_int8": ("quantise", "int8"),
    "rtn_int4": ("quantise", "int4"),
    "rtn_int3": ("quantise", "int3"),
    "rtn_int2": ("quantise", "int2"),
    "gptq_int4": ("quantise", "gptq4"),
    "gptq_int3": ("quantise", "gptq3"),
    "gptq_int2": ("quantise", "gptq2"),
    "gguf_bf16": ("quantise", "bf16"),
    "gguf_q8_0": ("quantise", "q8_0"),
    "gguf_q5_1": ("quantise", "q5_1"),
    "gguf_q5_0": ("quantise", "q5_0"),
    "gguf_q4_1": ("quantise", "q4_1"),
    "gguf_q4_0": ("quantise", "q4_0"),
    "gguf_mxfp4": ("quantise", "mxfp4"),
}

__all__ = ["METHODS", "Case", "Method", "Replacement", "load_method"]


def load_method(name: str) -> Method:
    """The method of that row; its libraries are imported now. Raises KeyError, ImportError."""
    module, function = METHODS[name]
    return getattr(import_module(f"benchmarks.peers.{module}"), function)
