"""A straightforward byte transformer and training loop in the manner of nanoGPT, as a baseline.

    python benchmarks/peers/byte_loop.py --data corpus/training --steps 100

What a reader of the GPT-2 paper would write first: learned positions, LayerNorm, a feed-forward
layer of four times the width with GELU, AdamW with warm-up and cosine decay, clipping, batches from
random places of the joined text. Nothing is fused, shared or planned. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs as a script

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from qll.bytelm.evaluate import BOUNDARY, bits_per_byte

VOCAB = 256
WARM_UP = 0.02  # of the run
LEAST_SHARE = 0.1  # of the learning rate, at the end


class Attention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        """What each position reads from those before it."""
        batch, seq, width = x.shape
        q, k, v = (
            part.view(batch, seq, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        read = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(read.transpose(1, 2).reshape(batch, seq, width))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        """The stream after the block."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class LoopModel(nn.Module):
    """Bytes to logits of the next byte; the head is the embedding."""

    def __init__(self, width: int, blocks: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.apply(self._initialise)
        for block in self.blocks:
            for linear in (block.attention.out, block.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * blocks))
        self.head.weight = self.embedding.weight

    def forward(self, ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq 256"]:
        """Logits of the byte after each of `ids`."""
        x = self.embedding(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def train(model: LoopModel, text: Tensor, arguments: argparse.Namespace) -> float:
    """Train and return bytes per second, the first steps left out."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    other = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(arguments.seed)
    context, warm, started = arguments.context, max(1, round(WARM_UP * arguments.steps)), 0.0
    untimed = min(5, arguments.steps - 1)
    for step in range(arguments.steps):
        if step == untimed:
            started = time.monotonic()
        done = (step - warm) / max(1, arguments.steps - warm)
        cosine = LEAST_SHARE + (1 - LEAST_SHARE) * 0.5 * (1 + math.cos(math.pi * max(0.0, done)))
        for group in optimiser.param_groups:
            group["lr"] = arguments.lr * min((step + 1) / warm, cosine)
        places = torch.randint(len(text) - context, (arguments.batch,), generator=generator)
        x = torch.stack([text[place : place + context] for place in places]).long()
        y = torch.stack([text[place + 1 : place + 1 + context] for place in places]).long()
        loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    timed = (arguments.steps - untimed) * arguments.batch * context
    return timed / (time.monotonic() - started)


def main() -> None:
    """Train on a folder, score another, print the result."""
    arguments = parse()
    torch.manual_seed(arguments.seed)
    documents = [path.read_bytes() for path in sorted(arguments.data.iterdir())]
    boundary = bytes([BOUNDARY])
    joined = boundary + boundary.join(documents) + boundary
    text = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
    model = LoopModel(arguments.width, arguments.blocks, arguments.heads, arguments.context)
    speed = train(model, text, arguments)
    result: dict[str, Any] = {
        "bytes_per_second": round(speed, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": arguments.steps * arguments.batch * arguments.context,
    }
    if arguments.held_out is not None:
        held = [path.read_bytes() for path in sorted(arguments.held_out.iterdir())]
        each = arguments.eval_bytes // len(held)
        score = bits_per_byte(model, [document[:each] for document in held], arguments.context)
        result |= {"bits_per_byte": score.bits_per_byte, "scored_bytes": score.bytes}
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    """Sizes of the model and of the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--held_out", type=Path, help="folder of texts to score")
    parser.add_argument("--eval_bytes", type=int, default=262_144)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
