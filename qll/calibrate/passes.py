"""The two passes of a calibration, one block of the model in memory at a time.

Streams are named by where they lie: `hidden.i` is the input of block i (hidden.n_layers that of the
final norm), `gradient.i` the gradient of the summed loss with respect to `hidden.i`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qll.calibrate.gram import GramSum
from qll.calibrate.journal import Journal
from qll.calibrate.moments import EMBEDDING_NAME, HEAD_NAME, block_name
from qll.calibrate.probe import BlockProbe, condition
from qll.calibrate.streams import Streams
from qll.errors import NonFiniteError
from qll.load import Source, expect_block
from qll.model.blocks import build_block, embed, final_norm, head_matrix, run_block

Labels = Literal["sampled", "text"]
# Bytes of logits, or of embedded windows, that are held at a time.
CHUNK_BYTES = 128 << 20


@dataclass(frozen=True)
class ExtraGradients:
    """Something other than the loss that a conversion should preserve: gradients added to its own.

    `at` maps a block to a function (number of the window, the block's output [context, d_model],
    the loss's gradient there, the same shape) -> what is added to that gradient. It flows back
    through everything before. `facts` is JSON that tells one such set of functions from another.
    """

    facts: Mapping[str, Any]
    at: Mapping[int, Callable[[int, Tensor, Tensor], Tensor]]


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
    extra: ExtraGradients | None = None
    precision: torch.dtype = torch.float32
    labels: Labels = "sampled"

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return self.source.config.num_hidden_layers

    def measured(self, index: int) -> bool:
        """Whether the moments of block `index` are on disk."""
        return self.journal.facts(block_name(index)) is not None

    def reached(self, kind: str, indices: range) -> bool:
        """Whether one of the streams `kind`.`index` is there."""
        return any(self.streams.find(f"{kind}.{index}") is not None for index in indices)

    def forward_done(self, index: int) -> bool:
        """Whether `hidden.index`, or something computed from it, is there."""
        later = range(index, self.n_layers + 1)
        return self.reached("hidden", later) or self.backward_done(self.n_layers)

    def backward_done(self, index: int) -> bool:
        """Whether `gradient.index`, or something computed from it, is there."""
        return self.reached("gradient", range(index + 1))

    def build(self, index: int) -> LlamaDecoderLayer:
        """Block `index`, its weights in the precision of the products."""
        return build_block(self.source, index, dtype=self.precision, device=self.device)

    def multiplying(self) -> contextlib.AbstractContextManager:
        """Where products are in the precision asked for, and the residual stream in float32."""
        if self.precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def save(self, index: int, probe: BlockProbe, influence: float) -> None:
        """Write the moments of block `index`; `influence` is summed over all tokens."""
        facts = {"influence": influence / self.windows.numel()}
        self.journal.write(block_name(index), probe.tensors(), facts)


def embed_windows(run: Run) -> None:
    """hidden.0, the embedded windows."""
    if run.forward_done(0):
        return
    hidden = run.streams.create("hidden.0")
    step = max(1, CHUNK_BYTES // (4 * hidden[0].numel()))
    for start in range(0, len(hidden), step):
        hidden[start : start + step] = embed(run.source, run.windows[start : start + step])
    _require_finite(hidden, "model.embed_tokens", "output")
    run.streams.commit("hidden.0")


def forward_block(run: Run, index: int) -> None:
    """The output of block `index`; without gradients, its moments too."""
    measure = not run.gradients and not run.measured(index)
    if run.forward_done(index + 1) and not measure:
        return
    run.progress.set_description(f"calibrate: block {index} forward")
    block = run.build(index)
    expect_block(run.source, index + 1)
    before, after = run.streams.find(f"hidden.{index}"), run.streams.create(f"hidden.{index + 1}")
    probe = BlockProbe(block, gradients=False) if measure else None
    influence = 0.0
    with torch.no_grad(), _attached(probe):
        for number in range(len(before)):
            state = before[number : number + 1].to(run.device, torch.float32)
            with run.multiplying():
                output = run_block(block, state).float()
            _require_finite(output, f"model.layers.{index}", "output")
            influence += _influence(state, output)
            after[number] = output[0].cpu()
            run.progress.update(state.shape[1] / run.n_layers)
    if probe is not None:
        run.save(index, probe, influence)
    run.streams.commit(f"hidden.{index + 1}")
    if not run.gradients:
        run.streams.drop(f"hidden.{index}")


def leave_head(run: Run) -> None:
    """Moment of what lm_head reads; with gradients, also the loss and gradient.n_layers."""
    known = run.journal.facts(HEAD_NAME) is not None
    if known and (not run.gradients or run.backward_done(run.n_layers)):
        return
    run.progress.set_description("calibrate: head")
    norm, weight = final_norm(run.source, device=run.device), None
    if run.gradients:
        weight = head_matrix(run.source, device=run.device)
    hidden = run.streams.find(f"hidden.{run.n_layers}")
    gradient = run.streams.create(f"gradient.{run.n_layers}") if run.gradients else None
    gram, nll = GramSum(hidden.shape[2]), 0.0
    for number in range(len(hidden)):
        state = hidden[number : number + 1].to(run.device, torch.float32).requires_grad_()
        normed = norm(state)
        gram.add(normed[0])
        if gradient is not None:
            targets = run.windows[number, 1:].to(run.device).long()
            loss, slope = loss_gradient(
                normed[0].detach(), weight, targets, _draws(run, number, len(targets))
            )
            gradient[number] = torch.autograd.grad(normed, state, slope[None])[0][0].cpu()
            nll += loss
    if not known:
        vocab = run.source.config.vocab_size
        counts = torch.bincount(run.windows.flatten().cpu(), minlength=vocab)
        scored = run.windows.shape[0] * (run.windows.shape[1] - 1)
        facts = {"nll": nll / scored if run.gradients else None}
        run.journal.write(
            HEAD_NAME, {"lm_head.input": gram.packed(), "token_counts": counts}, facts
        )
    if gradient is not None:
        _require_finite(gradient, "lm_head", "gradient")
        run.streams.commit(f"gradient.{run.n_layers}")


def backward_block(run: Run, index: int) -> None:
    """The gradient at the input of block `index` and, unless they are on disk, its moments."""
    if run.backward_done(index):
        return
    run.progress.set_description(f"calibrate: block {index} backward")
    block = run.build(index)
    expect_block(run.source, index - 1)
    hidden = run.streams.find(f"hidden.{index}")
    above = run.streams.find(f"gradient.{index + 1}")
    below = run.streams.create(f"gradient.{index}")
    probe = None if run.measured(index) else BlockProbe(block, gradients=True)
    influence = 0.0
    with _attached(probe):
        for number in range(len(hidden)):
            state = hidden[number : number + 1].to(run.device, torch.float32).requires_grad_()
            with run.multiplying():
                output = run_block(block, state).float()
            slope = above[number : number + 1].to(run.device, torch.float32)
            if run.extra is not None and index in run.extra.at:
                added = run.extra.at[index](number, output[0].detach(), slope[0])
                slope = slope + added.to(slope)[None]
            below[number] = torch.autograd.grad(output, state, slope)[0][0].cpu()
            influence += _influence(state.detach(), output.detach())
            run.progress.update(state.shape[1] / run.n_layers)
    _require_finite(below, f"model.layers.{index}", "gradient")
    if probe is not None:
        run.save(index, probe, influence)
    run.streams.commit(f"gradient.{index}")
    run.streams.drop(f"gradient.{index + 1}")
    run.streams.drop(f"hidden.{index + 1}")


def leave_embedding(run: Run) -> None:
    """Moment of the gradients at the output of the embedding."""
    gradient = run.streams.find("gradient.0")
    gram = GramSum(gradient.shape[2])
    for number in range(len(gradient)):
        gram.add(condition(gradient[number : number + 1].float()))
    run.journal.write(EMBEDDING_NAME, {"embed_tokens.grad": gram.packed()}, {})


def loss_gradient(
    normed: Float[Tensor, "context d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, " scored"],
    draws: Float[Tensor, " scored"] | None = None,
) -> tuple[float, Float[Tensor, "context d_model"]]:
    """Summed cross-entropy in nats of `targets`, the tokens that follow the first scored states,
    and its gradient (softmax - one-hot) weight; logits exist for a few positions at a time.

    draws: numbers in [0, 1), by which tokens are drawn from the model itself; the gradient is then
    of their loss, whose second moment is the Fisher matrix and so the curvature of the KL
    divergence from the model (Martens, "New insights and perspectives on the natural gradient
    method", section 5; with the text's own tokens it is the empirical Fisher, section 11).

    >>> loss, gradient = loss_gradient(torch.zeros(2, 3), torch.eye(4, 3), torch.tensor([1]))
    >>> round(loss, 4), gradient.tolist()
    (1.3863, [[0.25, -0.75, 0.25], [0.0, 0.0, 0.0]])
    """
    total, gradient = 0.0, torch.zeros_like(normed)
    step = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    for start in range(0, len(targets), step):
        wanted = targets[start : start + step, None]
        logits = normed[start : start + len(wanted)] @ weight.T
        log_sums = logits.logsumexp(-1, keepdim=True)
        total += float((log_sums - logits.gather(-1, wanted)).cpu().double().sum())
        slopes = logits.sub_(log_sums).exp_()
        if draws is not None:
            sums = slopes.cumsum(-1)
            heights = draws[start : start + len(wanted), None] * sums[:, -1:]
            wanted = torch.searchsorted(sums, heights, right=True).clamp_(max=len(weight) - 1)
        slopes.scatter_add_(-1, wanted, -torch.ones_like(wanted, dtype=slopes.dtype))
        gradient[start : start + len(wanted)] = slopes @ weight
    return total, gradient


def _draws(run: Run, number: int, count: int) -> Tensor | None:
    """The numbers by which labels of a window are drawn: the same on every device and resume."""
    if run.labels == "text":
        return None
    return torch.rand(count, generator=torch.Generator().manual_seed(number)).to(run.device)


def _influence(before: Tensor, after: Tensor) -> float:
    """Sum over tokens of 1 - cos(before, after)."""
    return float((1 - torch.cosine_similarity(before, after, dim=-1)).cpu().double().sum())


def _attached(probe: BlockProbe | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if probe is None else probe.attached()


def _require_finite(values: Tensor, where: str, kind: str) -> None:
    # one window at a time: a stream may be larger than memory
    if not all(bool(torch.isfinite(window).all()) for window in values):
        raise NonFiniteError(
            f"{kind} is not finite",
            where=where,
            expected="finite numbers",
            found="NaN or infinity",
            hint="check the checkpoint with `inspect` and the calibration text",
        )
