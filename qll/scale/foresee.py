"""A shape and a machine by name, and all that can be said of the two together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psutil

from qll.config import PlannerConfig
from qll.load.inspect import config_of
from qll.scale.draft import best_draft
from qll.scale.machines import Machine, machine_of
from qll.scale.planner import predict
from qll.scale.profile import measure
from qll.scale.shapes import SHAPES, Shape, shape_of
from qll.scale.stages import Settings
from qll.scale.survival import Autoencoders, predict_survival

ACCEPTANCES = (0.6, 0.7, 0.8, 0.9, 0.95)


def foresee(config: PlannerConfig) -> dict[str, Any]:
    """The prediction of `qll.scale.planner` with autoencoders and drafting beside it, as JSON."""
    shape, machine = _shape(config), _machine(config.machine)
    settings = Settings(
        keep=config.keep,
        metric=config.metric,
        calib_tokens=config.calib_tokens,
        eval_tokens=config.eval_tokens,
        passes=config.refine_passes,
    )
    found = predict(shape, machine, settings)
    if config.sae_places:
        saes = Autoencoders(places=config.sae_places, width=config.sae_width)
        found["survival"] = predict_survival(shape, machine, saes)
    return found | {"draft": drafting(found["model"]["params_ratio"])}


def drafting(cost: float) -> dict[str, Any]:
    """Gains of the converted model as a draft whose tokens cost `cost` of the dense model's.

    Decoding reads every weight once per token, so the cost is the share of the bytes.

    >>> drafting(0.65)["pays_above"]
    0.65
    """
    gains = {str(acceptance): best_draft(acceptance, cost) for acceptance in ACCEPTANCES}
    return {
        "cost": cost,
        "pays_above": cost,
        "gains": {a: {"drafted": count, "speedup": gain} for a, (count, gain) in gains.items()},
    }


def _shape(config: PlannerConfig) -> Shape:
    if config.shape:
        return SHAPES[config.shape]
    name, model = config_of(config.llama_dir)
    return shape_of(model, name)


def _machine(name: str) -> Machine:
    if name != "here":
        return machine_of(name)
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    memory = float(psutil.virtual_memory().total)
    return replace(machine_of("cpu2"), name="here", cores=cores, memory=memory, rates=measure())
