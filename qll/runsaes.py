"""The sparse autoencoders of a run: which ones, checked before anything starts; what they measure.

--sae_layers names blocks, whose residual stream is meant; without it every autoencoder of the
folder is used. One is in memory at a time, beside both models.
"""

from __future__ import annotations

from typing import Any

import torch

from qll import store
from qll.config import MainConfig
from qll.errors import ShapeError, UsageError
from qll.load import Source, encode
from qll.load.sae import find_saes, open_sae
from qll.load.sae_names import site_of
from qll.runfolder import Run
from qll.runtexts import evaluation_texts

# Tokens per window: the windows of a text are the documents of the bootstrap, so more is better
CONTEXT = 256


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
    names = [f"layers.{block}" for block in dict.fromkeys(config.blocks_with_sae())]
    # an empty folder is refused by asking it for something
    for name in (names := names or _all_of(config) or ["layers.0"]):
        _require_fit(config, source, name)
    return names


def look_at_features(state: Run) -> dict[str, Any]:
    """The sae section of report.json: every autoencoder on the dense and the converted model.

    Measured on the first evaluation text, whose windows are the documents. What is done stands in
    work/sae.json, so that a killed run goes on with the next autoencoder.
    """
    from qll.lens import compare, load_sae
    from qll.model import load, load_dense

    path, names = state.features, require_saes(state.config, state.source)
    section = store.read_json(path) if path.exists() else {"layers": {}}
    if len(section["layers"]) == len(names):
        return section
    texts = state.config.texts
    text = evaluation_texts(state.config)[0]
    context = min(texts.context, CONTEXT)
    windows, _ = encode(text, state.tokenizer, texts.eval_tokens, context)
    dense = load_dense(state.source, torch.float32, state.device)
    converted = load(state.model, device=state.device, dtype=torch.float32, verify=False)
    special = state.tokenizer.all_special_ids
    for name in names[len(section["layers"]) :]:
        sae = load_sae(state.config.sae_dir, name, device=state.device)
        found = compare(dense, converted, sae, windows, special=special, seed=state.config.seed)
        key = _key(found["hookpoint"], section["layers"])
        section["layers"][key] = {"text": text.name, **found}
        store.write_json(path, section)
    return section


def _all_of(config: MainConfig) -> list[str]:
    """Paths of all autoencoders below --sae_dir, by block."""

    def order(name: str) -> tuple[int, str]:
        hookpoint = found[name].hookpoint
        block = site_of(hookpoint).block if hookpoint else None
        return (-1 if block is None else block, name)

    found = find_saes(config.sae_dir)
    return sorted(found, key=order)


def _key(hookpoint: str, taken: dict[str, Any]) -> str:
    """The block's number for a residual stream, the hookpoint elsewhere; never one twice."""
    block = site_of(hookpoint).block
    key = str(block) if hookpoint == f"layers.{block}" else hookpoint
    return key if key not in taken else f"{key} ({len(taken)})"


def _require_fit(config: MainConfig, source: Source, name: str) -> None:
    spec = open_sae(config.sae_dir, name).spec
    for place in {spec.hookpoint, spec.writes}:
        block = site_of(place).block
        if block is not None and block >= source.config.num_hidden_layers:
            raise UsageError(
                "the autoencoder belongs to a block that the model does not have",
                where=f"--sae_dir {config.sae_dir}",
                expected=f"0 to {source.config.num_hidden_layers - 1}",
                found=place,
                hint="name blocks with --sae_layers",
            )
    wide = spec.writes == "embed_tokens" or not spec.writes.endswith("_proj.input")
    if wide and spec.d_out != source.config.hidden_size:
        raise ShapeError(
            "the autoencoder has another width than the model",
            where=f"{config.sae_dir}: {name}",
            expected=source.config.hidden_size,
            found=spec.d_out,
            hint="it belongs to another model",
        )
