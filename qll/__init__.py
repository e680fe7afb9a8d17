"""Quantum Llama Lens: Llama checkpoints as tensor networks, and what that did to the inside.

The public names below are imported when first used: `import qll` costs milliseconds and does not
import torch. It does make `AutoModelForCausalLM.from_pretrained` understand converted folders.

>>> import qll
>>> sorted(qll.__all__)[:4]
['ConvertConfig', 'SAETrainConfig', 'attach', 'build_report']
"""

from importlib import import_module
from typing import Any

from qll import _register

_PUBLIC = {
    "open": ("qll.load", "open_source"),
    "open_tokenizer": ("qll.load", "open_tokenizer"),
    "load": ("qll.model", "load"),
    "load_dense": ("qll.model", "load_dense"),
    "plan": ("qll.api", "plan"),
    "convert": ("qll.api", "convert"),
    "evaluate": ("qll.api", "evaluate"),
    "generate": ("qll.model", "generate"),
    "export_dense": ("qll.model", "export_dense"),
    "export_two_linear": ("qll.model", "export_two_linear"),
    "load_sae": ("qll.lens", "load_sae"),
    "attach": ("qll.lens", "attach"),
    "train_sae": ("qll.saejob", "train"),
    "load_lm": ("qll.bytelm.saved", "load_lm"),
    "build_report": ("qll.report", "build_report"),
    "render": ("qll.report", "render"),
    "ConvertConfig": ("qll.config", "MainConfig"),
    "SAETrainConfig": ("qll.saetrain", "SAETrainConfig"),
}

__all__ = list(_PUBLIC)
__version__ = "0.1.0"

_register.install()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module, attribute = _PUBLIC[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'qll' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
