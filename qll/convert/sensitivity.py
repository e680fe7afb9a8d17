"""What a plan's cuts cost, measured: the KL divergence of groups of them, beside the prediction.

A group is one kind of unit in a few neighbouring blocks, as the plan has them. Its matrices alone
are replaced in the dense model, and the mean over tokens of KL(dense || changed) is measured on
held-out windows (the sensitivity of LEMS, compression.md 2A, of several matrices at once and at
the size that is wanted). Blocks below the group are not run again, one block is in memory at a
time, and finished groups are in a journal.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from qll.calibrate import Journal, MomentStore
from qll.convert.candidates import Candidate
from qll.convert.digits import significant
from qll.convert.fit import dense_members, fit
from qll.convert.weights import metrics_of, read_weights
from qll.load import Source
from qll.model.blocks import build_block, embed, head, run_block
from qll.options import ConvertOptions

DEPTHS = 6  # groups of neighbouring blocks, over the depth of the model
TRIAL_TOKENS, TRIAL_CONTEXT = 1024, 512  # of the windows that are measured on
CHUNK = 256  # positions whose logits are in memory at a time


@dataclass(frozen=True)
class Trial:
    """Where losses are measured."""

    windows: Int[Tensor, "windows context"]
    """Text that the moments were not measured on."""
    folder: Path
    """Where what is finished is kept for a resumed run."""
    device: str | torch.device = "cpu"


@dataclass(frozen=True)
class Sensitivity:
    """The loss of one kind of unit in the blocks first .. last, in nats per token."""

    kind: str
    first: int
    last: int
    predicted: float
    measured: float


def kind_of(item: Candidate) -> str:
    """What is measured together: format and matrices, without the block.

    >>> from qll.convert.units import Unit
    >>> unit = Unit(("model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"), ((4, 2),) * 2)
    >>> kind_of(Candidate(unit, None, 16, 0.0))
    'dense gate_proj+up_proj'
    """
    names = "+".join(member.rpartition(".")[2] for member in item.unit.members)
    return f"{'dense' if item.spec is None else item.spec.format} {names}"


def depth_ranges(layers: int) -> list[range]:
    """The blocks of every depth.

    >>> depth_ranges(7)
    [range(0, 2), range(2, 3), range(3, 4), range(4, 5), range(5, 6), range(6, 7)]
    """
    number = min(DEPTHS, layers)
    size, longer = divmod(layers, number)
    starts = [k * size + min(k, longer) for k in range(number + 1)]
    return [range(starts[k], starts[k + 1]) for k in range(number)]


def measure(
    source: Source,
    moments: MomentStore | None,
    options: ConvertOptions,
    chosen: Sequence[Candidate],
    trial: Trial,
) -> list[Sensitivity]:
    """The groups of the candidates in `chosen` that are not dense, each measured alone.

    Resumes in the folder of the trial after a kill. Raises ForeignRunError when that belongs to
    another job.
    """
    windows, folder = trial.windows, trial.folder
    journal = Journal(folder, _job(source, chosen, windows))
    depths = depth_ranges(source.config.num_hidden_layers)
    names = [f"depth.{number:02d}.safetensors" for number in range(len(depths))]
    if any(journal.facts(name) is None for name in names):
        probe = Probe(source, moments, options, trial.device)
        probe.run_dense(windows, depths)
        for blocks, name in zip(depths, names, strict=True):
            if journal.facts(name) is None:
                groups = _groups(chosen, blocks)
                found = probe.divergences(groups, blocks)
                means = {kind: significant(float(kl.double().mean())) for kind, kl in found.items()}
                journal.write(name, found, {"kl": means})
    return [
        line
        for blocks, name in zip(depths, names, strict=True)
        for line in _lines(_groups(chosen, blocks), blocks, journal, name)
    ]


class Probe:
    """The dense model on the windows, and what changes when some of its matrices do."""

    def __init__(
        self,
        source: Source,
        moments: MomentStore | None,
        options: ConvertOptions,
        device: str | torch.device,
    ) -> None:
        # a folded gain is the same function in another place
        self.source, self.moments, self.options = source, moments, replace(options, norms="keep")
        self.device, self.layers = device, source.config.num_hidden_layers
        self.dense: dict[int, Float[Tensor, "windows context d_model"]] = {}

    @torch.no_grad()
    def run_dense(self, windows: Int[Tensor, "windows context"], depths: Sequence[range]) -> None:
        """Keep the dense streams at the start of every depth and at the end of the model."""
        hidden = embed(self.source, windows)
        kept = {blocks.start for blocks in depths} | {self.layers}
        for index in range(self.layers + 1):
            if index in kept:
                self.dense[index] = hidden
            if index < self.layers:
                block = build_block(self.source, index, device=self.device)
                hidden = _run(block, hidden, self.device)

    @torch.no_grad()
    def divergences(
        self, groups: dict[str, list[Candidate]], blocks: range
    ) -> dict[str, Float[Tensor, " tokens"]]:
        """KL(dense || changed) at every position, for each group of cuts in `blocks` alone."""
        hidden = dict.fromkeys(groups, self.dense[blocks.start])
        bar = tqdm(
            range(blocks.start, self.layers),
            f"measure: blocks {blocks.start} to {blocks.stop - 1}",
            unit="block",
            file=sys.stderr,
            disable=None,
        )
        for index in bar:
            block = build_block(self.source, index, device=self.device)
            for kind, items in groups.items():
                here = [item for item in items if item.unit.block == index]
                with replaced(block, self._matrices(here, index)):
                    hidden[kind] = _run(block, hidden[kind], self.device)
        return self._divergences(hidden)

    def _matrices(self, items: Sequence[Candidate], index: int) -> dict[str, Tensor]:
        """The matrices that the candidates stand for, by their path inside block `index`."""
        found = {}
        for item in items:
            members = item.unit.members
            weights = read_weights(self.source, members, self.options)
            metrics = metrics_of(self.source, self.moments, members, self.options)
            spec = item.spec.with_gauge("none")
            network = fit(weights, spec, metrics, torch.float32, self.options.sweeps).network
            prefix = f"model.layers.{index}."
            for member, matrix in zip(members, dense_members(network), strict=True):
                found[member.removeprefix(prefix)] = matrix.to(self.device)
        return found

    def _divergences(self, hidden: dict[str, Tensor]) -> dict[str, Tensor]:
        norm, weight = head(self.source, device=self.device)
        ends = self.dense[self.layers].flatten(0, 1).split(CHUNK)
        changed = {kind: state.flatten(0, 1).split(CHUNK) for kind, state in hidden.items()}
        found: dict[str, list[Tensor]] = {kind: [] for kind in hidden}
        for number, end in enumerate(ends):
            dense = (norm(end.to(self.device)) @ weight.T).log_softmax(-1)
            for kind, states in changed.items():
                other = (norm(states[number].to(self.device)) @ weight.T).log_softmax(-1)
                found[kind].append((dense.exp() * (dense - other)).sum(-1).cpu())
        return {kind: torch.cat(parts) for kind, parts in found.items()}


@contextmanager
def replaced(block: nn.Module, matrices: dict[str, Tensor]) -> Iterator[None]:
    """Other weights in the linear layers of `block` inside the `with`, by their paths in it.

    >>> block = nn.Sequential(nn.Linear(1, 1, bias=False)); before = block[0].weight.item()
    >>> with replaced(block, {"0": torch.full((1, 1), 7.0)}): block[0].weight.item()
    7.0
    >>> block[0].weight.item() == before
    True
    """
    linears = {path: block.get_submodule(path) for path in matrices}
    before = {path: linear.weight for path, linear in linears.items()}
    for path, linear in linears.items():
        linear.weight = nn.Parameter(matrices[path], requires_grad=False)
    try:
        yield
    finally:
        for path, linear in linears.items():
            linear.weight = before[path]


def _run(block: nn.Module, hidden: Tensor, device: str | torch.device) -> Tensor:
    return torch.cat([run_block(block, state[None].to(device)).cpu() for state in hidden])


def _groups(chosen: Sequence[Candidate], blocks: range) -> dict[str, list[Candidate]]:
    """The candidates in `blocks` that lose something, by kind."""
    groups: dict[str, list[Candidate]] = {}
    for item in chosen:
        if item.unit.block in blocks and item.spec is not None:
            groups.setdefault(kind_of(item), []).append(item)
    return dict(sorted(groups.items()))


def _lines(
    groups: dict[str, list[Candidate]], blocks: range, journal: Journal, name: str
) -> Iterator[Sensitivity]:
    measured = journal.facts(name)["kl"]
    for kind, items in groups.items():
        predicted = sum(item.loss for item in items)
        yield Sensitivity(
            kind, blocks.start, blocks.stop - 1, significant(predicted), measured[kind]
        )


def _job(source: Source, chosen: Sequence[Candidate], windows: Tensor) -> dict[str, Any]:
    specs = [(item.unit.members, item.spec and item.spec.to_json()) for item in chosen]
    facts = repr(specs).encode() + windows.contiguous().numpy().tobytes()
    return {"source": source.fingerprint, "inputs": hashlib.sha256(facts).hexdigest()}
