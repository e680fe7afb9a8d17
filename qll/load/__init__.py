"""Any Llama checkpoint -> Source: names, specs, one tensor at a time; tokenizers and texts."""

from qll.load.checkpoint import TensorSpec
from qll.load.names import expected_specs
from qll.load.source import Source, open_source

__all__ = ["Source", "TensorSpec", "expected_specs", "open_source"]
