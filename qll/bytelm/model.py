"""The byte model: bytes -> vectors -> blocks -> logits of the next byte.

An id is a byte, or a byte and its language where the model knows languages: see
qll/bytelm/languages.py.

`forward` reads whole sequences at once, which is how it learns; `step` goes on from a state, which
is how it writes and how it carries what it read from one segment to the next. Both compute the
same function.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qll.bytelm.adapter import freeze_base
from qll.bytelm.block import Block
from qll.bytelm.born_head import AmplitudeHead
from qll.bytelm.concept import Concept
from qll.bytelm.config import VOCAB, ModelConfig
from qll.bytelm.context import Context, Notes
from qll.bytelm.initial import initialise
from qll.bytelm.linears import norm
from qll.bytelm.positions import LearnedPositions, mixer_angles
from qll.bytelm.recurrent_memory import RecurrentMemory
from qll.bytelm.state import LayerState, State


class ByteModel(nn.Module):
    """A causal language model over bytes; logits at t predict the byte at t + 1.

    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8))
    >>> model(torch.tensor([[104, 105]])).shape
    torch.Size([1, 2, 256])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCAB, config.d_model)
        self.positions = LearnedPositions(config) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.concept = Concept(config) if config.concept.kind != "off" else None
        self.memory = RecurrentMemory(config) if config.memory.memory_tokens else None
        self.norm = norm(config, config.d_model)
        self.head = output_head(config)
        initialise(self, config.n_layers)
        if config.tie:
            self.head.weight = self.embedding.weight
        if config.weights.lora_train_only:
            freeze_base(self)

    def forward(self, ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq 256"]:
        """Logits of the byte after each of `ids`."""
        return self.step(ids, self.initial_state(len(ids), ids.device))[0]

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> State:
        """The state before the first byte; in training, learned positions begin anywhere."""
        weight = self.embedding.weight
        like = weight.new_zeros(batch, self.config.d_model, device=device or weight.device)
        layers = tuple(block.initial_state(like) for block in self.blocks)
        memory = None if self.memory is None else self.memory.initial(like)
        shifted = self.positions is not None and self.training
        return State(0, layers, memory, self.positions.random_start() if shifted else 0)

    def step(
        self, ids: Int[Tensor, "batch seq"], state: State, notes: Notes | None = None
    ) -> tuple[Float[Tensor, "batch seq 256"], State]:
        """Logits of the byte after each of `ids`, which follow those of `state`, and the new state.

        notes: where layers leave what the losses ask for.

        >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8)).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> first, state = model.step(ids[:, :2], model.initial_state(1))
        >>> last, state = model.step(ids[:, 2:], state)
        >>> torch.cat((first, last), dim=1).allclose(model(ids), atol=1e-5), state.position
        (True, 3)
        """
        streams = []
        for piece in self.pieces(ids, state.position):
            piece, languages = self._split(piece)
            x, state = self._read(self._embedded(piece, state), state, notes, languages)
            streams.append(x)
        stream = streams[0] if len(streams) == 1 else torch.cat(streams, dim=1)
        if notes is not None:
            notes["stream"] = [stream]
        return self.head(self.norm(stream)), state

    def num_params(self) -> int:
        """Numbers that the model holds; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def pieces(self, ids: Int[Tensor, "batch seq"], position: int) -> list[Tensor]:
        """`ids` from `position` on, cut where the recurrent memory is written; one without it."""
        if self.memory is None:
            return [ids]
        first, every = self.memory.until_write(position), self.memory.segment
        return list(ids.tensor_split(tuple(range(first, ids.shape[1], every)), dim=1))

    def _split(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Bytes, and the numbers of their languages where the model knows any."""
        if not self.config.stream.languages:
            return ids, None
        return ids % VOCAB, ids // VOCAB

    def _embedded(self, ids: Tensor, state: State) -> Tensor:
        """The stream before the first block."""
        x = self.embedding(ids)
        if self.positions is None:
            return x
        return x + self.positions(state.shift + state.position, ids.shape[1])

    def _read(
        self, x: Tensor, state: State, notes: Notes | None, languages: Tensor | None
    ) -> tuple[Tensor, State]:
        """The stream of the next bytes, and the state after them (and after a write to memory)."""
        end, memory = state.position + x.shape[1], state.memory
        if self.memory is None:
            x, layers = self._blocks(x, state.layers, state.position, notes, languages)
            return x, replace(state, position=end, layers=layers)
        start = state.position + self.memory.places_before(state.position)
        stream, layers = self._blocks(x, state.layers, start, notes, languages)
        if end % self.memory.segment == 0:
            written, layers = self._blocks(memory, layers, start + x.shape[1], notes, None)
            memory = self.memory.update(memory, written)
        return stream, replace(state, position=end, layers=layers, memory=memory)

    def _blocks(
        self,
        x: Tensor,
        layers: tuple[LayerState, ...],
        start: int,
        notes: Notes | None,
        languages: Tensor | None,
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """The stream after all blocks, from place `start` on, and the blocks' states."""
        width = self.config.d_head
        angles = mixer_angles(self.config, start, x.shape[1], width, x.device, x.dtype)
        context, after = Context(start, angles, languages, notes), []
        for index, (block, layer) in enumerate(zip(self.blocks, layers, strict=True)):
            x, layer = block(x, layer, context)
            after.append(layer)
            if self.concept is not None and index == self.config.concept_layer:
                x = self.concept(x, context)
        return x, tuple(after)


def output_head(config: ModelConfig) -> nn.Linear:
    """What turns the stream into logits."""
    if config.head == "softmax":
        return nn.Linear(config.d_model, VOCAB, bias=False)
    return AmplitudeHead(config)
