"""Jobs on several processes of this machine (`--workers N`).

Each worker is a pool of one process (concurrent.futures): when the system kills it, only the job
in its hands is lost, and a new process takes that job again. A worker ends by itself when the run
that started it is gone, so a run killed as a whole leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from queue import SimpleQueue
from typing import Any

from qll.errors import QLLError, WorkerError
from qll.scale.inputs import Inputs
from qll.scale.job import ATTEMPTS, Job, Outcome


class Processes:
    """The executor of --workers: `count` processes with `threads` threads each."""

    def __init__(self, inputs: Inputs, count: int, threads: int) -> None:
        self.inputs, self.count, self.threads = inputs, count, threads

    def run(self, step: Callable[..., Any], items: Iterable[Any], *fixed: Any) -> Iterator[Any]:
        """`step(source, moments, options, item, *fixed)` of every item, in the order they end.

        A job whose worker dies is tried ATTEMPTS times; raises WorkerError after that. What the
        step itself raises comes at once, and jobs not yet begun are not.
        """
        jobs = [Job(self.inputs, self.threads, step, item, fixed) for item in items]
        if not jobs:
            return
        workers = [Worker() for _ in range(min(self.count, len(jobs)))]
        idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in workers:
            idle.put(worker)

        def run_one(job: Job) -> Outcome:
            worker = idle.get()
            try:
                return worker.run(job)
            finally:
                idle.put(worker)

        threads = ThreadPoolExecutor(len(workers), "qll-worker")
        try:
            for future in as_completed([threads.submit(run_one, job) for job in jobs]):
                yield future.result().heard()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.stop()
            threads.shutdown()


class Worker:
    """One process, replaced by a new one when it dies."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None
        self.process = 0
        self.stopped = False

    def run(self, job: Job) -> Outcome:
        """What `job` brings back; raises WorkerError when that failed ATTEMPTS times."""
        last: Exception | None = None
        for _ in range(ATTEMPTS):
            if self.stopped:
                break
            try:
                return self._started().submit(job).result()
            except QLLError:
                raise
            except BrokenProcessPool as error:
                self.pool, last = None, error
            except Exception as error:
                last = error
        raise WorkerError(
            f"a job failed {ATTEMPTS} times",
            where=job.subject,
            found=str(last) or type(last).__name__,
            hint="a worker that the system kills has often run out of memory: take fewer workers "
            "(the same command goes on where it was)",
        ) from last

    def stop(self) -> None:
        """End the process at once; a file it was writing keeps its temporary name."""
        self.stopped = True
        pool, self.pool = self.pool, None
        if pool is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGTERM)
            pool.shutdown(cancel_futures=True)

    def _started(self) -> ProcessPoolExecutor:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(1, starting(), initializer=die_with_parent)
            self.process = self.pool.submit(os.getpid).result()
        return self.pool


def starting() -> BaseContext:
    """How processes start: forked from a clean one that has read torch already, where the system
    can. A fork of this process would copy the locks of torch's threads as they happen to be."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qll.scale.job"])
    return context


def die_with_parent() -> None:
    """Start a thread that ends this process when the one that started it is gone."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
