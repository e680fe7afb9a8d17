"""Reading ahead: the tensors that are wanted next are read by a thread while others are worked on.

What is expected is handed over once and dropped two calls later, so that memory holds one block
more (two where nobody reads them) and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from qll.load.checkpoint import TensorSpec
from qll.load.source import Source


class ReadAhead:
    """A Source that may be told what will be read next.

    >>> from qll.load.source import open_source
    >>> source = ReadAhead(open_source(None))
    >>> source.expect(["model.norm.weight"])
    >>> source.read("model.norm.weight").shape, source.config.num_hidden_layers
    (torch.Size([576]), 30)
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.path, self.name, self.format = source.path, source.name, source.format
        self.row_order, self.config = source.row_order, source.config
        self.fingerprint, self.bytes_on_disk = source.fingerprint, source.bytes_on_disk
        self.files = source.files
        self._thread = _reader()
        self._coming: list[dict[str, Future[Tensor]]] = [{}, {}]

    def specs(self) -> dict[str, TensorSpec]:
        """Spec of every tensor by HF name, in model order."""
        return self._source.specs()

    def expect(self, names: Iterable[str]) -> None:
        """Begin to read the tensors `names`; what was expected two calls ago is dropped."""
        for waiting in self._coming.pop(0).values():
            waiting.cancel()
        self._coming.append({name: self._thread.submit(self._source.read, name) for name in names})

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or some of its rows, on the CPU; raises what the source raises."""
        if rows is None:
            for coming in self._coming:
                if (tensor := coming.pop(name, None)) is not None:
                    return tensor.result()
        return self._source.read(name, rows)


def _reader() -> ThreadPoolExecutor:
    """One Python thread whose tensors are computed in it alone.

    With OpenMP threads of its own there would be more of them than cores, and libgomp then puts
    threads to sleep at every barrier, the main ones too: eigenvalues of 576 x 576 took 74 ms
    instead of 12, an evaluation a fifth longer.
    """
    threads = torch.get_num_threads()
    reader = ThreadPoolExecutor(1, thread_name_prefix="qll-read", initializer=_take_one_thread)
    reader.submit(int).result()
    torch.set_num_threads(threads)  # what MKL may use is one number for all
    return reader


def _take_one_thread() -> None:
    torch.get_num_threads()  # the first question sets the number of a new thread
    torch.set_num_threads(1)


def expect_block(source: Source, index: int) -> None:
    """Let `source`, if it reads ahead, begin with block `index`; there may be no such block."""
    if isinstance(source, ReadAhead):
        prefix = f"model.layers.{index}."
        source.expect([name for name in source.specs() if name.startswith(prefix)])
