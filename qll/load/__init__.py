"""Any Llama checkpoint -> Source: names, specs, one tensor at a time; tokenizers and texts."""

from importlib import import_module
from typing import Any

from qll.callable_room import callable_room
from qll.load.ahead import ReadAhead, expect_block
from qll.load.checkpoint import TensorSpec
from qll.load.names import expected_specs
from qll.load.source import Source, open_source
from qll.load.unchanged import Stamps, require_unchanged, stamps_of

# Imported when first used: they need transformers, which takes seconds; opening a file does not
_ELSEWHERE = {
    "open_tokenizer": "tokenizer",
    "Text": "text",
    "builtin_texts": "text",
    "encode": "text",
    "mixed_windows": "mixture",
    "read_text": "text",
    "describe": "inspect",
}

__all__ = [
    "ReadAhead",
    "Source",
    "Stamps",
    "TensorSpec",
    "expect_block",
    "expected_specs",
    "open_source",
    "require_unchanged",
    "stamps_of",
    *_ELSEWHERE,
]


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(import_module(f"qll.load.{_ELSEWHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


callable_room(__name__, "qll.model", "load")
