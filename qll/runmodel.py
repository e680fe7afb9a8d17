"""The stages that make the converted checkpoint: closed forms, refinement, healing, writing.

Each leaves its result in work/ under the hash of the plan, so that a killed run goes on where it
was and an edited plan starts anew.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qll import store
from qll.calibrate import MomentStore
from qll.convert import (
    Plan,
    RefineSettings,
    assemble,
    convert_units,
    measured_again,
    packings_of,
    quantise_units,
    refine,
    require_held_out,
    saved_dtype,
    trained_path,
)
from qll.errors import UsageError
from qll.load import require_unchanged
from qll.runfolder import Run, timed
from qll.runjobs import executor_for
from qll.runtexts import calibration_windows
from qll.train import (
    CHECKPOINT_NAME,
    RATES,
    HealSettings,
    choose_precision,
    free_bytes,
    heal,
    healing_bytes,
)

logger = logging.getLogger("qll.runmodel")


def make_model(state: Run, moments: MomentStore | None, plan: Plan) -> dict[str, Any]:
    """The converted checkpoint in model/, manifest last; returns the facts in its manifest.

    Closed forms, then what --effort adds to them: block refinement, healing.
    """
    if facts := finished_model(state):
        return facts
    train, trained, training = state.config.train, None, {}
    records = timed(state, "convert", convert, moments, plan)
    is_lossy = any(entry.spec is not None for entry in plan.entries)
    is_lossy = is_lossy and not state.config.convert.is_exact
    if train.passes and is_lossy:
        trained = plan_folder(state, "refined")
        training["refine"] = timed(state, "refine", refine_blocks, moments, plan, trained)
    healed = plan_folder(state, "healed")
    if train.healing and is_lossy and distilling_fits(state, "--heal_tokens", healed):
        refined, trained = trained, healed
        training["heal"] = timed(state, "heal", heal_model, plan, refined, trained)
    if state.config.convert.is_packed:
        records = timed(state, "pack", pack, moments, plan, trained, records)
        tuned = plan_folder(state, "tuned")
        if train.tuning and distilling_fits(state, "--tune_tokens", tuned):
            before, trained = trained, tuned
            training["tune"] = timed(state, "tune", tune_scales, plan, before, trained)
    return timed(state, "write", write_model, moments, plan, records, training, trained)


def require_training(state: Run) -> None:
    """Raise TextError before anything is measured when the texts are too short to train on, and
    UsageError when there is too little memory for a distillation that was asked for."""
    train = state.config.train
    tuning = train.tuning * state.config.convert.is_packed
    if train.heal_tokens and not state.config.convert.is_exact:
        distilling_fits(state, "--heal_tokens")
    if train.tune_tokens and state.config.convert.is_packed:
        distilling_fits(state, "--tune_tokens")
    wanted = [train.refine_tokens * bool(train.passes), train.healing]
    # at keep 1 the closed form is exact, and nothing but scales is trained
    for tokens in (*(() if state.config.convert.is_exact else wanted), tuning):
        if tokens:
            require_held_out(calibration_windows(state, tokens, train.train_context))


def distilling_fits(state: Run, flag: str, done: Path | None = None) -> bool:
    """Whether there is memory to distil; if not, a warning says so.

    flag: the setting that says for how long. done: where an earlier call left its facts, or its
    checkpoint. Raises UsageError for a flag that was given on a machine without the memory, and for
    a distillation that was begun when there was more: left out, it would be another model.
    """
    if done is not None and (done / "facts.json").is_file():
        return True
    needed = distilling_bytes(state)
    free = free_bytes(state.device)
    if needed <= free:
        return True
    begun = done is not None and (done / CHECKPOINT_NAME).is_file()
    if begun or getattr(state.config.train, flag.removeprefix("--")) is not None:
        raise UsageError(
            f"too little memory to {'go on with distilling' if begun else 'distil'} this model",
            where=flag,
            expected=f"about {needed / 1e9:.0f} GB",
            found=f"{free / 1e9:.0f} GB free",
            hint="free memory and run the same command again"
            if begun
            else f"leave {flag} out, or run on a larger machine",
        )
    logger.warning(
        "distillation (%s) was left out: two models and an optimiser need about %.0f GB, %.0f are "
        "free",
        *(flag, needed / 1e9, free / 1e9),
    )
    return False


def distilling_bytes(state: Run) -> int:
    """Bytes of memory at most that a distillation takes."""
    params = sum(math.prod(spec.shape) for spec in state.source.specs().values())
    return healing_bytes(state.source.config, params, state.config.train.train_context)


def finished_model(state: Run) -> dict[str, Any] | None:
    """The manifest of model/ when it was made of this very plan; another one is deleted."""
    if not (state.model / store.MANIFEST_NAME).is_file():
        return None
    manifest = store.read_manifest(state.model)
    if manifest["plan_sha256"] == store.sha256(state.out / "plan.json"):
        return manifest
    print("plan.json was edited: converting again", file=sys.stderr)
    forget_model(state)
    return None


def convert(state: Run, moments: MomentStore | None, plan: Plan) -> list[dict[str, Any]]:
    """The closed form of every matrix in work/cores; returns the per-matrix records."""
    options, cores = state.config.convert, cores_of(state)
    store.make_folder(cores)
    executor = executor_for(state, moments)
    return convert_units(state.source, moments, plan, options, cores, state.events, executor)


def refine_blocks(
    state: Run, moments: MomentStore | None, plan: Plan, trained: Path
) -> list[dict[str, Any]]:
    """Every block trained against its dense self; leaves tensors in `trained`."""
    train = state.config.train
    precision = choose_precision(train.precision, state.device)
    settings = RefineSettings(
        train.passes, train.refine_rate, precision=precision, seed=state.config.seed
    )
    windows = calibration_windows(state, train.refine_tokens, train.train_context)
    source, options = state.source, state.config.convert
    cores = cores_of(state)
    return refine(source, plan, options, moments, windows, cores, trained, settings, state.device)


def heal_model(state: Run, plan: Plan, refined: Path | None, trained: Path) -> dict[str, Any]:
    """The whole model trained against the dense one; leaves tensors in `trained`."""
    from qll.model import load, load_dense

    if (trained / "facts.json").is_file():
        return store.read_json(trained / "facts.json")
    train = state.config.train
    start = state.work / "start"
    assemble_folder(state, plan, refined, start, as_float=True)
    dense = load_dense(state.source, torch.float32, state.device)
    converted = load(start, device=state.device, dtype=torch.float32, verify=False)
    rates = RATES if train.heal_rate is None else (train.heal_rate,)
    facts = distil(state, "healing", dense, converted, train.healing, rates, trained)
    save_trained(converted, trained)
    store.write_json(trained / "facts.json", facts)
    store.remove(start)
    return facts


def distil(
    state: Run,
    name: str,
    dense: Any,
    converted: Any,
    tokens: int,
    rates: tuple[float, ...],
    work: Path,
) -> dict[str, Any]:
    """Train what can be trained of `converted` on the calibration texts; returns the facts."""
    train = state.config.train
    precision = choose_precision(train.precision, state.device)
    settings = HealSettings(tokens, rates, name=name, precision=precision, seed=state.config.seed)
    windows = calibration_windows(state, tokens, train.train_context)
    return heal(dense, converted, windows, work, settings)


def pack(
    state: Run,
    moments: MomentStore | None,
    plan: Plan,
    trained: Path | None,
    records: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The integers of --bits beside the cores; returns the records with their errors."""
    options, cores = state.config.convert, cores_of(state)
    trained = None if trained is None else trained.absolute()
    executor, inputs = executor_for(state, moments), (state.source, moments, plan, options)
    return quantise_units(*inputs, cores, trained, state.events, records, executor)


def tune_scales(state: Run, plan: Plan, healed: Path | None, trained: Path) -> dict[str, Any]:
    """Scales of the packed model and norm gains trained against the dense one."""
    from qll.model import load, load_dense, make_scales_trainable, tuned_scales

    if (trained / "facts.json").is_file():
        return store.read_json(trained / "facts.json")
    train = state.config.train
    start = state.work / "start"
    assemble_folder(state, plan, healed, start)
    dense = load_dense(state.source, torch.float32, state.device)
    converted = load(start, device=state.device, dtype=torch.float32, verify=False)
    make_scales_trainable(converted)
    facts = distil(state, "tuning", dense, converted, train.tuning, (train.tune_rate,), trained)
    save_trained(converted, trained, tuned_scales(converted))
    store.write_json(trained / "facts.json", facts)
    store.remove(start)
    return facts


def write_model(
    state: Run,
    moments: MomentStore | None,
    plan: Plan,
    records: list[dict[str, Any]],
    training: dict[str, Any],
    trained: Path | None,
) -> dict[str, Any]:
    """model/, committed with its manifest; returns the facts in it."""
    from qll.model import commit_folder

    options, cores, source = state.config.convert, cores_of(state), state.source
    if trained is not None and ("tune" in training or not options.is_packed):
        records = measured_again(source, moments, plan, options, cores, trained, records)
    assemble_folder(state, plan, trained, state.model)
    facts = {
        "source": state.source.fingerprint,
        "plan_sha256": store.sha256(state.out / "plan.json"),
        "matrices": records,
        "training": training,
    }
    require_unchanged(state.stamps)
    commit_folder(state.model, facts)
    store.remove(cores_of(state))
    for name in ("refined", "healed", "tuned"):
        store.remove(plan_folder(state, name))
    return facts


def assemble_folder(
    state: Run, plan: Plan, trained: Path | None, folder: Path, *, as_float: bool = False
) -> None:
    """Everything of a converted checkpoint but its manifest; `as_float` leaves out the packing."""
    from qll.model import write_static_files

    options = state.config.convert
    assemble(state.source, plan, options, cores_of(state), folder, trained, as_float=as_float)
    write_static_files(
        folder,
        state.source,
        state.tokenizer,
        {entry.unit.members: entry.spec for entry in plan.entries if entry.spec is not None},
        folded_norms=options.norms == "fold",
        dtype=saved_dtype(state.source, options),
        packings={} if as_float else packings_of(plan, options),
    )


def save_trained(model: Any, folder: Path, scales: Mapping[str, Tensor] | None = None) -> None:
    """The tensors that training moves, one file per block, for `assemble`."""
    moved = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moved |= scales or {}
    layers = model.config.num_hidden_layers
    for block in [*range(layers), None]:
        prefix = "model.norm." if block is None else f"model.layers.{block}."
        tensors = {name: t.cpu() for name, t in moved.items() if name.startswith(prefix)}
        store.write_tensors(trained_path(folder, block), tensors)


def cores_of(state: Run) -> Path:
    """Where the closed forms lie until the model is written; workers have other current folders."""
    return (state.work / "cores").absolute()


def plan_folder(state: Run, name: str) -> Path:
    """A folder of work that belongs to the plan as it is now."""
    return state.work / f"{name}-{store.sha256(state.out / 'plan.json')[:12]}"


def forget_model(state: Run) -> None:
    """Delete the converted model and all that was measured on it; moments and plan stay."""
    measured = (state.results, state.entropy, state.features)
    for path in (state.out / "report.json", state.model, *measured):
        store.remove(path)
