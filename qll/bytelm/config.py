"""What a byte model is made of: one switch per idea, all off by default, which is the plain twin.

Nothing here imports torch. Every part that is called quantum-inspired names its real-valued twin of
equally many parameters beside it (`numbers="real"`, `phase="scaling"`, `gates="free"`,
`kind="dense"`).

>>> ModelConfig(mixer=MixerConfig(pattern=("interference", "attention"))).mixer_of(2)
'interference'
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qll.errors import UsageError
from qll.options import require_positive, require_share

VOCAB = 256  # the model reads and writes bytes
MOST_LANGUAGES = 255  # 256 times the number of a language, and a byte, fit in 16 bits
Mixer = Literal["attention", "interference", "delta", "born"]
Numbers = Literal["complex", "real"]


@dataclass(frozen=True)
class MixerConfig:
    """How positions exchange information."""

    pattern: tuple[Mixer, ...] = ("attention",)
    """Mixer of each block, repeated from the first when there are more blocks than names."""
    numbers: Numbers = "complex"
    """Keys, queries and values of interference, delta and born; real is the twin."""
    states: int = 1
    """Matrix states per head of interference, each with its own decay and phase."""
    chunk: int = 64
    """Positions that are mixed by one matrix product in the chunked form."""
    born_width: int = 16
    """Width of a Born key; its state has about half the square of it rows (complex: a quarter)."""
    conv: int = 0
    """Width of a short causal convolution in front of every mixer; 0 for none."""

    def __post_init__(self) -> None:
        if not self.pattern or set(self.pattern) - set(typing.get_args(Mixer)):
            raise UsageError(
                "not a pattern of mixers",
                where="mixer.pattern",
                expected=f"names of {', '.join(typing.get_args(Mixer))}",
                found=self.pattern,
            )
        for name, least in (("states", 1), ("chunk", 1), ("born_width", 2), ("conv", 0)):
            require_positive(f"mixer.{name}", getattr(self, name), least=least)
        if self.born_width % 2:
            raise UsageError("must be even", where="mixer.born_width", found=self.born_width)


@dataclass(frozen=True)
class StreamConfig:
    """What flows from block to block."""

    numbers: Numbers = "real"
    """complex: neighbouring channels are the two parts of one complex number throughout."""
    activation: Literal["modulus", "modrelu"] = "modulus"
    """What a gate g does to x in a complex stream: x relu(|g| + b), or modReLU of x |g|."""
    phase: Literal["off", "rotation", "scaling"] = "off"
    """Rotation of channel pairs by an angle of content and position; scaling is its real twin."""
    languages: tuple[str, ...] = ()
    """Languages in whose texts every pair turns by an angle of the language too."""
    brickwall: int = 0
    """Layers of two-site gates on the channels at the entrance of each block; 0 for none."""
    gates: Literal["cayley", "exponential", "free"] = "cayley"
    """How the gates are made orthogonal; free gates are their twin and are not."""

    def __post_init__(self) -> None:
        require_positive("stream.brickwall", self.brickwall, least=0)
        if self.languages and self.phase == "off":
            raise UsageError(
                "are angles of the phase rotation",
                where="stream.languages",
                found="stream.phase=off",
                hint="--set stream.phase=rotation",
            )
        named = {word for word in self.languages if word and not set(word) & set("./\\")}
        if not len(named) == len(self.languages) <= MOST_LANGUAGES:
            raise UsageError(
                "not names of languages",
                where="stream.languages",
                expected=f"at most {MOST_LANGUAGES} different words without . and /",
                found=" ".join(self.languages),
            )
        if self.activation == "modrelu" and self.numbers != "complex":
            raise UsageError(
                "is of complex numbers", where="stream.activation", hint="stream.numbers=complex"
            )


@dataclass(frozen=True)
class MemoryConfig:
    """What lies beyond the window."""

    global_tokens: int = 0
    """Learned keys and values that every position of every attention block sees."""
    memory_tokens: int = 0
    """Recurrent memory: so many vectors are read and rewritten at the end of every segment."""
    segment: int = 0
    """Bytes between two writes of the recurrent memory; 0 is half the context, so that what is
    written in a window of training is read in it."""

    def __post_init__(self) -> None:
        for name in ("global_tokens", "memory_tokens", "segment"):
            require_positive(f"memory.{name}", getattr(self, name), least=0)


@dataclass(frozen=True)
class ConceptConfig:
    """A codebook in the residual stream."""

    kind: Literal["off", "vq", "topk", "dense", "sae"] = "off"
    """vq: nearest code; topk: k strongest; dense, the twin: all; sae: an autoencoder of before."""
    codes: int = 512
    """Codes in the book (features of the autoencoder)."""
    k: int = 8
    """Codes a position uses (vq uses one)."""
    layer: int | None = None
    """Block after which it acts; default: the middle one."""

    def __post_init__(self) -> None:
        require_positive("concept.codes", self.codes, least=1)
        require_positive("concept.k", self.k, least=1)
        if self.k > self.codes:
            raise UsageError(
                "more than there are codes",
                where="concept.k",
                expected=f"at most {self.codes}",
                found=self.k,
            )


@dataclass(frozen=True)
class WeightConfig:
    """How the linear layers of the blocks are stored and used."""

    format: Literal["dense", "lowrank", "mpo", "tree", "kron"] = "dense"
    """Tensor network in place of every dense linear of the blocks."""
    keep: float = 0.5
    """Share of a linear's parameters that its network keeps, in (0, 1]."""
    width_groups: int = 0
    """Groups of feed-forward channels that each position opens a number of; 0: all are open."""
    rank_groups: int = 0
    """Groups of a low-rank linear's bond components that each position opens a number of; 0: all
    are open."""
    lora_rank: int = 0
    """Rank of low-rank adapters on every dense linear of the blocks; 0 for none."""
    lora_alpha: float = 64.0
    """The adapters' output is multiplied by lora_alpha / lora_rank."""
    lora_train_only: bool = False
    """Freeze everything but the adapters."""

    def __post_init__(self) -> None:
        require_share("weights.keep", self.keep)
        require_positive("weights.width_groups", self.width_groups, least=0)
        require_positive("weights.rank_groups", self.rank_groups, least=0)
        if self.rank_groups and self.format != "lowrank":
            raise UsageError(
                "groups the bond of a low-rank linear",
                where="weights.rank_groups",
                expected="weights.format=lowrank",
                found=self.format,
            )
        require_positive("weights.lora_rank", self.lora_rank, least=0)
        if not 0 < self.lora_alpha < math.inf:
            raise UsageError("must be positive", where="lora_alpha", found=self.lora_alpha)
        if self.lora_rank and self.format != "dense":
            raise UsageError("adapters need dense weights", where="lora_rank", found=self.format)
        if self.lora_train_only and not self.lora_rank:
            raise UsageError(
                "needs adapters", where="lora_train_only", hint="set lora_rank, for instance 32"
            )


@dataclass(frozen=True)
class LossConfig:
    """What is minimised beside the cross-entropy; every weight of an energy is 0 by default."""

    coherence: float = 0.0
    """Weight of the neighbour energy: 1 - mean cos of the phase difference of neighbours."""
    interference: float = 0.0
    """Weight of the all-pairs energy: the same over every two positions."""
    entanglement: float = 0.0
    """Weight of 1 - entropy across the middle cut of the state over the largest possible."""
    unlikelihood: float = 0.0
    """Weight of the unlikelihood of repeating what followed the same few bytes before."""
    codebook: float = 0.25
    """Weight of the concept layer's own loss, when there is one."""
    width: float = 0.01
    """Weight of the open share of feed-forward channels, when positions choose it."""
    rank: float = 0.01
    """Weight of the open share of the linears' bonds, when positions choose it."""
    weighting: Literal["constant", "ramp", "uncertainty"] = "constant"
    """ramp: a weight grows linearly over the first half of the run, counted from the first stage
    that has it; uncertainty: they are learned."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name != "weighting" and not 0 <= value < math.inf:
                raise UsageError(
                    "not a weight", where=name, expected="a number of at least 0", found=value
                )


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes and the function of a byte model but its numbers."""

    d_model: int = 256
    """Channels of the residual stream; two make one complex channel."""
    n_layers: int = 4
    """Blocks."""
    n_heads: int = 4
    """Heads of every mixer."""
    context: int = 256
    """Bytes a position of an attention block sees, itself included."""
    d_ff: int | None = None
    """Hidden channels of the feed-forward layers; default: 8/3 d_model, a multiple of 32."""
    dropout: float = 0.0
    """Share of a block's output that is dropped in training, in [0, 1)."""
    tie: bool = False
    """Use the byte embedding as output head too."""
    positions: Literal["rotary", "learned", "none"] = "rotary"
    """Where bytes stand: keys and queries turn; learned: a vector for each of `context` positions,
    after which they begin again; none: causal order alone."""
    head: Literal["softmax", "born", "sum"] = "softmax"
    """born: a complex amplitude per byte, whose square is its probability; sum, its twin: two
    numbers per byte that are added to its logit."""
    mixer: MixerConfig = field(default_factory=MixerConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    concept: ConceptConfig = field(default_factory=ConceptConfig)
    weights: WeightConfig = field(default_factory=WeightConfig)

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "context"):
            require_positive(name, getattr(self, name), least=1)
        if self.d_model % (2 * self.n_heads):
            raise UsageError(
                "heads must have an even number of channels",
                where="d_model",
                expected=f"a multiple of {2 * self.n_heads}",
                found=self.d_model,
            )
        if self.d_ff is not None and (self.d_ff < 2 or self.d_ff % 2):
            raise UsageError("must be even and positive", where="d_ff", found=self.d_ff)
        if not 0 <= self.dropout < 1:
            raise UsageError("out of range", where="dropout", expected="[0, 1)", found=self.dropout)
        if self.weights.lora_rank and self.stream.numbers == "complex":
            raise UsageError("adapters are real", where="lora_rank", hint="use a real stream")
        groups = self.weights.width_groups
        if groups and self.d_hidden % (2 * groups):
            raise UsageError(
                "does not divide the feed-forward channels",
                where="weights.width_groups",
                expected=f"a divisor of {self.d_hidden // 2}",
                found=groups,
            )
        if self.tie and self.head != "softmax":
            raise UsageError("has two numbers per byte and cannot be tied", where="head")
        layer = self.concept.layer
        if layer is not None and not 0 <= layer < self.n_layers:
            raise UsageError(
                "no such block",
                where="concept.layer",
                expected=f"0 to {self.n_layers - 1}",
                found=layer,
            )

    @property
    def d_head(self) -> int:
        """Channels of a head."""
        return self.d_model // self.n_heads

    @property
    def d_hidden(self) -> int:
        """Hidden channels of the feed-forward layers."""
        return self.d_ff if self.d_ff is not None else max(32, round(self.d_model / 12) * 32)

    @property
    def segment(self) -> int:
        """Bytes between two writes of the recurrent memory."""
        return self.memory.segment or max(1, self.context // 2)

    @property
    def concept_layer(self) -> int:
        """The block after which the concept layer acts."""
        layer = self.concept.layer
        return (self.n_layers - 1) // 2 if layer is None else layer

    def mixer_of(self, layer: int) -> Mixer:
        """The mixer of block `layer`."""
        return self.mixer.pattern[layer % len(self.mixer.pattern)]

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; `from_dict` is its inverse.

        >>> ModelConfig.from_dict(ModelConfig(d_ff=64).to_dict()) == ModelConfig(d_ff=64)
        True
        """
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, value: Any) -> ModelConfig:
        """The config written by `to_dict`; keys that are absent have their defaults.

        Raises UsageError for an unknown key, a value of another type, or one out of range.

        >>> ModelConfig.from_dict({"d_modle": 3})
        Traceback (most recent call last):
        ...
        qll.errors.UsageError: d_modle: no such setting (expected one of d_model, n_layers, \
n_heads, context, d_ff, dropout, tie, positions, head, mixer, stream, memory, concept, weights)
        """
        return _read(cls, value, "model config")


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as a dataclass, tuple, optional, literal or plain type; UsageError when it is not."""
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            expected = f"one of {', '.join(map(str, choices))}"
            raise UsageError("no such choice", where=where, expected=expected, found=repr(value))
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(choices[0], value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError("wrong type", where=where, expected="a list", found=repr(value))
        return tuple(_read(choices[0], item, where) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError("wrong type", where=where, expected=kind.__name__, found=repr(value))
    return value


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise UsageError("wrong type", where=where, expected="an object", found=repr(value))
    hints = typing.get_type_hints(kind)
    for name in value:
        if name not in hints:
            expected = f"one of {', '.join(hints)}"
            raise UsageError("no such setting", where=name, expected=expected)
    return kind(**{name: _read(hints[name], inner, name) for name, inner in value.items()})
