"""A Llama, dense or converted, ready to run: the numbers of transformers, without its overhead.

    runtime = Runtime.from_model(load(folder))
    cache = runtime.cache(batch=1, length=512)
    logits = runtime(ids, cache)            # fills the cache, gives the last position's logits

Every matrix runs in the form that the measured costs of the device favour, for one token and for
many (`qll.runtime.program.choose`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qll.errors import UsageError
from qll.runtime.attention import Attention
from qll.runtime.block import MLP, Block, Step
from qll.runtime.cache import Cache
from qll.runtime.costs import DeviceCosts, device_costs
from qll.runtime.direct import Direct
from qll.runtime.forms import Form
from qll.runtime.norm import RMSNorm
from qll.runtime.program import Program, Site, choose
from qll.runtime.reading import Candidates, read_block, read_matrix

# rotary tables that depend on how long the text is
GROWING_ROPE = ("dynamic", "longrope")
Choice = Callable[[list[Candidates], DeviceCosts], tuple[list[tuple[Form, ...]], int]]


class Runtime(Direct):
    """Embedding, blocks, norm and head; call it with ids and a cache."""

    def __init__(
        self,
        embedding: nn.Module,
        blocks: list[Block],
        norm: RMSNorm,
        head: Site,
        turns: Tensor,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.embedding, self.blocks, self.head = embedding, nn.ModuleList(blocks), head
        self.norm = norm
        self.register_buffer("turns", turns)
        self.dtype = dtype

    @classmethod
    def from_model(
        cls,
        model: LlamaForCausalLM,
        costs: DeviceCosts | None = None,
        *,
        choice: Choice = choose,
        consume: bool = False,
    ) -> Runtime:
        """The runtime of a model in evaluation mode, on its device and in its dtype.

        costs: of the device; None measures them once and remembers them. choice: which forms to
        keep, by default the cheapest. consume: give up every block of `model` once it is read, so
        that memory holds the weights once. Raises UsageError for what this runtime does not do: a
        rotary embedding that changes with the length of the text.
        """
        config, weight = model.config, model.model.norm.weight
        kind = (config.rope_parameters or {}).get("rope_type", "default")
        if kind in GROWING_ROPE:
            raise UsageError(
                "a rotary embedding that changes with the length of the text",
                where="rope_type",
                found=kind,
                hint="use --runtime transformers",
            )
        costs = device_costs(weight.device, weight.dtype) if costs is None else costs
        compute = _compute_dtype(weight)
        with torch.no_grad():
            blocks = []
            for index, layer in enumerate(model.model.layers):
                blocks.append(_block(layer, costs, choice, compute))
                if consume:
                    model.model.layers[index] = nn.Identity()
            head = make_site([read_matrix(model.lm_head)], costs, choice)
        norm = RMSNorm(weight.detach().to(compute), config.rms_norm_eps)
        embedding = model.model.embed_tokens
        return cls(embedding, blocks, norm, head, _turns(model), compute).eval()

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.turns.device

    @property
    def longest(self) -> int:
        """Tokens that the model's positions reach."""
        return self.turns.shape[0]

    def cache(self, batch: int = 1, length: int | None = None) -> Cache:
        """An empty cache for `batch` texts of up to `length` tokens (default: the most there are).

        Raises UsageError when the model's positions do not reach that far.
        """
        length = self.longest if length is None else length
        if length > self.longest:
            raise UsageError(
                "text longer than the context of the model",
                expected=f"at most {self.longest} tokens",
                found=length,
            )
        sizes = [block.cache_sizes for block in self.blocks]
        return Cache.empty(sizes, batch, length, self.dtype, self.device)

    def forward(
        self, ids: Int[Tensor, "batch seq"], cache: Cache, keep: int = 1
    ) -> Float[Tensor, "batch keep vocab"]:
        """Logits at the last `keep` of the new tokens `ids`, which continue what `cache` holds.

        Raises UsageError when the cache is full.
        """
        tokens = ids.shape[1]
        cache.require_room(tokens)
        end = cache.filled + tokens
        positions = torch.arange(cache.filled, end, device=ids.device)
        causal = cache.filled == 0 and tokens > 1
        masked = cache.filled > 0 and tokens > 1
        logits = self.step(ids, positions, cache, end, causal=causal, masked=masked, keep=keep)
        cache.filled = end
        return logits

    def step(
        self,
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, " seq"],
        cache: Cache,
        window: int,
        *,
        causal: bool = False,
        masked: bool = True,
        keep: int = 1,
    ) -> Float[Tensor, "batch keep vocab"]:
        """The same for any positions, without a look at their values: can be compiled or recorded.

        Attention sees the first `window` places of the cache: all of them, those before each token
        (`causal`, when the window is the tokens themselves), or those up to its position
        (`masked`).
        """
        mask = None
        if masked:
            mask = torch.arange(window, device=ids.device) <= positions[:, None]
        turns = self.turns.index_select(0, positions)
        step = Step(positions, turns, window, mask, causal)
        x = self.embedding(ids).to(self.dtype).flatten(0, 1)
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            x = block.forward(x, keys, values, step)
        last = x.unflatten(0, ids.shape)[:, -keep:].flatten(0, 1)
        return self.head.forward(self.norm.forward(last)).reshape(ids.shape[0], keep, -1)


def _block(
    layer: LlamaDecoderLayer, costs: DeviceCosts, choice: Choice, compute: torch.dtype
) -> Block:
    attention, mlp = read_modules(layer, costs, choice)
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    first, second = (
        RMSNorm(norm.weight.detach().to(compute), norm.variance_epsilon) for norm in norms
    )
    return Block((first, second), attention, mlp)


def read_modules(
    layer: LlamaDecoderLayer, costs: DeviceCosts, choice: Choice
) -> tuple[Attention, MLP]:
    """Attention and MLP of one block of transformers, in the forms that `choice` keeps.

    Raises UsageError for a linear with a bias.
    """
    for name, module in layer.named_modules():
        if getattr(module, "bias", None) is not None:
            raise UsageError(
                "a linear with a bias, which no Llama has",
                where=name,
                hint="leave the model to transformers (--runtime transformers)",
            )
    forms, config = read_block(layer), layer.self_attn.config
    reading, output, gate_up, down = (
        make_site(candidates, costs, choice)
        for candidates in (forms.query_key_value, [forms.output], forms.gate_up, [forms.down])
    )
    heads = config.num_attention_heads, config.num_key_value_heads
    sizes = layer.self_attn.head_dim, forms.d_key, forms.d_value
    return Attention(reading, output, heads, sizes, forms.pairs), MLP(gate_up, down)


def make_site(candidates: list[Candidates], costs: DeviceCosts, choice: Choice) -> Site:
    """The candidates that `choice` keeps, as modules."""
    combinations, few = choice(candidates, costs)
    return Site([Program(forms, costs.kernel_for) for forms in combinations], few)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """Dtype between products: a CPU gains nothing from half precision there."""
    return torch.float32 if weight.device.type == "cpu" else weight.dtype


def _turns(model: LlamaForCausalLM) -> Tensor:
    """exp(i angle) of every position and rotary pair, scaled as the model's rope type asks."""
    rotary, limit = model.model.rotary_emb, model.config.max_position_embeddings
    device = model.model.norm.weight.device
    places = torch.arange(limit, device=device)[None]
    like = torch.zeros(1, dtype=torch.float32, device=device)
    with torch.no_grad():
        cosine, sine = rotary(like, position_ids=places)
    half = cosine.shape[-1] // 2
    return torch.complex(cosine[0, :, :half].float(), sine[0, :, :half].float())
