"""Training of sparse autoencoders: activations of a model in, folders for sparsify or SAELens out.

Read `coder` for what is trained, `sparse` for how it is fast, `stream` and `trainer` for the run.
"""

from importlib import import_module
from typing import Any

# Imported when first used: the settings must not bring torch with them
_ELSEWHERE = {
    "Buffer": "stream",
    "Coder": "coder",
    "CoderShape": "coder",
    "LearningOptions": "settings",
    "Learner": "learner",
    "SAETrainConfig": "settings",
    "Stream": "stream",
    "Trainer": "trainer",
}

__all__ = list(_ELSEWHERE)


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(import_module(f"qll.saetrain.{_ELSEWHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
