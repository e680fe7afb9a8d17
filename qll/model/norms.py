"""RMSNorm gains multiplied into the matrices that read them: the same function, fewer surprises.

RMSNorm(x) = g * x / rms(x), so W (g * z) = (W diag(g)) z: columns scaled by the gain, gains set to
one. A truncation of W diag(g) weighs each channel by how loud it is. The final norm can only be
folded when the output head is a matrix of its own (a tied head is also the embedding table).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaConfig

FINAL_NORM = "model.norm.weight"
# Norm of a block -> the matrices of the block that read its output.
READERS = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}


def fold_gain(
    weight: Float[Tensor, "out into"], gain: Float[Tensor, " into"]
) -> Float[Tensor, "out into"]:
    """`weight` with column j multiplied by gain[j]; float32 at least, so that nothing is rounded.

    >>> fold_gain(torch.ones(1, 2), torch.tensor([2.0, 3.0])).tolist()
    [[2.0, 3.0]]
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) * gain.to(wide)


def gain_of(member: str, config: LlamaConfig) -> str | None:
    """Name of the gain that can be folded into the matrix at path `member`, or None.

    >>> gain_of("model.layers.2.mlp.up_proj", LlamaConfig())
    'model.layers.2.post_attention_layernorm.weight'
    >>> gain_of("lm_head", LlamaConfig(tie_word_embeddings=True)) is None
    True
    """
    if member == "lm_head":
        return None if config.tie_word_embeddings else FINAL_NORM
    # model.layers.<i>.<self_attn or mlp>.<matrix>
    parts = member.split(".")
    for norm, readers in READERS.items():
        if parts[-1] in readers:
            return ".".join([*parts[:-2], norm, "weight"])
    return None
