"""`qll lm train` and `qll lm eval`: open the texts, train, keep the best model, measure it.

What is left in the folder is described in qll/bytelm/runfiles.py.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qll import store
from qll.bytelm.config import ModelConfig
from qll.bytelm.corpus import Part, local_parts, named_parts
from qll.bytelm.dataset import BatchLoader, require_windows
from qll.bytelm.documents import Document, find_documents, split_documents
from qll.bytelm.embedding import bigram_counts, start_of
from qll.bytelm.evaluate import bits_per_byte
from qll.bytelm.growth import grow
from qll.bytelm.languages import ids_of, tagged
from qll.bytelm.loaders import HELD_OUT_NAME, TEXTS_NAME, build_loaders
from qll.bytelm.mixture import Mixture, require_reference
from qll.bytelm.model import ByteModel
from qll.bytelm.packed import PackedText, sample, total_bytes
from qll.bytelm.parallel import parallel_lines, parallel_retrieval
from qll.bytelm.ranks import bond_ranks
from qll.bytelm.runfiles import RunFiles
from qll.bytelm.saved import load_lm, save_model
from qll.bytelm.settings import LMEvalConfig, LMTrainConfig
from qll.bytelm.streaming import StreamLoader
from qll.bytelm.trainer import Trainer
from qll.config import to_json
from qll.errors import ConfigError, QLLError, TextError, UsageError
from qll.pipeline import choose_device
from qll.runfolder import claim_folder, environment
from qll.train import keep_freed_memory
from qll.train.precision import autocast, choose_precision, fast_attention

# settings that do not change what a run computes
UNBINDING = ("out", "device")
UNBINDING_WATCH = ("log_every", "save_every", "leak_below")
# windows of --max_samples: an epoch begins anywhere in the first, and windows may shift
LEAST_SAMPLES = 3
# what a model may have that its checkpoint has not
ADDED = ("adapter_", "prefix", "phase.language")
RANKED = 16  # windows on which adaptive ranks are counted


def train(config: LMTrainConfig) -> dict[str, Any]:
    """Train what `config` asks for and return training.json; a finished folder is only read.

    Raises UsageError for settings that do not fit, TextError for texts that are missing, too short
    or no texts, ForeignRunError for a folder of another run, LeakError, NonFiniteError, and what
    the formats of checkpoints raise.
    """
    keep_freed_memory()
    config = config.resolved()
    files, device = RunFiles(config.out), choose_device(config.device)
    model_config = config.model_config()
    # what can be wrong with the inputs is said before the folder is anybody's
    parts = texts_of(config)
    if files.complete:
        _claim(config, parts)
        print(f"{config.out} is complete; nothing to do", file=sys.stderr)
        return store.read_json(files.result)
    number_of_steps(config, parts)
    _require_windows(parts, model_config.context, config.texts.max_samples)
    _require_memory_read(model_config)
    _require_tagged(config, model_config)
    reference = _reference(config, parts, model_config, device)
    torch.manual_seed(config.seed)
    model = started(config, ByteModel(model_config)).to(device)
    require_growth(config, model)
    torch.manual_seed(config.seed)
    with store.lock(config.out):
        loader, held_out = _claimed_data(config, parts, device)
        documents = held_out.documents()
        precision = choose_precision(config.precision, device)
        few = sample(documents, config.watch.val_max_chunks * model_config.context)
        steps = number_of_steps(config, parts, loader)
        if not files.checkpoint.is_file():
            start_embedding(config, model, parts)
        mixture = None if reference is None else Mixture(loader, reference)
        trainer = Trainer(config, model, loader, few, steps, precision, mixture)
        trainer.restore()
        stopped_by = trainer.run()
        save_model(files.last, trainer.learner.measured)
        result = _result(config, trainer, documents, stopped_by)
        store.write_json(files.result, result)
        trainer.finish()
        store.remove(files.checkpoint)
    return result


def evaluate(config: LMEvalConfig) -> dict[str, Any]:
    """Bits per byte of a model on documents, as JSON.

    Raises what opening the model and the texts raises.
    """
    device = choose_device(config.device)
    model = load_lm(config.model, device)
    documents, name = _documents_to_score(config, model.config.stream.languages)
    if config.max_bytes is not None:
        documents = sample(documents, config.max_bytes)
    context = config.context or model.config.context
    precision = choose_precision(config.precision, device)
    with autocast(precision, device), fast_attention(precision, device, context):
        found = bits_per_byte(model, documents, context, config.stride)
    return {
        "model": str(config.model),
        "data": name,
        "split": config.split,
        "bits_per_byte": found.bits_per_byte,
        "nats_per_byte": found.bits_per_byte * math.log(2),
        "byte_perplexity": 2**found.bits_per_byte,
        "bytes": found.bytes,
        "documents": found.documents,
        "context": found.context,
        "stride": found.stride,
        "precision": str(precision).removeprefix("torch."),
        **_ranks(model, documents),
        **_parallel(model, config.parallel),
    }


def texts_of(config: LMTrainConfig) -> list[Part]:
    """The parts of the texts of `config`; raises TextError or UsageError."""
    texts = config.texts
    if texts.dataset:
        return named_parts(texts.dataset, streaming=texts.streaming, min_quality=texts.min_quality)
    return local_parts(
        config.data,
        texts.data_weights,
        texts.pattern,
        texts.validation,
        config.model_config().stream.languages,
        texts.min_quality,
    )


def number_of_steps(
    config: LMTrainConfig, parts: Sequence[Part], loader: BatchLoader | StreamLoader | None = None
) -> int | None:
    """Steps of the run by --max_steps and --epochs, None when only its seconds are given.

    Raises UsageError for epochs of a text whose length nobody knows.
    """
    learning, found = config.learning, []
    if learning.max_steps is not None:
        found.append(learning.max_steps)
    if learning.epochs is not None:
        windows = _windows(config, parts, loader)
        if windows is not None:
            rows = learning.batch_size * learning.accumulate_steps
            found.append(max(1, math.ceil(learning.epochs * windows / rows)))
        elif not found and config.texts.streaming and config.max_seconds is None:
            raise UsageError(
                "the length of a streamed data set is not known",
                where="--epochs",
                hint="give --max_steps or --max_seconds",
            )
    return min(found) if found else None


def started(config: LMTrainConfig, model: ByteModel) -> ByteModel:
    """`model` with the weights of --checkpoint, where there is one; its new parts stay as they are.

    Raises ConfigError when the checkpoint is of another architecture, and UsageError for a concept
    layer of an autoencoder that nothing brings along.
    """
    if config.size.checkpoint is None:
        if model.config.concept.kind == "sae":
            raise UsageError(
                "needs an autoencoder that was trained before",
                where="concept.kind",
                hint="put it into a model with qll.bytelm.concept.use_sae, save that, and give its "
                "folder in --checkpoint",
            )
        return model
    base = load_lm(config.size.checkpoint)
    try:
        missing, extra = model.load_state_dict(base.state_dict(), strict=False)
    except RuntimeError as error:
        raise _other_architecture(config.size.checkpoint, str(error)) from None
    new = [name for name in missing if not any(part in name for part in ADDED)]
    if extra or new:
        raise _other_architecture(config.size.checkpoint, ", ".join([*extra, *new][:5]))
    for name in missing:  # what is new learns, even where the base is frozen
        model.get_parameter(name).requires_grad_()
    return model


def start_embedding(config: LMTrainConfig, model: ByteModel, parts: Sequence[Part]) -> None:
    """Put the byte embedding of `model` where --embedding says."""
    if config.size.embedding == "normal":
        return
    texts = itertools.chain.from_iterable(part.training() for part in parts)
    width = model.config.d_model
    found = start_of(config.size.embedding, width, bigram_counts(texts), config.seed)
    with torch.no_grad():
        model.embedding.weight.copy_(found)


def require_growth(config: LMTrainConfig, model: ByteModel) -> None:
    """Raise UsageError when `model` cannot grow as the curriculum says, before hours are spent."""
    for stage in config.curriculum():
        if stage.d_model not in (None, model.config.d_model):
            model = grow(model, stage.d_model)


def _windows(
    config: LMTrainConfig, parts: Sequence[Part], loader: BatchLoader | StreamLoader | None
) -> int | None:
    """Windows of an epoch, when that can be known now."""
    limit, length = config.texts.max_samples, config.model_config().context
    sizes = [part.facts.get("trained_bytes") for part in parts]
    if None not in sizes:
        windows = [size // length for size in sizes]
        return sum(windows if limit is None else (min(limit, count) for count in windows))
    if isinstance(loader, BatchLoader):
        return sum(map(len, loader.datasets))
    # a text that is read as a stream begins again after so many windows
    return None if limit is None or not config.texts.streaming else limit * len(parts)


def _require_windows(parts: Sequence[Part], context: int, limit: int | None) -> None:
    if limit is not None and limit < LEAST_SAMPLES:
        raise UsageError(
            "too few to train on",
            where="--max_samples",
            expected=f"at least {LEAST_SAMPLES}",
            found=limit,
        )
    for part in parts:
        size = part.facts.get("trained_bytes")
        if size is not None:
            require_windows(part.name, size + 2, context)


def _require_memory_read(config: ModelConfig) -> None:
    """Raise UsageError for a recurrent memory that no window of training would read."""
    if config.memory.memory_tokens and config.segment >= config.context:
        raise UsageError(
            "the memory would be written after the last byte of a window, and never read",
            where="memory.segment",
            expected=f"below the context, {config.context}",
            found=config.segment,
        )


def _require_tagged(config: LMTrainConfig, model: ModelConfig) -> None:
    """Raise UsageError for languages of texts whose documents have no names, or are not packed."""
    if model.stream.languages and (config.texts.streaming or config.texts.dataset):
        raise UsageError(
            "are those of files, which are packed first",
            where="--languages",
            found="--streaming" if config.texts.streaming else "--dataset",
            hint="give the files in --data, without --streaming",
        )


def _claimed_data(
    config: LMTrainConfig, parts: Sequence[Part], device: torch.device
) -> tuple[BatchLoader | StreamLoader, PackedText]:
    """Claim the folder and read the texts; a new folder whose texts cannot be read is let go."""
    files = RunFiles(config.out)
    begun = files.run.exists()
    _claim(config, parts)
    try:
        return _data(config, parts, device)
    except QLLError:
        if not begun:
            store.remove(files.data)
            store.remove(files.run)
        raise


def _data(
    config: LMTrainConfig, parts: Sequence[Part], device: torch.device
) -> tuple[BatchLoader | StreamLoader, PackedText]:
    return build_loaders(
        parts,
        config.model_config().context,
        config.learning.batch_size,
        RunFiles(config.out).data,
        streaming=config.texts.streaming,
        max_samples=config.texts.max_samples,
        buffer_size=config.texts.buffer_size,
        compress=config.texts.compress,
        seed=config.seed,
        device=device,
    )


def _reference(
    config: LMTrainConfig, parts: Sequence[Part], model: ModelConfig, device: torch.device
) -> ByteModel | None:
    """The model of --reference, if there is one; raises UsageError when it does not fit."""
    if config.texts.reference is None:
        return None
    found = load_lm(config.texts.reference, device)
    require_reference(found.config, len(parts), model.stream.languages)
    return found


def _result(
    config: LMTrainConfig, trainer: Trainer, documents: Sequence[np.ndarray], stopped_by: str
) -> dict[str, Any]:
    """What training.json says."""
    progress, learner = trainer.progress, trainer.learner
    some = sample(documents, config.watch.eval_bytes)
    best = load_lm(config.out, trainer.device)
    context = best.config.context
    with autocast(trainer.precision, trainer.device):
        found = bits_per_byte(best, some, context)
    return {
        "settings": to_json(config),
        "model": best.config.to_dict(),
        "parameters": learner.model.num_params(),
        "steps": progress.step,
        "bytes": progress.bytes,
        "seconds": round(progress.seconds, 2),
        "tokens_per_second": round(progress.bytes / max(progress.seconds, 1e-9), 1),
        "precision": str(trainer.precision).removeprefix("torch."),
        "best": {
            "bits_per_byte": progress.best_bits,
            "step": progress.best_step,
            "bytes": progress.best_bytes,
            "seconds": round(progress.best_seconds, 2),
        },
        "held_out": {
            "bits_per_byte": found.bits_per_byte,
            "bytes": found.bytes,
            "of_bytes": total_bytes(documents),
            "documents": found.documents,
            "context": found.context,
            "stride": found.stride,
        },
        "stopped_by": stopped_by,
        "texts": store.read_json(RunFiles(config.out).data / TEXTS_NAME)["texts"],
        "stages": [stage.name for stage in config.curriculum()],
        **({} if trainer.mixture is None else {"weights": trainer.mixture.weights()}),
        **environment(),
    }


def _documents_to_score(
    config: LMEvalConfig, languages: Sequence[str]
) -> tuple[list[np.ndarray], str]:
    """The documents of --data, or those that the run held out, and what they are called."""
    if not config.data:
        path = RunFiles(config.model).data / HELD_OUT_NAME
        if not path.is_file():
            raise TextError(
                "no held-out text beside this model", where=config.model, hint="give --data"
            )
        return PackedText(path).documents(), "held out by the run"
    found: list[Document] = []
    for path in config.data:
        documents = tagged(find_documents([path], config.pattern), languages)
        found += split_documents(documents)[1] if config.split == "held_out" else documents
    if not sum(map(len, found)):
        raise TextError("empty", where=", ".join(map(str, config.data)), hint="give a longer text")
    return list(map(ids_of, found)), ", ".join(path.name for path in config.data)


def _ranks(model: ByteModel, documents: Sequence[np.ndarray]) -> dict[str, Any]:
    """Mean and full rank of every linear of adaptive rank, on the first windows of documents."""
    if not model.config.weights.rank_groups:
        return {}
    context = model.config.context
    ids = np.concatenate(sample(documents, RANKED * context)).astype(np.int64)
    width = min(context, len(ids))
    windows = torch.from_numpy(ids[: len(ids) // width * width].reshape(-1, width))
    found = bond_ranks(model, windows.to(model.embedding.weight.device))
    return {"ranks": {item.linear: [item.mean_rank, item.full_rank] for item in found}}


def _parallel(model: ByteModel, paths: Sequence[Path]) -> dict[str, Any]:
    """What --parallel asks for."""
    if not paths:
        return {}
    lines = parallel_lines(*paths, model.config.stream.languages)
    return {"parallel": asdict(parallel_retrieval(model, *lines))}


def _claim(config: LMTrainConfig, parts: Sequence[Part]) -> None:
    """Write run.json, or check that the one there is of the same settings and texts."""
    settings = {key: item for key, item in to_json(config).items() if key not in UNBINDING}
    watch = {key: item for key, item in settings["watch"].items() if key not in UNBINDING_WATCH}
    fingerprint = "-".join(part.facts["sha256"][:16] for part in parts)
    resolved = settings | {"watch": watch, "data": [part.name for part in parts]}
    claim_folder(config.out, resolved | {"fingerprint": fingerprint})


def _other_architecture(path: Path, found: str) -> ConfigError:
    return ConfigError(
        "weights of another architecture",
        where=path,
        found=found[:300],
        hint="leave out sizes and parts: they are those of the checkpoint, to which only adapters, "
        "global tokens and languages can be added",
    )
