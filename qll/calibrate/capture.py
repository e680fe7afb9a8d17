"""Text in, second moments out, with one block of the model in memory.

Forward: every block runs on all windows before the next one is read. Backward, when gradients are
asked for: from the last block to the first, each block is read again, recomputed on its stored
input and differentiated, so the gradients are those of the whole model. Blocks that the journal
lists are run but not measured again; a resumed run ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from qll import store
from qll.calibrate.journal import Journal
from qll.calibrate.moments import HEAD_NAME, SUMMARY_NAME, MomentStore, block_name
from qll.calibrate.passes import (
    ExtraGradients,
    Labels,
    Run,
    backward_block,
    embed_windows,
    forward_block,
    leave_embedding,
    leave_head,
)
from qll.calibrate.probe import CLIP, TRIM, trimmed
from qll.calibrate.streams import STREAMS_NAME, Streams
from qll.errors import TextError
from qll.load import Source

SCHEMA_VERSION = 1


def collect(
    source: Source,
    windows: Int[Tensor, "windows context"],
    folder: Path,
    *,
    gradients: bool,
    device: str | torch.device = "cpu",
    extra: ExtraGradients | None = None,
    precision: torch.dtype = torch.float32,
    labels: Labels = "sampled",
) -> MomentStore:
    """Second moments of all linear layers of `source` over `windows`, written to `folder`.

    With `gradients`, also those of dLoss/dOutput, where the loss is the cross-entropy of every
    next token summed over all windows (so that the scale per token does not depend on how many
    there are). labels: whether that token is drawn from the model, which gives the curvature of the
    KL divergence from it, or is the text's; see `probe` for how single gradients are trimmed and
    clipped. `extra` adds gradients of something else to it, at the outputs of some blocks. Blocks
    multiply in `precision`; sums are float32 products added in float64 in any case. Activations
    between blocks take windows x context x d_model x 4 bytes, times n_layers + 3 with gradients;
    they are in memory up to 2 GB and, in `precision`, in files of `folder` above that.

    Resumes a killed run of the same job and returns at once when it is finished. Raises TextError
    for windows of one token, ForeignRunError when `folder` holds another job, NonFiniteError
    naming the block whose output is NaN or infinite, OutputError and DiskFullError.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from qll.load import open_source
    >>> folder = Path(tempfile.mkdtemp())
    >>> config = LlamaConfig(vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    >>> windows = torch.arange(16).reshape(2, 8) % 10
    >>> moments = collect(open_source(folder / "tiny"), windows, folder / "moments", gradients=True)
    >>> linear = moments.block(0)["model.layers.0.mlp.down_proj"]
    >>> linear.input.shape, linear.grad.shape, linear.tokens, linear.grad_tokens
    (torch.Size([6, 6]), torch.Size([4, 4]), 16, 12)
    """
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise TextError(
            "calibration needs windows of two tokens or more",
            expected="[windows, context >= 2]",
            found=list(windows.shape),
        )
    journal = Journal(folder, _job(source, windows, gradients, extra, precision, labels))
    if (folder / SUMMARY_NAME).is_file() and journal.intact:
        store.remove(folder / STREAMS_NAME)
        return MomentStore(folder)
    streams = _streams(source, windows, journal, gradients, precision)
    with tqdm(
        total=windows.numel() * (2 if gradients else 1),
        unit="tok",
        unit_scale=True,
        file=sys.stderr,
        disable=None,
    ) as progress:
        _passes(
            Run(
                *(source, windows, journal, gradients, torch.device(device)),
                *(streams, progress, extra, precision, labels),
            )
        )
    store.write_json(folder / SUMMARY_NAME, _summary(journal))
    streams.close()
    return MomentStore(folder)


def _passes(run: Run) -> None:
    embed_windows(run)
    for index in range(run.n_layers):
        forward_block(run, index)
    leave_head(run)
    if run.gradients:
        for index in reversed(range(run.n_layers)):
            backward_block(run, index)
        leave_embedding(run)


def stream_count(layers: int, gradients: bool) -> int:
    """Streams at a time. Forward only: a block's input and output. With gradients: the input of
    every block and of the head, and the gradient at a block's output and input.

    >>> stream_count(32, False), stream_count(32, True)
    (2, 35)
    """
    return layers + 3 if gradients else 2


def _streams(
    source: Source, windows: Tensor, journal: Journal, gradients: bool, precision: torch.dtype
) -> Streams:
    layers, width = source.config.num_hidden_layers, source.config.hidden_size
    count = stream_count(layers, gradients)
    streams = Streams(journal.folder, (*windows.shape, width), count, precision)
    if not journal.intact:
        streams.clear()
    return streams


def _job(
    source: Source,
    windows: Tensor,
    gradients: bool,
    extra: ExtraGradients | None,
    precision: torch.dtype,
    labels: Labels,
) -> dict[str, Any]:
    """What must be the same for a run to continue another."""
    job = {} if extra is None else {"extra": dict(extra.facts)}
    if gradients:
        job["labels"] = labels
    if precision != torch.float32:
        job["precision"] = str(precision).removeprefix("torch.")
    return job | {
        "schema_version": SCHEMA_VERSION,
        "source": source.fingerprint,
        "windows": list(windows.shape),
        "windows_sha256": hashlib.sha256(windows.cpu().long().numpy().tobytes()).hexdigest(),
        "gradients": gradients,
        "n_layers": source.config.num_hidden_layers,
        "trim": TRIM,
        "clip": list(CLIP),
    }


def _summary(journal: Journal) -> dict[str, Any]:
    job = journal.job
    windows, context = job["windows"]
    blocks = [journal.facts(block_name(index)) for index in range(job["n_layers"])]
    kept = windows * (context - 2 * trimmed(context))
    return {
        **job,
        "tokens": windows * context,
        "grad_tokens": kept if job["gradients"] else 0,
        "nll": journal.facts(HEAD_NAME)["nll"],
        "block_influence": [facts["influence"] for facts in blocks],
    }
