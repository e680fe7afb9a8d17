"""The stages before conversion: second moments of a text, other bases, the plan.

Each may be given instead of made: --moments from an earlier calibration, --plan from a file.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from qll import store
from qll.calibrate import MomentStore, collect, prior_windows
from qll.config import MainConfig
from qll.convert import (
    TRIAL_CONTEXT,
    TRIAL_TOKENS,
    Plan,
    Trial,
    disentangled,
    load_plan,
    make_plan,
)
from qll.errors import UsageError
from qll.load import Source
from qll.runfolder import Run
from qll.runjobs import executor_for, gauges_path
from qll.runsaes import feature_gradients
from qll.runtexts import calibration_windows, trial_windows
from qll.train import choose_precision

logger = logging.getLogger("qll.runplan")


def calibrate(state: Run) -> MomentStore | None:
    """Second moments of every linear on the calibration text, or None for the plain metric."""
    config, convert = state.config, state.config.convert
    is_exact = convert.is_exact and not convert.is_packed
    if config.moments is not None:
        moments = given_moments(config, state.source)
    elif convert.metric == "plain" or is_exact:
        return None
    else:
        windows = calibration_windows(state, config.texts.calib_tokens, config.texts.context)
        moments = collect(
            state.source,
            windows,
            state.work / "moments",
            gradients=convert.metric == "kfac",
            device=state.device,
            extra=feature_gradients(config, state.source, state.device),
            precision=calibration_precision(state),
            labels=convert.labels,
        )
    if not config.texts.prior_tokens:
        return moments
    return MomentStore(moments.folder, prior=prior_moments(state))


def calibration_precision(state: Run) -> torch.dtype:
    """The dtype in which the calibration multiplies: float32, or for a checkpoint in bfloat16 that
    of --precision, bfloat16 where it is fast."""
    stored = state.source.specs()["model.layers.0.self_attn.q_proj.weight"].dtype
    if stored != torch.bfloat16:
        return torch.float32
    return choose_precision(state.config.train.precision, state.device)


def prior_moments(state: Run) -> MomentStore:
    """Input moments on random tokens, for a calibration text that is too short."""
    texts, vocab = state.config.texts, state.source.config.vocab_size
    windows = prior_windows(
        min(vocab, len(state.tokenizer)),
        state.tokenizer.all_special_ids,
        texts.prior_tokens,
        min(texts.context, texts.prior_tokens),
        state.config.seed,
    )
    return collect(
        state.source,
        windows,
        state.work / "prior",
        gradients=False,
        device=state.device,
        precision=calibration_precision(state),
    )


def moments_of(folder: Path, source: Source) -> MomentStore:
    """The moments in `folder`; raises UsageError when they are of another checkpoint."""
    moments = MomentStore(folder)
    if moments.summary["source"] != source.fingerprint:
        raise UsageError(
            "the moments belong to another checkpoint",
            where=folder,
            expected=f"source {source.fingerprint[:16]}",
            found=moments.summary["source"][:16],
            hint="run `calibrate` on this checkpoint",
        )
    return moments


def given_moments(config: MainConfig, source: Source) -> MomentStore:
    """The moments of --moments; raises UsageError when they do not fit checkpoint or settings."""
    moments = moments_of(config.moments, source)
    weight = moments.summary.get("extra", {}).get("feature_weight", 0.0)
    if weight != config.convert.feature_weight:
        raise UsageError(
            "the moments were measured with another weight of features",
            where=config.moments,
            expected=f"--feature_weight {config.convert.feature_weight}",
            found=weight,
            hint="run `calibrate` with this --feature_weight and --sae_dir",
        )
    if config.convert.metric == "kfac" and not moments.gradients:
        raise UsageError(
            "the moments hold no gradients",
            where=config.moments,
            expected="for kfac",
            hint="run `calibrate` with --metric kfac",
        )
    labels = moments.summary.get("labels", "text")
    if config.convert.metric == "kfac" and labels != config.convert.labels:
        raise UsageError(
            "the moments hold gradients of other labels",
            where=config.moments,
            expected=f"--labels {config.convert.labels}",
            found=labels,
            hint=f"use --labels {labels}, or run `calibrate` again",
        )
    return moments


def disentangle(state: Run, moments: MomentStore | None) -> MomentStore | None:
    """The same model in bases that are easier to split, from here on; also the moments in them."""
    path = gauges_path(state)
    state.source, turned = disentangled(state.source, moments, state.config.convert, path)
    return turned


def make_or_load_plan(state: Run, moments: MomentStore | None) -> Plan:
    """The plan of --plan or in plan.json (both perhaps edited), or a new one; in plan.json."""
    path = state.out / "plan.json"
    if state.config.plan is not None:
        given_plan(state).save(path)
    elif not path.exists():
        work, executor = state.work / "candidates", executor_for(state, moments)
        options = state.config.convert
        store.make_folder(work)
        work = work.absolute()  # workers have other current folders
        make_plan(state.source, moments, options, trial_of(state), work, executor).save(path)
        for name in ("sensitivity", "candidates"):
            store.remove(state.work / name)
    plan = load_plan(path, state.source.config)
    if plan.size > plan.budget:
        logger.warning(
            "%s: holds %d %s, %d more than its budget",
            *(path, plan.size, plan.size_unit, plan.size - plan.budget),
        )
    return plan


def given_plan(state: Run) -> Plan:
    """The plan of --plan; raises UsageError when it was made for another --keep or --metric."""
    path, options = state.config.plan, state.config.convert
    plan = load_plan(path, state.source.config)
    made_for = {"keep": plan.keep, "metric": plan.metric, "bits_per_weight": 0.0}
    if plan.bits is not None:
        made_for |= {"bits_per_weight": plan.bits.per_weight, "bits_group": plan.bits.group}
    for name, value in made_for.items():
        if value != getattr(options, name):
            raise UsageError(
                f"the plan was made for another --{name}",
                where=path,
                expected=value,
                found=getattr(options, name),
                hint=f"give --{name} {value}",
            )
    return plan


def trial_of(state: Run) -> Trial | None:
    """Where --losses measured measures: on text of the calibration that the moments did not see."""
    if state.config.convert.losses != "measured":
        return None
    windows = trial_windows(state, TRIAL_TOKENS, TRIAL_CONTEXT)
    return Trial(windows, state.work / "sensitivity", state.device)
