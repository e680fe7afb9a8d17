"""The two passes of a calibration, one block of the model in memory at a time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from qll.calibrate.gram import GramSum
from qll.calibrate.journal import Journal
from qll.calibrate.moments import EMBEDDING_NAME, HEAD_NAME, block_name
from qll.calibrate.probe import BlockProbe, condition
from qll.calibrate.streams import Streams
from qll.errors import NonFiniteError
from qll.load import Source
from qll.model.blocks import build_block, embed, head, run_block

# Bytes of logits, or of embedded windows, that are held at a time.
CHUNK_BYTES = 128 << 20


@dataclass(frozen=True)
class Run:
    """What every stage of one calibration needs."""

    source: Source
    windows: Tensor
    journal: Journal
    gradients: bool
    device: torch.device
    streams: Streams
    progress: tqdm

    @property
    def n_layers(self) -> int:
        return self.source.config.num_hidden_layers

    def resumes_after(self, name: str) -> bool:
        """Whether a later stream than hidden `name` is there, so that it need not be computed."""
        number = int(name.removeprefix("hidden."))
        later = [f"hidden.{i}" for i in range(number, self.n_layers + 1)]
        return any(self.streams.find(stream) is not None for stream in later)


def start(run: Run) -> None:
    if run.resumes_after("hidden.0"):
        return
    hidden = run.streams.create("hidden.0")
    step = max(1, CHUNK_BYTES // (4 * hidden[0].numel()))
    for start in range(0, len(hidden), step):
        hidden[start : start + step] = embed(run.source, run.windows[start : start + step])
    _require_finite(hidden, "model.embed_tokens", "activation")
    run.streams.commit("hidden.0")


def forward_block(run: Run, index: int) -> None:
    """Hidden states behind block `index`; without gradients, its moments too."""
    measured = run.gradients or run.journal.facts(block_name(index)) is not None
    if measured and run.resumes_after(f"hidden.{index + 1}"):
        return
    run.progress.set_description(f"calibrate: block {index} forward")
    block = build_block(run.source, index, device=run.device)
    before, after = run.streams.find(f"hidden.{index}"), run.streams.create(f"hidden.{index + 1}")
    probe = None if measured else BlockProbe(block, gradients=False)
    influence = 0.0
    with torch.no_grad(), _attached(probe):
        for number in range(len(before)):
            hidden = before[number : number + 1].to(run.device)
            output = run_block(block, hidden)
            _require_finite(output, f"model.layers.{index}", "activation")
            influence += _influence(hidden, output)
            after[number] = output[0].cpu()
            run.progress.update(hidden.shape[1] / run.n_layers)
    if probe is not None:
        facts = {"influence": influence / run.windows.numel()}
        run.journal.write(block_name(index), probe.tensors(), facts)
    run.streams.commit(f"hidden.{index + 1}")
    if not run.gradients:
        run.streams.drop(f"hidden.{index}")


def top(run: Run) -> None:
    """Moment of what lm_head reads; with gradients, the loss and its gradient at the last block."""
    last, known = f"gradient.{run.n_layers}", run.journal.facts(HEAD_NAME)
    if known is not None and (not run.gradients or _has_gradient(run, run.n_layers)):
        return
    run.progress.set_description("calibrate: head")
    norm, weight = head(run.source, device=run.device)
    hidden = run.streams.find(f"hidden.{run.n_layers}")
    gram, nll = GramSum(hidden.shape[2]), 0.0
    gradient = run.streams.create(last) if run.gradients else None
    for number in range(len(hidden)):
        state = hidden[number : number + 1].to(run.device).requires_grad_()
        normed = norm(state)
        gram.add(normed[0])
        if gradient is not None:
            targets = run.windows[number, 1:].to(run.device)
            loss, slope = _loss_gradient(normed[0].detach(), weight, targets)
            gradient[number] = torch.autograd.grad(normed, state, slope[None])[0][0].cpu()
            nll += loss
    if known is None:
        counts = torch.bincount(run.windows.flatten().cpu(), minlength=weight.shape[0])
        tensors = {"lm_head.input": gram.packed(), "token_counts": counts}
        scored = run.windows.shape[0] * (run.windows.shape[1] - 1)
        run.journal.write(HEAD_NAME, tensors, {"nll": nll / scored if run.gradients else None})
    if gradient is not None:
        _require_finite(gradient, "lm_head", "gradient")
        run.streams.commit(last)


def backward_block(run: Run, index: int) -> None:
    """Gradient at the input of block `index` and, unless the journal has them, its moments."""
    measured = run.journal.facts(block_name(index)) is not None
    if measured and _has_gradient(run, index):
        return
    run.progress.set_description(f"calibrate: block {index} backward")
    block = build_block(run.source, index, device=run.device)
    hidden = run.streams.find(f"hidden.{index}")
    above = run.streams.find(f"gradient.{index + 1}")
    below = run.streams.create(f"gradient.{index}")
    probe = None if measured else BlockProbe(block, gradients=True)
    influence = 0.0
    with _attached(probe):
        for number in range(len(hidden)):
            state = hidden[number : number + 1].to(run.device).requires_grad_()
            output = run_block(block, state)
            slope = above[number : number + 1].to(run.device)
            (gradient,) = torch.autograd.grad(output, state, slope)
            influence += _influence(state.detach(), output.detach())
            below[number] = gradient[0].cpu()
            run.progress.update(hidden.shape[1] / run.n_layers)
    _require_finite(below, f"model.layers.{index}", "gradient")
    if probe is not None:
        facts = {"influence": influence / run.windows.numel()}
        run.journal.write(block_name(index), probe.tensors(), facts)
    run.streams.commit(f"gradient.{index}")
    run.streams.drop(f"gradient.{index + 1}")
    run.streams.drop(f"hidden.{index + 1}")


def embedding(run: Run) -> None:
    """Moment of the gradients at the embedding's output."""
    gradient = run.streams.find("gradient.0")
    gram = GramSum(gradient.shape[2])
    for number in range(len(gradient)):
        gram.add(condition(gradient[number : number + 1]))
    run.journal.write(EMBEDDING_NAME, {"embed_tokens.grad": gram.packed()}, {})


def _loss_gradient(
    normed: Float[Tensor, "context d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, " scored"],
) -> tuple[float, Float[Tensor, "context d_model"]]:
    """Summed cross-entropy of the next tokens and its gradient: (softmax - one-hot) weight."""
    total, gradient = 0.0, torch.zeros_like(normed)
    step = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    for start in range(0, len(targets), step):
        wanted = targets[start : start + step, None]
        logits = normed[start : start + len(wanted)] @ weight.T
        log_sums = logits.logsumexp(-1, keepdim=True)
        total += float((log_sums - logits.gather(-1, wanted)).cpu().double().sum())
        slopes = logits.sub_(log_sums).exp_()
        slopes.scatter_add_(-1, wanted, -torch.ones_like(wanted, dtype=slopes.dtype))
        gradient[start : start + len(wanted)] = slopes @ weight
    return total, gradient


def _influence(before: Tensor, after: Tensor) -> float:
    """Sum over tokens of 1 - cos(before, after)."""
    return float((1 - torch.cosine_similarity(before, after, dim=-1)).cpu().double().sum())


def _attached(probe: BlockProbe | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if probe is None else probe.attached()


def _has_gradient(run: Run, index: int) -> bool:
    """Whether the gradient at the input of block `index`, or of an earlier one, is there."""
    streams = (run.streams.find(f"gradient.{earlier}") for earlier in range(index + 1))
    return any(stream is not None for stream in streams)


def _require_finite(values: Tensor, where: str, kind: str) -> None:
    if not torch.isfinite(values).all():
        raise NonFiniteError(
            f"{kind} is not finite",
            where=where,
            expected="finite numbers",
            found="NaN or infinity",
            hint="check the checkpoint with `inspect` and the calibration text",
        )
