"""Steps of a conversion that do not wait for each other, and who runs them.

A step is a plain function `step(source, moments, options, item, *fixed)` that reads its own slice
of the checkpoint and of the moments and, where it leaves more than a few numbers, writes its own
file. An executor knows where source and moments are; `qll.scale` has executors for several
processes and machines, this one runs the steps where it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

from qll.calibrate import MomentStore
from qll.load import Source
from qll.options import ConvertOptions

Result = TypeVar("Result")


@runtime_checkable
class Executor(Protocol):
    """Whoever runs steps."""

    def run(
        self, step: Callable[..., Result], items: Iterable[Any], *fixed: Any
    ) -> Iterator[Result]:
        """`step(source, moments, options, item, *fixed)` of every item, in the order they end.

        The iterator is the barrier: it ends when every step has. Step, items and results can be
        pickled.
        """
        ...


class InOrder:
    """Runs steps here, one after the other; `ahead(source, item)` begins to read for the next one.

    >>> from qll.load import open_source
    >>> here = InOrder(open_source(None), None, ConvertOptions())
    >>> list(here.run(lambda source, moments, options, item: item * options.keep, [1, 2]))
    [0.8, 1.6]
    """

    def __init__(
        self,
        source: Source,
        moments: MomentStore | None,
        options: ConvertOptions,
        ahead: Callable[[Source, Any], None] | None = None,
    ) -> None:
        self.inputs, self.ahead = (source, moments, options), ahead

    def run(
        self, step: Callable[..., Result], items: Iterable[Any], *fixed: Any
    ) -> Iterator[Result]:
        """See `Executor`."""
        items = list(items)
        for number, item in enumerate(items, 1):
            if self.ahead is not None and number < len(items):
                self.ahead(self.inputs[0], items[number])
            yield step(*self.inputs, item, *fixed)
