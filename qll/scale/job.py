"""One job: a step on one item, in whatever process it lands.

Threads are part of a job. The order in which a matrix product is summed, and so the last bits of a
factorisation, depends on how many threads share it. Every job therefore runs with the same number
of threads, whichever worker takes it and however many there are: that, files written by nobody
else, and results put back in the order of the plan, make the bytes independent of the workers.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from qll.errors import QLLError, WorkerError
from qll.scale.inputs import Inputs, opened

ATTEMPTS = 3  # of one job, when its worker dies or fails for a reason that may pass
logger = logging.getLogger("qll.scale")


@dataclass(frozen=True)
class Outcome:
    """What a job brings back: the result of its step, and what was warned about."""

    result: Any
    warnings: tuple[str, ...] = ()

    def heard(self) -> Any:
        """The result; the warnings are repeated in this process."""
        for message in self.warnings:
            logger.warning("%s", message)
        return self.result


@dataclass(frozen=True)
class Job:
    """A step on one item, in a worker."""

    inputs: Inputs
    threads: int
    step: Callable[..., Any]
    item: Any
    fixed: tuple[Any, ...] = ()

    @property
    def subject(self) -> str:
        """What it is about: the unit of an entry, or step and number of a block."""
        unit = getattr(self.item, "unit", None)
        return unit.name if unit is not None else f"{self.step.__name__} {self.item}"

    def __call__(self) -> Outcome:
        """Run it here. Raises the errors of the step with this worker in front of their place."""
        listener = Listener()
        logging.getLogger("qll").addHandler(listener)
        torch.set_num_threads(self.threads)
        try:
            found = opened(self.inputs)
            found.require_unchanged()
            with threadpool_limits(self.threads):  # those of scipy
                result = self.step(
                    found.source, found.moments, self.inputs.options, self.item, *self.fixed
                )
            found.require_unchanged()
        except QLLError as error:
            raise named(error) from None
        finally:
            logging.getLogger("qll").removeHandler(listener)
        return Outcome(result, tuple(listener.messages))


class Listener(logging.Handler):
    """Collects warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of one record."""
        self.messages.append(record.getMessage())


def worker_name() -> str:
    """This process, as an error names it.

    >>> worker_name().startswith("worker ")
    True
    """
    return f"worker {platform.node()}, process {os.getpid()}"


def named(error: QLLError) -> QLLError:
    """The same error with this worker in front of its place; UsageError becomes WorkerError, since
    nothing is wrong with the command line.

    >>> str(named(WorkerError("is gone", where="moments"))).endswith(": moments: is gone")
    True
    """
    place = worker_name() if error.where is None else f"{worker_name()}: {error.where}"
    kind = type(error) if error.exit_code == QLLError.exit_code else WorkerError
    facts = {"expected": error.expected, "found": error.found, "hint": error.hint}
    return kind(error.what, where=place, **facts)
