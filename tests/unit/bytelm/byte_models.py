"""Small byte models for the tests, one per part, with weights that make every part matter."""

from __future__ import annotations

import torch

from qll.bytelm.config import (
    ConceptConfig,
    MemoryConfig,
    MixerConfig,
    ModelConfig,
    StreamConfig,
    WeightConfig,
)
from qll.bytelm.model import ByteModel

SIZE = {"d_model": 16, "n_layers": 2, "n_heads": 2, "context": 8, "d_ff": 24}


def mixer(*pattern: str, **settings) -> dict:
    """Settings of a model with this pattern of mixers, in chunks shorter than the texts."""
    return {"mixer": MixerConfig(pattern=pattern, **{"chunk": 5, "born_width": 4, **settings})}


EVERYTHING = {
    **mixer("interference", "attention", conv=3, states=2),
    "stream": StreamConfig(
        numbers="complex", phase="rotation", brickwall=2, languages=("en", "de")
    ),
    "memory": MemoryConfig(global_tokens=2, memory_tokens=2, segment=6),
    "concept": ConceptConfig(kind="topk", codes=20, k=3),
    "weights": WeightConfig(width_groups=3),
}
PARTS: dict[str, dict] = {
    "plain": {},
    "tied": {"tie": True},
    "learned positions": {"positions": "learned"},
    "learned positions beside memories": {
        "positions": "learned",
        "memory": MemoryConfig(global_tokens=2, memory_tokens=2, segment=6),
    },
    "no positions": {"positions": "none"},
    "convolution": mixer("attention", conv=4),
    "interference": mixer("interference", states=2),
    "interference real": mixer("interference", states=2, numbers="real"),
    "delta": mixer("delta"),
    "delta real": mixer("delta", numbers="real"),
    "born": mixer("born"),
    "born real": mixer("born", numbers="real"),
    "hybrid": mixer("delta", "attention", conv=3),
    "rotation": {"stream": StreamConfig(phase="rotation")},
    "languages": {"stream": StreamConfig(phase="rotation", languages=("en", "de"))},
    "scaling": {"stream": StreamConfig(phase="scaling")},
    "complex": {"stream": StreamConfig(numbers="complex")},
    "complex modReLU": {"stream": StreamConfig(numbers="complex", activation="modrelu")},
    "complex interference": {
        **mixer("interference", states=2),
        "stream": StreamConfig(numbers="complex"),
    },
    "brickwall": {"stream": StreamConfig(brickwall=2)},
    "brickwall exponential": {"stream": StreamConfig(brickwall=2, gates="exponential")},
    "brickwall free": {"stream": StreamConfig(brickwall=2, gates="free")},
    "Born head": {"head": "born"},
    "sum head": {"head": "sum"},
    "prefix": {"memory": MemoryConfig(global_tokens=3)},
    "prefix of a matrix state": {
        **mixer("interference", "born", states=2),
        "memory": MemoryConfig(global_tokens=3),
    },
    "recurrent memory": {"memory": MemoryConfig(memory_tokens=2, segment=6)},
    "vq": {"concept": ConceptConfig(kind="vq", codes=9)},
    "topk": {"concept": ConceptConfig(kind="topk", codes=20, k=3)},
    "dense concepts": {"concept": ConceptConfig(kind="dense", codes=20)},
    "adaptive width": {"weights": WeightConfig(width_groups=3)},
    "lowrank": {"weights": WeightConfig(format="lowrank")},
    "mpo": {"weights": WeightConfig(format="mpo")},
    "tree": {"weights": WeightConfig(format="tree")},
    "kron": {"weights": WeightConfig(format="kron")},
    "adaptive rank": {"weights": WeightConfig(format="lowrank", rank_groups=3)},
    "adapters": {"weights": WeightConfig(lora_rank=2, lora_alpha=4.0)},
    "everything": EVERYTHING,
}


def settings(part: str, **changes) -> ModelConfig:
    """The config of a model with this part."""
    return ModelConfig(**{**SIZE, **PARTS[part], **changes})


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter far from its start, so that nothing is zero or the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            spread = 0.4 / max(1, parameter.shape[-1] if parameter.ndim > 1 else 4) ** 0.5
            parameter.add_(noise.to(parameter) * spread)


def byte_model(part: str, seed: int = 0, **changes) -> ByteModel:
    """A random model with this part, in float64 and eval mode."""
    torch.manual_seed(seed)
    model = ByteModel(settings(part, **changes)).double().eval()
    randomise(model, seed)
    return model


def text(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    """Random bytes; few different ones, so that keys repeat."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, 103, (batch, seq), generator=generator)
