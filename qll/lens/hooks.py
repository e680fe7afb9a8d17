"""Values inside a Llama, by hookpoint: the same names on a dense and on a converted model.

A handler gets the value at a place, [batch, seq, width], and may return another in its stead. The
hooks sit on the modules of transformers, so they work in forward passes, with a cache and during
generation, and are gone when the context is left.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from qll.errors import UsageError
from qll.load.sae_names import Site, site_of

Handler = Callable[[Tensor], Tensor | None]
# values that RMSNorm's gain has multiplied: another value where the gain was folded away
AFTER_GAIN = re.compile(
    r"(self_attn|self_attn\.[qkv]_proj|mlp|mlp\.(gate|up)_proj)\.input"
    r"|(input|post_attention)_layernorm\.output"
)


@contextlib.contextmanager
def hooked(model: PreTrainedModel, handlers: Sequence[tuple[str, Handler]]) -> Iterator[None]:
    """Give every handler the value at its hookpoint whenever `model` computes it, in order.

    Raises UsageError for a place the model does not have, or that means something else in it.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model, seen = LlamaForCausalLM(config).eval(), []
    >>> with hooked(model, [("layers.0", lambda value: seen.append(value.shape))]):
    ...     _ = model(torch.tensor([[1, 2, 3]]))
    >>> seen
    [torch.Size([1, 3, 8])]
    """
    places = [(site_of(name), module_at(model, name), call) for name, call in handlers]
    handles = []
    try:
        for site, module, call in places:
            handles.append(_install(site, module, call))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def capture(
    model: PreTrainedModel, ids: Int[Tensor, "batch seq"], hookpoints: Sequence[str]
) -> dict[str, Float[Tensor, "batch seq _"]]:
    """The values at some places on `ids`; nothing past the last of them is computed.

    Raises UsageError as `hooked` does.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Handler:
        def handler(value: Tensor) -> None:
            seen[name] = value.detach()
            if len(seen) == len(hookpoints):
                raise _Enough

        return handler

    with hooked(model, [(name, keep(name)) for name in hookpoints]), contextlib.suppress(_Enough):
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    return {name: seen[name] for name in hookpoints}


@torch.no_grad()
def states_from(
    model: PreTrainedModel,
    block: int,
    stream: Float[Tensor, "batch seq d_model"],
    cache: Cache | None = None,
) -> Float[Tensor, "batch seq d_model"]:
    """What the output matrix reads, computed from the residual stream that block `block` reads.

    The blocks before it are not run; hooks on the others work. Same numbers as the whole model's.
    cache: of these blocks alone, with the tokens before; is added to.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
    ...                      num_attention_heads=2)
    >>> model, ids = LlamaForCausalLM(config).eval(), torch.tensor([[1, 2, 3]])
    >>> stream = capture(model, ids, ["layers.0"])["layers.0"]
    >>> bool((states_from(model, 1, stream) == model.model(ids).last_hidden_state).all())
    True
    """
    base = model.base_model
    layers, count = base.layers, model.config.num_hidden_layers
    base.layers, model.config.num_hidden_layers = layers[block:], count - block
    # a block finds its keys and values by its number
    for number, layer in enumerate(base.layers):
        layer.self_attn.layer_idx = number
    try:
        found = base(inputs_embeds=stream, cache=cache, use_cache=cache is not None)
        return found.last_hidden_state
    finally:
        base.layers, model.config.num_hidden_layers = layers, count
        for number, layer in enumerate(layers):
            layer.self_attn.layer_idx = number


def module_at(model: PreTrainedModel, hookpoint: str) -> nn.Module:
    """The module of a hookpoint; raises UsageError when the model has no such place."""
    site = site_of(hookpoint)
    layers = model.config.num_hidden_layers
    if site.block is not None and site.block >= layers:
        raise UsageError(
            "the model has no such block",
            where=hookpoint,
            expected=f"0 to {layers - 1}",
            found=site.block,
        )
    inner = re.sub(r"^layers\.\d+\.", "", f"{site.module}.{site.side}")
    if getattr(model.config, "qll_folded_norms", False) and AFTER_GAIN.fullmatch(inner):
        raise UsageError(
            "the gains of this model's norms are folded away, so its value here is another",
            where=hookpoint,
            hint="convert with --norms keep, or use a place in the residual stream",
        )
    return model.base_model.get_submodule(site.module)


def width_at(model: PreTrainedModel, hookpoint: str) -> int:
    """The width of the value at a hookpoint.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model = LlamaForCausalLM(config)
    >>> width_at(model, "layers.0"), width_at(model, "layers.0.mlp.down_proj.input")
    (8, 6)
    """
    site, module = site_of(hookpoint), module_at(model, hookpoint)
    if site.module.endswith("_proj"):
        return module.in_features if site.side == "input" else module.out_features
    return model.config.hidden_size


class _Enough(Exception):
    """Everything asked for was seen."""


def _install(site: Site, module: nn.Module, call: Handler) -> Any:
    if site.side == "output":
        return module.register_forward_hook(_on_output(call))
    if site.side == "input":
        return module.register_forward_pre_hook(_on_input(call), with_kwargs=True)
    return module.register_forward_pre_hook(_on_normalized(call, site), with_kwargs=True)


def _on_output(call: Handler) -> Callable[..., Any]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        changed = call(first)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _on_input(call: Handler) -> Callable[..., Any]:
    def hook(module: nn.Module, arguments: tuple, named: dict[str, Any]) -> Any:
        changed = call(arguments[0] if arguments else named["hidden_states"])
        if changed is None:
            return None
        if arguments:
            return (changed, *arguments[1:]), named
        return arguments, named | {"hidden_states": changed}

    return hook


def _on_normalized(call: Handler, site: Site) -> Callable[..., Any]:
    def hook(module: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        value = (arguments[0] if arguments else named["hidden_states"]).float()
        power = value.square().mean(dim=-1, keepdim=True)
        if call(value * torch.rsqrt(power + module.variance_epsilon)) is not None:
            raise UsageError("this place can be read but not changed", where=site.module)

    return hook
