"""The main job, stage by stage: load, calibrate, plan, convert, evaluate, look inside, report.

Read this file first. Each stage is one short function; what a stage leaves on disk is found again
by a later run with the same settings, so a killed run resumes where it was.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qll import store
from qll.calibrate import MomentStore
from qll.config import EvalConfig, LensConfig, MainConfig, to_json
from qll.convert import (
    Plan,
    saved_dtype,
)
from qll.errors import UsageError
from qll.load import (
    ReadAhead,
    Source,
    builtin_texts,
    encode,
    open_source,
    open_tokenizer,
    read_text,
    stamps_of,
)
from qll.needs import needs_text, require_needs
from qll.runfolder import (
    Run,
    claim,
    claim_folder,
    hearing,
    is_done,
    note_warning,
    recording,
    timed,
    total_seconds,
)
from qll.runmodel import make_model, require_training
from qll.runplan import calibrate, disentangle, make_or_load_plan, moments_of
from qll.runsaes import (
    CONTEXT,
    Pair,
    look_at_features,
    look_at_pair,
    require_places,
    require_saes,
)
from qll.runtexts import (
    calibration_facts,
    calibration_names,
    evaluation_texts,
)
from qll.train import keep_freed_memory


def run(config: MainConfig, until: str = "report") -> Path:
    """Do the stages up to `until` and return the output folder; a finished run returns at once.

    Raises QLLError children for everything a user can mend; see `qll.errors`.
    """
    config = config.resolved()
    if is_done(config, until):
        print(f"{config.out} is complete; nothing to do", file=sys.stderr)
        return config.out
    state = start(config)
    with store.lock(config.out), recording(state):
        claim(state)
        require_needs(state, until)
        if until not in ("calibrate", "plan"):
            require_training(state)
        moments = timed(state, "calibrate", calibrate)
        if until == "calibrate":
            return config.out
        if config.convert.disentangle != "none":
            moments = timed(state, "disentangle", disentangle, moments)
        plan = timed(state, "plan", make_or_load_plan, moments)
        if until == "plan":
            return config.out
        made = make_model(state, moments, plan)
        if until == "convert":
            return config.out
        results = timed(state, "evaluate", evaluate)
        if config.sae_dir is not None:
            timed(state, "sae", look_at_features, moments)
        entropy = timed(state, "lens", look_inside)
        timed(state, "report", report, moments, plan, made, results, entropy)
        store.remove(state.work)
    return config.out


def start(config: MainConfig) -> Run:
    """Open the inputs and choose the device; nothing is written yet."""
    torch.manual_seed(config.seed)
    keep_freed_memory()
    device = choose_device(config.device)
    if config.llama_dir is not None and config.out.resolve().is_relative_to(
        config.llama_dir.resolve()
    ):
        raise UsageError(
            "the output would go into the checkpoint",
            where="--out",
            found=config.out,
            hint="choose a folder outside --llama_dir",
        )
    opened = open_source(config.llama_dir)
    require_saes(config, opened)
    source, stamps = ReadAhead(opened), stamps_of(opened.files)
    return Run(config, source, open_tokenizer(source), device, stamps)


def dry_run(config: MainConfig) -> str:
    """What `run` would do, in a few lines: model, texts, sizes."""
    config = config.resolved()
    state = start(config)
    shapes = state.source.specs().values()
    params = sum(spec.nbytes // spec.dtype.itemsize for spec in shapes)
    options, texts = config.convert, config.texts
    bits = options.bits_per_weight
    budget = f"--bits_per_weight {bits}" if bits else f"--keep {options.keep}"
    lines = [
        f"model        {state.source.name} ({state.source.format}), {params:,} parameters",
        f"calibration  {calibration_names(config)}, {texts.calib_tokens:,} tokens",
        f"convert      --format {options.format} {budget} --metric {options.metric}",
        f"train        --effort {config.train.effort}: {config.train.passes} passes of "
        f"refinement per block, {config.train.healing:,} tokens of healing",
        "evaluation   " + ", ".join(text.name for text in evaluation_texts(config)),
        f"device       {state.device}",
        needs_text(state, "report"),
    ]
    return "\n".join(lines)


def evaluate_folder(config: EvalConfig) -> dict[str, Any]:
    """Quality of a converted folder against its dense checkpoint, on one text."""
    from qll.evaluate import quality_of_pair
    from qll.model import load, load_dense

    device, source = choose_device(config.device), open_source(config.llama_dir)
    topics = builtin_texts()["python_topics_evaluation"]
    text = topics if config.eval_text is None else read_text(config.eval_text)
    tokenizer = open_tokenizer(source)
    windows, scored = encode(text, tokenizer, config.eval_tokens, config.context)
    dense = load_dense(source, torch.float32, device)
    converted = load(config.model, device=device, dtype=torch.float32)
    quality = quality_of_pair(dense, converted, windows, scored)
    return {"text": text.name, "sha256": text.sha256, **quality}


def look_at_folder(config: LensConfig) -> Path:
    """Study autoencoders on a folder converted earlier; returns --out, which then has lens.json.

    Everything is opened before anything is written. Raises UsageError when the folder or the
    moments were made from another checkpoint than --llama_dir.
    """
    out, source = config.out, open_source(config.llama_dir)
    model = converted_in(config.model, source)
    names = require_places(config.sae_dir, config.places(), source)
    topics = builtin_texts()["python_topics_evaluation"]
    text = topics if config.eval_text is None else read_text(config.eval_text)
    tokenizer = open_tokenizer(source)
    pair = Pair(
        source,
        model,
        tokenizer,
        choose_device(config.device),
        text,
        encode(text, tokenizer, config.eval_tokens, min(CONTEXT, config.eval_tokens))[0],
        out,
        out / "work",
        None if config.moments is None else moments_of(config.moments, source),
        config.reach,
        config.run_again,
        config.seed,
    )
    settings = {key: value for key, value in to_json(config).items() if key != "out"}
    settings |= {"fingerprint": source.fingerprint, "text_sha256": text.sha256}
    settings["converted"] = store.sha256(model / store.MANIFEST_NAME)
    with store.lock(out):
        claim_folder(out, settings)
        if (out / "lens.json").exists():
            print(f"{out} is complete; nothing to do", file=sys.stderr)
            return out
        with hearing(partial(note_warning, out / "events.jsonl")):
            section = look_at_pair(pair, config.sae_dir, names)
        heard = [line["message"] for line in store.read_lines(out / "events.jsonl")]
        facts = {"schema_version": 1, "model": source.name, "converted": str(config.model)}
        warnings = list(dict.fromkeys(heard))
        store.write_json(out / "lens.json", {**facts, **section, "warnings": warnings})
        store.remove(pair.work)
    return out


def converted_in(folder: Path, source: Source) -> Path:
    """The converted checkpoint in `folder`, which may be the output of a run.

    Raises UsageError when it was made from another checkpoint than `source`.
    """
    inner = folder / "model"
    model = inner if (inner / store.MANIFEST_NAME).is_file() else folder
    made = store.read_manifest(model).get("source", source.fingerprint)
    if made != source.fingerprint:
        raise UsageError(
            "the converted folder was made from another checkpoint",
            where=folder,
            expected=f"source {made[:16]}",
            found=f"{source.name}, {source.fingerprint[:16]}",
            hint="name its dense checkpoint with --llama_dir",
        )
    return model


def choose_device(name: str) -> torch.device:
    """The torch device of --device; raises UsageError when this machine lacks it."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((kind for kind, there in found.items() if there), "cpu"))
    if name in found and not found[name]:
        raise UsageError(
            "this machine has no such device",
            where="--device",
            expected=", ".join([*(k for k, there in found.items() if there), "cpu"]),
            found=name,
            hint="use --device auto",
        )
    return torch.device(name)


def evaluate(state: Run) -> dict[str, Any]:
    """Quality on two texts and cost of both models; the converted one is read back from disk."""
    from qll.evaluate import cost_of_pair, quality_of_pair
    from qll.model import load, load_dense

    path = state.results
    if path.exists():
        return store.read_json(path)
    dense = load_dense(state.source, torch.float32, state.device)
    converted = load(state.model, device=state.device, dtype=torch.float32)
    texts = {}
    for text in evaluation_texts(state.config):
        windows, scored = encode(
            text, state.tokenizer, state.config.texts.eval_tokens, state.config.texts.context
        )
        texts[text.name] = {
            "sha256": text.sha256,
            **quality_of_pair(dense, converted, windows, scored),
        }
    results = {"texts": texts, "cost": cost_of_pair(dense, converted)}
    store.write_json(path, results)
    return results


def look_inside(state: Run) -> dict[str, Any]:
    """Entanglement entropies of every dense matrix and of the one it became."""
    from qll.lens import model_look
    from qll.model import load

    path = state.entropy
    if path.exists():
        return store.read_json(path)
    converted = load(state.model, device="cpu", dtype=torch.float32, verify=False)
    seen = model_look(state.source, converted)
    store.write_json(path, seen)
    return seen


def report(
    state: Run,
    moments: MomentStore | None,
    plan: Plan,
    made: dict[str, Any],
    results: dict[str, Any],
    entropy: dict[str, Any],
) -> None:
    """report.html, then report.json, whose presence says that the run is complete."""
    from qll.report import build_report, compression_section, model_section, render

    dtype = str(saved_dtype(state.source, state.config.convert)).removeprefix("torch.")
    value = build_report(
        model=model_section(state.source),
        compression=compression_section(state.source, plan, made, state.model, dtype),
        entropy=entropy,
        quality={
            "texts": results["texts"],
            "calibration": calibration_facts(state.config, moments),
        },
        sae=store.read_json(state.features) if state.features.exists() else None,
        cost={**results["cost"], "seconds": total_seconds(state.events)},
        warnings=state.warnings,
        provenance=store.read_json(state.out / "run.json"),
    )
    store.write_text(state.out / "report.html", render(value))
    store.write_json(state.out / "report.json", value)
