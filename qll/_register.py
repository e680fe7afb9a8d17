"""`import qll` is enough for transformers to open converted folders, and costs nothing.

transformers has no plug-in entry point: a model type must be registered by code that has run, and
our classes need torch, which `import qll` must not import. So the import of this package only
watches for transformers' `AutoConfig`; the first call of `AutoConfig.from_pretrained` (every
`Auto*.from_pretrained` of a path goes through it) imports `qll.model`, which registers, and puts
the original method back.

Why at the first call and not when transformers is imported: at that point its modules are half
initialised (auto -> llama -> generation -> auto), and so may be ours, which import transformers.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WATCHED = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Make the first `AutoConfig.from_pretrained` of this process register our classes."""
    if WATCHED in sys.modules:
        _register_on_first_call(sys.modules[WATCHED])
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Sees one module being imported, once; finds it as everybody would."""

    def find_spec(
        self,
        fullname: str,
        path: Any,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register_on_first_call(module)

            # the loader belongs to this spec alone
            spec.loader.exec_module = run_and_register
        return spec


def _register_on_first_call(module: ModuleType) -> None:
    auto = module.AutoConfig
    original = auto.__dict__["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if auto.__dict__["from_pretrained"] is replacement:
            auto.from_pretrained = original
        import qll.model  # noqa: F401  registers its classes

        return original.__func__(cls, *args, **kwargs)

    replacement = classmethod(from_pretrained)
    auto.from_pretrained = replacement
