"""Run it fast: a Llama, dense or converted, without transformers' overhead per token.

In: a model of transformers or of `qll.model`. Out: a `Runtime` with a static key/value cache that
runs every matrix in the form that is cheapest on the device at hand. Read llama.py first.
"""

from qll.runtime.accelerate import accelerate
from qll.runtime.cache import Cache
from qll.runtime.costs import DeviceCosts, Line, best_of, device_costs
from qll.runtime.llama import Runtime
from qll.runtime.record import decoder
from qll.runtime.sample import Sampling
from qll.runtime.speculate import Acceptance, best_length, gain, speculate
from qll.runtime.text import end_tokens, stream_text, tokens

__all__ = [
    "Acceptance",
    "Cache",
    "DeviceCosts",
    "Line",
    "Runtime",
    "Sampling",
    "accelerate",
    "best_length",
    "best_of",
    "decoder",
    "device_costs",
    "end_tokens",
    "gain",
    "speculate",
    "stream_text",
    "tokens",
]
