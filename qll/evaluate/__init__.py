"""Quality on a text, and cost: parameters, bytes, FLOPs, seconds, memory."""

from qll.callable_room import callable_room
from qll.evaluate.cost import ParamCount, bytes_by_dtype, count_params, forward_flops
from qll.evaluate.pair import cost_of_pair, quality_of_pair
from qll.evaluate.perplexity import Score, compare, leak, score
from qll.evaluate.speed import (
    decode_tokens_per_second,
    peak_device_bytes,
    peak_rss_bytes,
    prefill_tokens_per_second,
)

__all__ = [
    "ParamCount",
    "Score",
    "bytes_by_dtype",
    "compare",
    "cost_of_pair",
    "count_params",
    "decode_tokens_per_second",
    "forward_flops",
    "leak",
    "peak_device_bytes",
    "peak_rss_bytes",
    "prefill_tokens_per_second",
    "quality_of_pair",
    "score",
]

callable_room(__name__, "qll.api", "evaluate")
