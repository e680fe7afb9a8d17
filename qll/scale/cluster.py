"""Jobs on the workers of a Dask scheduler (`--dask tcp://host:8786`), on one machine or many.

Every worker must see the checkpoint and the output folder under the same paths, and have the same
versions of the packages that compute: all of that is checked before the first job. Dask tries a job
again when its worker dies; what is lost with a scheduler is the jobs in flight.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qll.errors import MemoryShortError, QLLError, SchedulerError, UsageError, WorkerError
from qll.scale.inputs import Inputs, opened
from qll.scale.job import ATTEMPTS, Job

if TYPE_CHECKING:
    from distributed import Client, Future

CONNECT_SECONDS = 20


class Cluster:
    """The executor of --dask: every worker's jobs have `threads` threads and `needed` bytes."""

    def __init__(
        self, inputs: Inputs, scheduler: str, folder: Path, threads: int, needed: int
    ) -> None:
        self.inputs, self.scheduler, self.folder = inputs, scheduler, folder
        self.threads, self.needed = threads, needed

    def run(self, step: Callable[..., Any], items: Iterable[Any], *fixed: Any) -> Iterator[Any]:
        """`step(source, moments, options, item, *fixed)` of every item, in the order they end.

        Raises SchedulerError when the scheduler does not answer, or no longer; WorkerError for a
        worker that cannot open the inputs, or a job that failed ATTEMPTS times; MemoryShortError.
        """
        from distributed import as_completed
        from distributed.comm import CommClosedError

        jobs = [Job(self.inputs, self.threads, step, item, fixed) for item in items]
        if not jobs:
            return
        client = self._connected()
        try:
            self._require_workers(client)
            attempts = {_submit(client, job): (job, 1) for job in jobs}
            finished = as_completed(attempts, loop=client.loop)
            for future in finished:
                job, attempt = attempts.pop(future)
                failure = self._failure(future, job, attempt)
                if failure is None:
                    yield future.result().heard()
                    continue
                again = _submit(client, job)
                attempts[again] = (job, attempt + 1)
                finished.add(again)
        except (CommClosedError, TimeoutError, OSError) as error:
            raise self._gone(error) from error
        finally:
            client.close(timeout=2)

    def _connected(self) -> Client:
        try:
            from distributed import Client
        except ImportError:
            raise UsageError(
                "Dask is not installed",
                where="--dask",
                hint="pip install 'quantum-llama-lens[cluster]'",
            ) from None
        place = {"scheduler_file": self.scheduler} if _is_file(self.scheduler) else {}
        try:
            return Client(
                None if place else self.scheduler,
                timeout=CONNECT_SECONDS,
                set_as_default=False,
                **place,
            )
        except (OSError, TimeoutError, ValueError) as error:
            raise self._gone(error) from None

    def _failure(self, future: Future, job: Job, attempt: int) -> BaseException | None:
        """None for a job that succeeded, or what it may be tried again after; raises the rest."""
        from distributed import KilledWorker

        if future.status == "finished":
            return None
        if future.status in ("cancelled", "lost"):
            raise self._gone(future.status)
        error = future.exception()
        if isinstance(error, QLLError):
            raise error
        if isinstance(error, KilledWorker) or attempt == ATTEMPTS:
            raise WorkerError(
                "a job failed on every worker that tried it",
                where=job.subject,
                found=" ".join(str(error).split())[:300],
                hint=f"a worker that dies has often run out of memory (a job needs about "
                f"{self.needed / 1e9:.1f} GB); the same command goes on where it was",
            ) from error
        return error

    def _require_workers(self, client: Client) -> None:
        """Raise unless there are workers and each of them can do a job."""
        workers = client.scheduler_info(n_workers=-1)["workers"]
        if not workers:
            raise SchedulerError(
                "the scheduler has no workers",
                where=self.scheduler,
                hint="start some: dask worker ADDRESS --nthreads 1, then run the command again",
            )
        for address, facts in workers.items():
            room = facts["memory_limit"] // max(1, facts["nthreads"])
            if facts["memory_limit"] and room < self.needed:
                raise MemoryShortError(
                    "too little memory for a job",
                    where=f"worker {address} on {facts['host']}",
                    expected=f"{self.needed / 1e9:.2f} GB for each of its threads",
                    found=f"{room / 1e9:.2f} GB",
                    hint="start it with fewer --nthreads or a larger --memory-limit",
                )
        token = str(self.folder)
        for address, found in client.run(facts_of_worker, self.inputs, token).items():
            where = f"worker {address}"
            if found["problem"] is not None:
                raise WorkerError(
                    "cannot do its part",
                    where=f"{where} on {found['host']}",
                    found=found["problem"],
                    hint="mount the checkpoint and --out there under the same paths, or stop that "
                    "worker; nothing is lost",
                )
            if found["torch"] != torch.__version__:
                raise WorkerError(
                    "has another version of torch, which computes other last digits",
                    where=f"{where} on {found['host']}",
                    expected=torch.__version__,
                    found=found["torch"],
                    hint="install the same versions everywhere",
                )

    def _gone(self, error: object) -> SchedulerError:
        return SchedulerError(
            "no Dask scheduler answers",
            where=self.scheduler,
            found=" ".join(str(error).split())[:200] or type(error).__name__,
            hint="start it (dask scheduler) with its workers and run the same command again: it "
            "goes on where it was",
        )


def facts_of_worker(inputs: Inputs, folder: str) -> dict[str, Any]:
    """What a worker says of itself: its host, its torch, and what keeps it from working."""
    problem = None
    try:
        opened(inputs).require_unchanged()
        if not Path(folder).is_dir():
            problem = f"{folder}: no such folder"
    except QLLError as error:
        problem = str(error)
    return {"host": platform.node(), "torch": torch.__version__, "problem": problem}


def _submit(client: Client, job: Job) -> Future:
    # not pure: a job of an earlier attempt must not answer for this one
    return client.submit(job, pure=False)


def _is_file(scheduler: str) -> bool:
    return "://" not in scheduler and Path(scheduler).is_file()
