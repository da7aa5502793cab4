"""Worker processes that share the device, and the clock of a shard.

A small model leaves most of a GPU idle while Python launches its kernels, so many runs go on at once, each in
a process of its own. When the shard's time is over, or on SIGTERM or Ctrl-C, workers save what they are at
and the next shard goes on from there; SIGKILL loses what the workers had under way, never a finished run.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from .corpus import load_corpus
from .runs import Bench, Job, run_job
from .settings import Settings

Answer = tuple[str, Any]  # ("done", record), ("stopped", None) or ("failed", traceback)


class Clock:
    """Whether a shard has to stop; signals stop it early."""

    def __init__(self, seconds: float, grace: float) -> None:
        self.began = time.monotonic()
        self.soft, self.hard = self.began + seconds - grace, self.began + seconds
        self.signalled = False

    def stopped(self) -> bool:
        return self.signalled or time.monotonic() >= self.soft

    def over(self) -> bool:
        return time.monotonic() >= self.hard

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        self.signalled = True


def make_bench(settings: Settings, work: Path, stopped: Callable[[], bool]) -> Bench:
    corpus = load_corpus(settings, work, settings.device)
    folder = work / settings.fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    return Bench(settings, corpus, folder, stopped)


def attempt(job: Job, bench: Bench) -> Answer:
    try:
        record = run_job(job, bench)
    except Exception:  # one arm's failure is not the study's: it is reported at the end
        return "failed", traceback.format_exc()
    return ("done", record) if record else ("stopped", None)


def run_here(bench: Bench, next_job: Callable[[], Job | None], take: Callable[[Job, Answer], None]) -> None:
    """All jobs one after the other in this process."""
    while not bench.stopped() and (job := next_job()):
        take(job, attempt(job, bench))


@dataclass
class Worker:
    process: BaseProcess
    pipe: Connection
    job: Job | None = None


class Pool:
    """Workers that each take one job at a time. Cost jobs run with nothing else under way."""

    def __init__(self, settings: Settings, work: Path) -> None:
        self.context = get_context("spawn")
        self.stop = self.context.Event()
        self.start = lambda: self._start(settings, work)
        self.workers: list[Worker] = []

    def _start(self, settings: Settings, work: Path) -> Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(settings, work, theirs, self.stop), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def run(
        self,
        count: int,
        clock: Clock,
        next_job: Callable[[set[Job]], Job | None],
        take: Callable[[Job, Answer], None],
    ) -> None:
        """Until no job is left or the clock stops it.

        next_job: the jobs under way -> the next one, or None when none can begin now.
        """
        while not clock.over():
            if clock.stopped():
                self.stop.set()
            else:
                self._hand_out(count, next_job)
            busy = [worker for worker in self.workers if worker.job]
            if not busy:
                return
            for pipe in connection.wait([worker.pipe for worker in busy], timeout=0.2):
                self._receive(next(worker for worker in busy if worker.pipe is pipe), take)

    def _hand_out(self, count: int, next_job: Callable[[set[Job]], Job | None]) -> None:
        while True:
            under_way = {worker.job for worker in self.workers if worker.job}
            if len(under_way) >= count or any(job.kind == "cost" for job in under_way):
                return
            job = next_job(under_way)
            if job is None or (job.kind == "cost" and under_way):
                return
            worker = next((worker for worker in self.workers if worker.job is None), None)
            if worker is None:
                self.workers.append(worker := self.start())
            worker.pipe.send(job)
            worker.job = job

    def _receive(self, worker: Worker, take: Callable[[Job, Answer], None]) -> None:
        job = worker.job
        assert job is not None
        try:
            answer = worker.pipe.recv()
            worker.job = None
        except (EOFError, OSError):  # the process died: another takes its place
            worker.process.join()
            self.workers.remove(worker)
            answer = "failed", f"the worker ended with status {worker.process.exitcode}"
        take(job, answer)

    def close(self) -> None:
        """End the workers; by force those that have not stopped within the grace."""
        for worker in self.workers:
            worker.pipe.close()
        for worker in self.workers:
            worker.process.join(timeout=0.1 if worker.job else 5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def serve(settings: Settings, work: Path, pipe: Connection, stop: Any) -> None:
    """A worker process: takes jobs until its pipe closes. Signals are for the parent to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    bench, parent = None, os.getppid()

    def stopped() -> bool:
        return stop.is_set() or os.getppid() != parent  # a killed parent leaves no one to report to

    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            bench = bench or make_bench(settings, work, stopped)
            answer = attempt(job, bench)
        except Exception:
            answer = "failed", traceback.format_exc()
        try:
            pipe.send(answer)
        except (BrokenPipeError, OSError):
            sys.exit(1)
