"""What the places in a Llama are called that autoencoders read: one name per place.

The house's name of a place, its hookpoint, is a module path below the base model and stands for
the output of that module, as in EleutherAI's sparsify: `layers.7` is the residual stream after
block 7, `embed_tokens` the one before block 0. Inputs of modules have `.input` at the end, and
`.normalized` is what an RMSNorm computes before it multiplies by its gain.
TransformerLens' names, paths with `model.` in front, and the `layer_N` of the first Llama 3 files
(the INPUT of block N, see the renaming of July 2024 in that repository) are understood.

>>> [hookpoint_of(name) for name in ("blocks.7.hook_resid_post", "model.layers.7", "layer_8")]
['layers.7', 'layers.7', 'layers.7']
>>> hookpoint_of("blocks.0.hook_resid_pre"), hookpoint_of("blocks.3.attn.hook_z")
('embed_tokens', 'layers.3.self_attn.o_proj.input')
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from qll.errors import UsageError
from qll.load.files import shown
from qll.load.names import LAYER

EMBEDDING = "embed_tokens"
# TransformerLens' names within a block -> module below the block, and ".input" for its input
LENS_NAMES = {
    "hook_resid_post": "",
    "hook_resid_mid": ".post_attention_layernorm.input",
    "hook_mlp_in": ".post_attention_layernorm.input",
    "hook_attn_out": ".self_attn",
    "hook_mlp_out": ".mlp",
    "ln1.hook_normalized": ".input_layernorm.normalized",
    "ln2.hook_normalized": ".post_attention_layernorm.normalized",
    "attn.hook_z": ".self_attn.o_proj.input",
    "mlp.hook_in": ".mlp.input",
    "mlp.hook_out": ".mlp",
    "mlp.hook_post": ".mlp.down_proj.input",
}
MODULES = (
    "self_attn|self_attn.o_proj|self_attn.q_proj|self_attn.k_proj|self_attn.v_proj|mlp|"
    "mlp.gate_proj|mlp.up_proj|mlp.down_proj|input_layernorm|post_attention_layernorm"
).replace(".", r"\.")
OWN = re.compile(
    rf"(?:model\.)?(embed_tokens|layers\.{LAYER}(?:\.(?:{MODULES}))?)(?:\.(input|normalized))?"
)
LENS = re.compile(rf"blocks\.{LAYER}\.([a-z0-9_.]+)")
LEGACY = re.compile(f"layer_{LAYER}")


class Site(NamedTuple):
    """A module below the base model, and which of its values is meant."""

    module: str
    side: Literal["input", "output", "normalized"]

    @property
    def block(self) -> int | None:
        """The block it lies in; None for the embedding."""
        found = re.match(r"layers\.(\d+)", self.module)
        return int(found[1]) if found else None


def hookpoint_of(name: str) -> str:
    """The house's name of the place `name`; raises UsageError for a name that is none.

    >>> hookpoint_of("layers.7.mlp"), hookpoint_of("hook_embed")
    ('layers.7.mlp', 'embed_tokens')
    """
    if name == "hook_embed" or name == EMBEDDING:
        return EMBEDDING
    if found := LEGACY.fullmatch(name):
        return _before(int(found[1]))
    if found := LENS.fullmatch(name):
        block, inner = int(found[1]), found[2]
        if inner == "hook_resid_pre":
            return _before(block)
        if inner in LENS_NAMES:
            return f"layers.{block}{LENS_NAMES[inner]}"
    if found := OWN.fullmatch(name):
        module, side = found[1], found[3]
        block = re.fullmatch(r"layers\.(\d+)", module)
        if side == "input" and block:
            return _before(int(block[1]))
        if side is None or module.endswith("layernorm") or (side == "input" and "." in module):
            return f"{module}.{side}" if side else module
    raise UsageError(
        "not a place in a Llama that can be read",
        where="hookpoint",
        expected="for instance embed_tokens, layers.7, layers.7.mlp or blocks.7.hook_resid_post",
        found=repr(shown(name)),
    )


def site_of(hookpoint: str) -> Site:
    """The module of a hookpoint and which side of it is read.

    >>> site_of("layers.3.mlp"), site_of("layers.3.mlp.input").side
    (Site(module='layers.3.mlp', side='output'), 'input')
    """
    name = hookpoint_of(hookpoint)
    module, _, side = name.rpartition(".")
    return Site(module, side) if side in ("input", "normalized") else Site(name, "output")


def neighbour(hookpoint: str, step: int) -> str | None:
    """The same place `step` blocks later; None before the embedding. Blocks have no upper end.

    >>> neighbour("layers.0", -1), neighbour("layers.2.mlp", 1), neighbour("embed_tokens", -1)
    ('embed_tokens', 'layers.3.mlp', None)
    """
    name = hookpoint_of(hookpoint)
    block = site_of(name).block
    place = (-1 if block is None else block) + step
    if block is None or re.fullmatch(r"layers\.\d+", name):
        return _before(place + 1) if place >= -1 else None
    return re.sub(r"^layers\.\d+", f"layers.{place}", name) if place >= 0 else None


def _before(block: int) -> str:
    """The residual stream that block `block` reads."""
    return EMBEDDING if block == 0 else f"layers.{block - 1}"
