"""`qll sae train`: open the model and the texts, train, write, measure on held-out windows.

OUT gets run.json (settings, versions), metrics.jsonl (the curve), <hookpoint>/ (the autoencoders),
and at last training.json (texts by hash, results); until then a checkpoint to resume from.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qll import store
from qll.config import to_json
from qll.errors import TextError, UsageError
from qll.lens import load_sae, measure
from qll.lens.hooks import width_at
from qll.lens.readings import Encoded, places_for, read
from qll.load import Source, Text, builtin_texts, encode, open_source, open_tokenizer, read_text
from qll.load.sae_names import hookpoint_of, site_of
from qll.load.sae_write import write_saelens, write_sparsify
from qll.model import load_dense
from qll.pipeline import choose_device
from qll.runfolder import claim_folder, environment
from qll.saetrain.coder import Coder, CoderShape
from qll.saetrain.learner import Learner
from qll.saetrain.settings import SAETrainConfig
from qll.saetrain.stream import Stream
from qll.saetrain.trainer import CHECKPOINT, Trainer
from qll.train import choose_precision, keep_freed_memory, prepare_training

logger = logging.getLogger("qll.saejob")

RESULT = "training.json"
HELD_OUT = 64  # of so many windows of a text the last one is not trained on, and at least one
PIECE = 4 << 20  # characters that are cut into tokens at once


def train(config: SAETrainConfig) -> dict[str, Any]:
    """Train what `config` asks for and return training.json; a finished folder is only read.

    Raises UsageError for a place the model does not have or cannot be trained at, TextError for too
    short a text, ForeignRunError for a folder of another run, NonFiniteError when training diverges
    and what the formats of checkpoints raise.
    """
    keep_freed_memory()
    device = choose_device(config.device)
    source = open_source(config.llama_dir)
    if (config.out / RESULT).is_file():
        _claim(config, source)
        print(f"{config.out} is complete; nothing to do", file=sys.stderr)
        return store.read_json(config.out / RESULT)
    # what can be wrong with the inputs is said before the folder is anybody's
    tokenizer, texts = open_tokenizer(source), training_texts(config)
    windows, held_out, facts = split_windows(texts, tokenizer, config)
    model = load_dense(source, torch.float32, device)
    trainer, stream = prepared(config, model, windows, tokenizer.all_special_ids)
    with store.lock(config.out):
        _claim(config, source)
        trainer.restore()
        _warn_of_repeats(stream)
        trainer.run(stream.buffers(trainer.buffers_done))
        for learner in trainer.learners:
            write(learner, config.out, source.name)
        result = {
            "settings": to_json(config),
            "texts": facts,
            "tokens": trainer.read,
            "seconds": round(trainer.seconds, 1),
            "hookpoints": evaluated(config, model, held_out, tokenizer, trainer.learners),
            **environment(),
        }
        store.write_json(config.out / RESULT, result)
        store.remove(config.out / CHECKPOINT)
    return result


def training_texts(config: SAETrainConfig) -> list[Text]:
    """The texts of --text, or the calibration half of Python's topics."""
    if config.text:
        return [read_text(path) for path in config.text]
    return [builtin_texts()["python_topics_calibration"]]


def split_windows(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, config: SAETrainConfig
) -> tuple[Int[Tensor, "windows context"], Int[Tensor, "held_out context"], list[dict[str, Any]]]:
    """Windows to train on and windows held out, and what the texts are, for the report.

    Held out is the end of each text, so that no window is measured whose neighbours on both sides
    were trained on. Raises TextError for a text of fewer than two windows.
    """
    trained, held, facts = [], [], []
    for text in texts:
        parts = (encode(part, tokenizer, None, config.learning.context) for part in pieces(text))
        windows = torch.cat([part for part, _ in parts])
        if len(windows) < 2:
            raise TextError(
                "too few tokens to train on some and measure on others",
                where=text.name,
                expected=f"at least {2 * config.learning.context}",
                found=windows.numel(),
                hint="give a longer text, or a shorter --context",
            )
        kept = max(1, len(windows) // HELD_OUT)
        trained.append(windows[:-kept])
        held.append(windows[-kept:])
        sizes = {"tokens": trained[-1].numel(), "held_out_tokens": held[-1].numel()}
        facts.append({"name": text.name, "sha256": text.sha256, **sizes})
    return torch.cat(trained), torch.cat(held), facts


def pieces(text: Text) -> list[Text]:
    """A long text in equal parts, so that tokens of all of it never wait in one Python list.

    >>> [len(part.text) for part in pieces(Text("long", "x" * (PIECE + 2)))]
    [4194306]
    """
    size = -(-len(text.text) // max(1, len(text.text) // PIECE))
    starts = range(0, len(text.text), size)
    return [Text(text.name, text.text[start : start + size]) for start in starts]


def prepared(
    config: SAETrainConfig,
    model: PreTrainedModel,
    windows: Int[Tensor, "windows context"],
    special: Sequence[int],
) -> tuple[Trainer, Stream]:
    """A trainer that has not begun, and the stream it is to learn from."""
    learning, device = config.learning, model.device
    precision = choose_precision(config.precision, device)
    prepare_training(model, precision, device)
    learners = [
        Learner(Coder(shape, config.seed).to(device), learning, config.dead_after, precision)
        for shape in shapes(config, model)
    ]
    places = [(learner.shape.reads, learner.shape.hookpoint) for learner in learners]
    stream = Stream(
        model,
        windows,
        list(dict.fromkeys(place for pair in places for place in pair)),
        config.tokens,
        learning.buffer_tokens,
        special,
        precision,
        config.seed,
    )
    tokens = stream.count * windows.shape[1]
    return Trainer(learners, config.out, tokens, config.seed), stream


def shapes(config: SAETrainConfig, model: PreTrainedModel) -> list[CoderShape]:
    """What to train at each place; raises UsageError for a place that cannot be trained at."""
    names = config.hookpoints or (f"layers.{model.config.num_hidden_layers // 2}",)
    if config.kind == "transcoder" and not config.hookpoints:
        names = (f"{names[0]}.mlp",)
    found = []
    for name in dict.fromkeys(hookpoint_of(name) for name in names):
        if site_of(name).side != "output":
            raise UsageError(
                "sparsify names modules, whose output is read",
                where=f"--hookpoints {name}",
                hint="name a module, for instance layers.9 or layers.9.mlp",
            )
        width = width_at(model, name)
        learning = config.learning
        shape = CoderShape(
            *(name, config.kind, width, width, config.expansion * width, config.k),
            *(learning.skip, learning.jumprelu.l0_weight, learning.jumprelu.bandwidth),
        )
        _require_fit(shape, model)
        found.append(shape)
    return found


def write(learner: Learner, out: Path, model_name: str) -> None:
    """The autoencoder of `learner` in OUT/<hookpoint>/, in sparsify's layout where that has it."""
    dtype = getattr(torch, learner.options.dtype)
    stored, folder = learner.coder.stored(dtype), out / learner.shape.hookpoint
    if learner.shape.kind == "jumprelu":
        write_saelens(stored, folder, model_name)
    else:
        write_sparsify(stored, folder)


def evaluated(
    config: SAETrainConfig,
    model: PreTrainedModel,
    held_out: Int[Tensor, "windows context"],
    tokenizer: PreTrainedTokenizerBase,
    learners: Sequence[Learner],
) -> dict[str, Any]:
    """`qll.lens.measure` of each autoencoder as it was written, on held-out windows in float32.

    `dead_share` beside it is of training: features that had been silent for --dead_after tokens.
    """
    found = {
        learner.shape.hookpoint: {
            "dead_share": (learner.silent > learner.dead_after).double().mean().item()
        }
        for learner in learners
    }
    count = config.learning.eval_tokens // held_out.shape[1]
    if not count:
        return found
    # spread over all texts
    places = torch.linspace(0, len(held_out) - 1, min(count, len(held_out))).long()
    prepare_training(model, torch.float32, model.device)
    saes = {name: load_sae(config.out, name, device=model.device) for name in found}
    layers = model.config.num_hidden_layers
    wanted = [place for sae in saes.values() for place in places_for(sae.spec, layers)]
    special = tokenizer.all_special_ids
    readings = read(model, held_out[places], wanted, special=special)
    for name, facts in found.items():
        facts |= measure(Encoded(readings, saes[name]))
    return found


def _claim(config: SAETrainConfig, source: Source) -> None:
    """Write run.json, or check that the one there is of the same settings and source."""
    settings = {key: item for key, item in to_json(config).items() if key not in ("out", "device")}
    claim_folder(config.out, settings | {"fingerprint": source.fingerprint})


def _warn_of_repeats(stream: Stream) -> None:
    if stream.count > len(stream.windows):
        times = stream.count / len(stream.windows)
        tokens = stream.windows.numel()
        logger.warning("the texts have %d tokens to train on: read %.1f times", tokens, times)


def _require_fit(shape: CoderShape, model: PreTrainedModel) -> None:
    if shape.transcodes and width_at(model, shape.reads) != shape.d_out:
        raise UsageError(
            "sparsify has only transcoders of one width",
            where=f"--hookpoints {shape.hookpoint}",
            expected=shape.d_out,
            found=width_at(model, shape.reads),
            hint="name a whole mlp or self_attn",
        )
    if shape.k > shape.d_sae:
        raise UsageError("more than there are features", where="--k", found=shape.k)
