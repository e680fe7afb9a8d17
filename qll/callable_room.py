"""Rooms that are also verbs: `qll.load(folder)` although `qll.load` is a package.

A module cannot be called, but an instance of a subclass of the module type can. Each such room
hands itself to `callable_room` and stays an ordinary package in every other way.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def callable_room(name: str, module: str, function: str) -> None:
    """Make the imported package `name` callable; a call goes to `function` of `module`.

    >>> import qll.load
    >>> callable(qll.load)
    True
    """

    class Room(ModuleType):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return getattr(import_module(module), function)(*arguments, **options)

    sys.modules[name].__class__ = Room
