"""Block refinement: each block trained to undo what the blocks before it and its own cuts did.

Two streams run through the model side by side: the original one, and the one of the blocks that are
already converted. A block's cores, the matrices left dense in it and its norm gains are trained so
that the converted block on the converted stream gives what the original block gives on the original
stream (AA-SVD, compression.md 2C). Only the block in hand is in memory; no gradient crosses blocks.

The error is measured where the loss feels it: in the second moment of the gradient at the block's
output (that of down_proj, which adds to the same residual stream). Single tokens whose state is a
hundred times longer than the others (attention sinks) would drown the rest and are weighed down.
"""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from qll.calibrate import Journal, MomentStore, Streams
from qll.convert.assemble import block_tensors
from qll.convert.digits import significant
from qll.convert.metric import SHRINK_GRAD, factor, shrink
from qll.convert.plan import Plan
from qll.convert.stored import trained_path
from qll.errors import TextError
from qll.load import Source
from qll.model.blocks import build_block, build_network_block, embed, run_block
from qll.options import ConvertOptions
from qll.train import Optimiser, autocast, prepare_training

HELD_OUT = 8  # one window in so many is not trained on, and the last of fewer
REPORTED = ("error_before", "error_after", "best_pass")


@dataclass(frozen=True)
class RefineSettings:
    """How long and how fast each block is trained."""

    passes: int
    """Passes over the windows."""
    rate: float
    """Highest learning rate."""
    batch_tokens: int = 1024
    """Tokens per step, at least one window."""
    precision: torch.dtype = torch.float32
    """Dtype of matrix products."""
    seed: int = 0
    """Order of the windows."""


@dataclass(frozen=True)
class Task:
    """What one block is trained on: its inputs, its targets, and how errors count."""

    inputs: Float[Tensor, "windows context d_model"]
    targets: Float[Tensor, "windows context d_model"]
    root: Float[Tensor, "d_model d_model"] | None
    token_weights: Float[Tensor, "windows context"]
    scale: float


def refine(
    source: Source,
    plan: Plan,
    options: ConvertOptions,
    moments: MomentStore | None,
    windows: Int[Tensor, "windows context"],
    cores: Path,
    work: Path,
    settings: RefineSettings,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Train block after block; leaves `block.NNNN.safetensors` in `work`, for `assemble`.

    Returns per block `error_before` and `error_after`: the held-out error over that of doing
    nothing, both in the metric of the block's output. A block that training does not help keeps its
    closed form. Blocks that an earlier call finished are only run.
    """
    journal = Journal(work, _job(plan, windows, settings))
    layers = source.config.num_hidden_layers
    if all(journal.facts(_file(index)) is not None for index in range(layers)):
        return [_reported(journal, index) for index in range(layers)]
    require_held_out(windows)
    d_model = source.config.hidden_size
    streams = Streams(work, (*windows.shape, d_model), count=4)
    reached = [i for i in range(layers + 1) if streams.find(f"converted.{i}") is not None]
    if not reached:
        for name in ("original.0", "converted.0"):
            streams.create(name).copy_(embed(source, windows))
            streams.commit(name)
    run = _Run(source, plan, options, moments, cores, journal, streams, settings, device)
    facts = []
    bar = tqdm(range(layers), "refine", unit="block", file=sys.stderr, disable=None)
    for index in bar:
        if index >= max(reached, default=0):
            run.step(index)
        line = _reported(journal, index)
        facts.append(line)
        bar.set_postfix_str(f"error {line['error_before']:.3f} -> {line['error_after']:.3f}")
    streams.close()
    return facts


def refine_block(
    block: nn.Module, task: Task, settings: RefineSettings, trained: list[nn.Parameter]
) -> dict[str, Any]:
    """Train `trained` of `block` in place on `task`; keeps the parameters of the best pass.

    Returns `error_before`, `error_after` on the held-out windows and `best_pass` (0: the closed
    form). Raises NonFiniteError when the loss is not a number.
    """
    device = trained[0].device
    numbers = torch.arange(len(task.inputs))
    held = numbers % HELD_OUT == min(HELD_OUT, len(numbers)) - 1
    used, checked = numbers[~held], numbers[held]
    size = max(1, settings.batch_tokens // task.inputs.shape[1])
    optimiser = Optimiser(trained, settings.rate, settings.passes * math.ceil(len(used) / size))
    before = best = _held_out_error(block, task, checked, size, settings, device)
    kept, best_pass = [p.detach().clone() for p in trained], 0
    for number in range(settings.passes):
        order = torch.Generator().manual_seed(settings.seed * 1000 + number)
        for batch in used[torch.randperm(len(used), generator=order)].split(size):
            loss = _error(block, task, batch, settings, device)
            loss.backward()
            optimiser.step(loss.item())
        found = _held_out_error(block, task, checked, size, settings, device)
        if found < best:
            best, best_pass = found, number + 1
            kept = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    errors = {"error_before": significant(before**0.5), "error_after": significant(best**0.5)}
    return {**errors, "best_pass": best_pass}


@dataclass(frozen=True)
class _Run:
    """What all blocks of one refinement share."""

    source: Source
    plan: Plan
    options: ConvertOptions
    moments: MomentStore | None
    cores: Path
    journal: Journal
    streams: Streams
    settings: RefineSettings
    device: torch.device

    def step(self, index: int) -> None:
        """Both streams one block on; what block `index` was trained to goes to the journal."""
        original, converted = (
            self.streams.find(f"{kind}.{index}") for kind in ("original", "converted")
        )
        targets = self._targets(index, original)
        block = self._converted_block(index)
        if self.journal.facts(_file(index)) is None:
            self._train(index, block, _task(original, converted, targets, self.moments, index))
        self._run_stream(block, converted, f"converted.{index + 1}")
        for kind in ("original", "converted"):
            self.streams.drop(f"{kind}.{index}")

    def _targets(self, index: int, original: Tensor) -> Tensor:
        """What the original block `index` gives on the original stream."""
        name = f"original.{index + 1}"
        found = self.streams.find(name)
        if found is not None:
            return found
        dense = build_block(self.source, index, device=self.device)
        prepare_training(dense, self.settings.precision, self.device)
        return self._run_stream(dense, original, name)

    def _converted_block(self, index: int) -> nn.Module:
        """Block `index` with its networks, trained where the journal says so."""
        trained = None if self.journal.facts(_file(index)) is None else self.journal.folder
        tensors = block_tensors(self.source, self.plan, self.options, self.cores, index, trained)
        entries = {e.unit.members: e.spec for e in self.plan.of_block(index) if e.spec is not None}
        block = build_network_block(self.source.config, index, entries, tensors, self.device)
        prepare_training(block, self.settings.precision, self.device)
        return block

    def _train(self, index: int, block: nn.Module, task: Task) -> None:
        trained = [
            parameter
            for name, parameter in block.named_parameters()
            if self.options.norms == "keep" or "norm" not in name
        ]
        for parameter in trained:
            parameter.requires_grad_()
        facts = refine_block(block, task, self.settings, trained)
        block.requires_grad_(False)
        values = {
            f"model.layers.{index}.{name}": p.detach().cpu() for name, p in block.named_parameters()
        }
        self.journal.write(_file(index), values, facts)

    @torch.no_grad()
    def _run_stream(self, block: nn.Module, before: Tensor, name: str) -> Tensor:
        """The stream `name`: what `block` gives on `before`, window by window."""
        after = self.streams.create(name)
        for number in range(len(before)):
            with autocast(self.settings.precision, self.device):
                window = before[number : number + 1].to(self.device)
                after[number] = run_block(block, window)[0].cpu()
        self.streams.commit(name)
        return after


def _task(
    original: Tensor, converted: Tensor, targets: Tensor, moments: MomentStore | None, index: int
) -> Task:
    root = None
    if moments is not None and moments.gradients:
        linear = moments.linear(f"model.layers.{index}.mlp.down_proj")
        root = factor(shrink(linear.grad / linear.grad_tokens, SHRINK_GRAD)).root.float()
    lengths = targets.square().sum(-1)
    weights = 1 / (lengths / lengths.median()).clamp(min=1)
    update = _seen(targets - original, root).square().sum(-1)
    return Task(converted, targets, root, weights, float((weights * update).mean()))


def _error(
    block: nn.Module, task: Task, batch: Tensor, settings: RefineSettings, device: torch.device
) -> Tensor:
    """Mean squared error on the windows `batch`, over that of leaving the stream as it is."""
    with autocast(settings.precision, device):
        output = run_block(block, task.inputs[batch].to(device))
    root = None if task.root is None else task.root.to(device)
    error = _seen(output.float() - task.targets[batch].to(device), root).square().sum(-1)
    return (task.token_weights[batch].to(device) * error).mean() / task.scale


@torch.no_grad()
def _held_out_error(
    block: nn.Module,
    task: Task,
    checked: Tensor,
    size: int,
    settings: RefineSettings,
    device: torch.device,
) -> float:
    parts = checked.split(size)
    errors = [len(part) * _error(block, task, part, settings, device).item() for part in parts]
    return sum(errors) / len(checked)


def _seen(error: Tensor, root: Tensor | None) -> Tensor:
    return error if root is None else error @ root


def require_held_out(windows: Int[Tensor, "windows context"]) -> None:
    """Raise TextError for windows too few to train on some and hold out others.

    >>> require_held_out(torch.zeros(2, 4, dtype=torch.long))
    """
    if len(windows) < 2:
        raise TextError(
            "too little text to refine on",
            expected="at least 2 windows, one of them held out",
            found=len(windows),
            hint="raise --refine_tokens, shorten --train_context, or use --effort fast",
        )


def _reported(journal: Journal, index: int) -> dict[str, Any]:
    line = journal.facts(_file(index))
    return {"block": index, **{key: line[key] for key in REPORTED}}


def _file(index: int) -> str:
    return trained_path(Path(), index).name


def _job(plan: Plan, windows: Tensor, settings: RefineSettings) -> dict[str, Any]:
    chosen = repr(plan.to_json()).encode() + windows.contiguous().numpy().tobytes()
    facts = {key: str(value) for key, value in asdict(settings).items()}
    return {**facts, "inputs": hashlib.sha256(chosen).hexdigest()}
