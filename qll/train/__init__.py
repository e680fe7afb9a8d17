"""Training of converted models: precision, optimiser and schedule, distillation, healing."""

from qll.train.distill import distillation_loss
from qll.train.healing import CHECKPOINT_NAME, RATES, HealSettings, heal, healing_bytes
from qll.train.memory import free_bytes, keep_freed_memory
from qll.train.optimise import Optimiser
from qll.train.precision import autocast, choose_precision, prepare_training

__all__ = [
    "CHECKPOINT_NAME",
    "RATES",
    "HealSettings",
    "Optimiser",
    "autocast",
    "choose_precision",
    "distillation_loss",
    "free_bytes",
    "heal",
    "healing_bytes",
    "keep_freed_memory",
    "prepare_training",
]
