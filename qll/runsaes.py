"""The sparse autoencoders of a run: which ones, checked before anything starts; what they measure.

--sae_layers names blocks, whose residual stream is meant; without it every autoencoder of the
folder is used. One is in memory at a time, beside both models.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from qll import store
from qll.calibrate import ExtraGradients, MomentStore
from qll.config import LensConfig, MainConfig
from qll.convert import metrics_of
from qll.convert.metric import Metric
from qll.errors import ShapeError, UsageError
from qll.load import Source, Text, encode
from qll.load.sae import find_saes, open_sae
from qll.load.sae_names import site_of
from qll.options import ConvertOptions
from qll.runfolder import Run
from qll.runtexts import evaluation_texts

if TYPE_CHECKING:
    from qll.lens import Study

# Tokens per window: the windows of a text are the documents of the bootstrap, so more is better
CONTEXT = 256
# Windows on which `--effort fast` runs the models again (see LensConfig.run_again)
FAST_RUN_AGAIN = 2
# Bytes on disk for activations of three models, and places an autoencoder wants them of, about
READING_BYTES = 4 << 30
PLACES_EACH = 4

logger = logging.getLogger("qll.runsaes")


def require_places(sae_dir: Path, places: Sequence[str], source: Source) -> list[str]:
    """Names of the autoencoders of `sae_dir` at `places`, or of all; each of them is opened.

    Raises MissingFileError (naming what the folder has) and the errors of `require_saes`.
    """
    # an empty folder is refused by asking it for something
    names = list(places) or _all_of(sae_dir) or ["layers.0"]
    for name in names:
        _require_fit(sae_dir, source, name)
    return names


def require_saes(config: MainConfig, source: Source) -> list[str]:
    """Names of the autoencoders of --sae_dir to use; none without the flag.

    Opens every one of them, so that what is wrong is said before the conversion. Raises UsageError
    for blocks the model does not have, MissingFileError for those the folder does not have,
    ShapeError for an autoencoder of another width, and what the formats raise.
    """
    layers = source.config.num_hidden_layers
    if beyond := [block for block in config.blocks_with_sae() if block >= layers]:
        raise UsageError(
            "the model has no such blocks",
            where="--sae_layers",
            expected=f"0 to {layers - 1}",
            found=", ".join(map(str, beyond)),
        )
    if config.sae_dir is None:
        return []
    places = [f"layers.{block}" for block in dict.fromkeys(config.blocks_with_sae())]
    return require_places(config.sae_dir, places, source)


def feature_gradients(
    config: MainConfig, source: Source, device: torch.device
) -> ExtraGradients | None:
    """What --feature_weight adds to the gradients of a calibration; None without it.

    Uses the autoencoders of residual streams after a block; warns of the others, and raises
    UsageError when there is none of those.
    """
    from qll.lens import load_sae
    from qll.lens.feature_gradient import feature_gradient

    weight, found, facts = config.convert.feature_weight, {}, []
    if not weight or config.convert.is_exact:
        return None
    for name in require_saes(config, source):
        sae = load_sae(config.sae_dir, name, device=device)
        place = sae.spec.hookpoint
        block = site_of(place).block
        if sae.spec.transcodes or place != f"layers.{block}" or block in found:
            logger.warning("autoencoder %s: not the first after a block, it steers nothing", name)
            continue
        found[block] = feature_gradient(sae, weight, config.seed)
        bias = sae.stored.vectors["b_dec"].float().cpu().numpy().tobytes()
        digest = hashlib.sha256(bias).hexdigest()
        facts.append({"hookpoint": place, "d_sae": sae.spec.d_sae, "b_dec_sha256": digest})
    if not found:
        raise UsageError(
            "no autoencoder of a residual stream after a block",
            where="--feature_weight",
            expected="for instance one at layers.9",
            found=str(config.sae_dir),
        )
    return ExtraGradients({"feature_weight": weight, "seed": config.seed, "saes": facts}, found)


@dataclass(frozen=True)
class Pair:
    """A dense and a converted model on disk, what both will read, and where results go."""

    source: Source
    model: Path
    """The converted checkpoint."""
    tokenizer: Any
    device: torch.device
    text: Text
    windows: Int[Tensor, "windows context"]
    """The text in token ids; its windows are the documents."""
    out: Path
    """Gets features/ with three files per autoencoder."""
    work: Path
    """Gets sae.json, the part of the report that is done, and scratch files."""
    moments: MomentStore | None = None
    """For the metric of critical bonds."""
    reach: int = LensConfig.reach
    run_again: int = LensConfig.run_again
    seed: int = 0

    @property
    def done(self) -> dict[str, Any]:
        """The sae section of report.json as far as it is done."""
        path = self.work / "sae.json"
        return store.read_json(path) if path.exists() else {"layers": {}}


def look_at_features(state: Run, moments: MomentStore | None) -> dict[str, Any]:
    """The sae section of report.json: every autoencoder on the dense and the converted model.

    Measured on the first evaluation text, whose windows are the documents.
    """
    texts, text = state.config.texts, evaluation_texts(state.config)[0]
    context = min(texts.context, CONTEXT)
    windows, _ = encode(text, state.tokenizer, texts.eval_tokens, context)
    pair = Pair(
        state.source,
        state.model,
        state.tokenizer,
        state.device,
        text,
        windows,
        state.out,
        state.work,
        moments,
        run_again=FAST_RUN_AGAIN if state.config.train.effort == "fast" else LensConfig.run_again,
        seed=state.config.seed,
    )
    return look_at_pair(pair, state.config.sae_dir, require_saes(state.config, state.source))


def look_at_pair(pair: Pair, sae_dir: Path, names: Sequence[str]) -> dict[str, Any]:
    """Study the autoencoders `names` of `sae_dir` one by one; returns what `Pair.done` then says.

    The models read the text once for as many autoencoders as `READING_BYTES` allow. A killed run
    goes on with the next autoencoder. Raises what `load` and `study` raise.
    """
    from qll.lens import load_sae, study
    from qll.lens.compare import read_three
    from qll.lens.readings import places_for
    from qll.model import load, load_dense

    section, scratch = pair.done, pair.work / "readings"
    if len(section["layers"]) == len(names):
        return section
    dense = load_dense(pair.source, torch.float32, pair.device)
    converted = load(pair.model, device=pair.device, dtype=torch.float32, verify=False)
    layers = dense.config.num_hidden_layers
    for group in _groups(names[len(section["layers"]) :], pair, dense.config.hidden_size):
        specs = [open_sae(sae_dir, name).spec for name in group]
        places = dict.fromkeys(place for spec in specs for place in places_for(spec, layers))
        store.remove(scratch)
        three = read_three(
            *(dense, converted, pair.windows, list(places)),
            special=pair.tokenizer.all_special_ids,
            folder=scratch,
        )
        for name in group:
            found = study(
                three,
                load_sae(sae_dir, name, device=pair.device),
                pair.tokenizer,
                metric_at=partial(_metric_at, pair.source, pair.moments),
                reach=pair.reach,
                run_again=pair.run_again,
                seed=pair.seed,
            )
            key = _key(found.entry["hookpoint"], section["layers"])
            section["layers"][key] = write_study(pair, key, found)
            store.write_json(pair.work / "sae.json", section)
    store.remove(scratch)
    return section


def _groups(names: Sequence[str], pair: Pair, width: int) -> Iterator[Sequence[str]]:
    """Autoencoders whose readings lie on disk at the same time."""
    each = PLACES_EACH * 3 * 4 * pair.windows.numel() * width
    size = max(1, READING_BYTES // each)
    for start in range(0, len(names), size):
        yield names[start : start + size]


def write_study(pair: Pair, key: str, found: Study) -> dict[str, Any]:
    """features/<place>: .safetensors (numbers by feature), .json (what the page shows) and .html.

    Returns the entry of the report: where the page is, beside the numbers.
    """
    from qll.report import page_value, render_features

    stem = re.sub(r"[^\w.]+", "_", f"layers.{key}" if key.isdecimal() else key).strip("_")
    entry = {"text": pair.text.name, **found.entry, "page": f"features/{stem}.html"}
    folder = pair.out / "features"
    store.make_folder(folder)
    value = page_value(pair.source.name, entry, found.features, found.examples)
    store.write_tensors(folder / f"{stem}.safetensors", found.features)
    store.write_json(folder / f"{stem}.json", value)
    store.write_text(folder / f"{stem}.html", render_features(value))
    return entry


def _metric_at(source: Source, moments: MomentStore | None, matrix: str) -> Metric:
    """The metric of the moments at one matrix; the plain one without moments."""
    kind = "kfac" if moments is not None and moments.gradients else "activation"
    options = ConvertOptions(metric="plain" if moments is None else kind)
    return metrics_of(source, moments, [matrix], options)[0]


def _all_of(sae_dir: Path) -> list[str]:
    """Paths of all autoencoders below a folder, by block."""

    def order(name: str) -> tuple[int, str]:
        hookpoint = found[name].hookpoint
        block = site_of(hookpoint).block if hookpoint else None
        return (-1 if block is None else block, name)

    found = find_saes(sae_dir)
    return sorted(found, key=order)


def _key(hookpoint: str, taken: dict[str, Any]) -> str:
    """The block's number for a residual stream, the hookpoint elsewhere; never one twice."""
    block = site_of(hookpoint).block
    key = str(block) if hookpoint == f"layers.{block}" else hookpoint
    return key if key not in taken else f"{key} ({len(taken)})"


def _require_fit(sae_dir: Path, source: Source, name: str) -> None:
    spec = open_sae(sae_dir, name).spec
    for place in {spec.hookpoint, spec.writes}:
        block = site_of(place).block
        if block is not None and block >= source.config.num_hidden_layers:
            raise UsageError(
                "the autoencoder belongs to a block that the model does not have",
                where=f"--sae_dir {sae_dir}",
                expected=f"0 to {source.config.num_hidden_layers - 1}",
                found=place,
                hint="name those that fit: --sae_layers, or --hookpoints of `lens`",
            )
    wide = spec.writes == "embed_tokens" or not spec.writes.endswith("_proj.input")
    if wide and spec.d_out != source.config.hidden_size:
        raise ShapeError(
            "the autoencoder has another width than the model",
            where=f"{sae_dir}: {name}",
            expected=source.config.hidden_size,
            found=spec.d_out,
            hint="it belongs to another model",
        )
