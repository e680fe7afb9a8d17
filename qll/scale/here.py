"""Jobs in this process, one after the other, with all its threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qll.options import ConvertOptions
from qll.scale.inputs import Opened


class Here:
    """The executor of a run without workers.

    >>> from qll.load import open_source
    >>> here = Here(Opened(open_source(None), None), ConvertOptions())
    >>> list(here.run(lambda source, moments, options, item: item * options.keep, [1, 2]))
    [0.8, 1.6]
    """

    def __init__(self, inputs: Opened, options: ConvertOptions) -> None:
        self.inputs, self.options = inputs, options

    def run(self, step: Callable[..., Any], items: Iterable[Any], *fixed: Any) -> Iterator[Any]:
        """`step(source, moments, options, item, *fixed)` of every item.

        Raises SourceChangedError when a weight file changes meanwhile.
        """
        for item in items:
            self.inputs.require_unchanged()
            result = step(self.inputs.source, self.inputs.moments, self.options, item, *fixed)
            self.inputs.require_unchanged()
            yield result
