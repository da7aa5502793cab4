"""Run a shard of the study: python -m benchmarks.recall_study [config=configs/study/gpu.json] [key=value ...]

    results=FILE   the JSONL that is appended to (benchmarks/recall_study/results/NAME.jsonl)
    work=FOLDER    corpus, bases, and runs that were stopped (output/recall_study)
    plan=true      print which runs are left, and exit

Every other key is one of the configuration's. The same command again goes on where the last one stopped; a
finished run is never run again. Exit status: 0 all done, 3 time was up and runs are left, 1 runs failed, 2
bad input.
"""

import sys
import time
from pathlib import Path

import torch

from .arms import check_arms, other_props
from .corpus import load_corpus
from .jobs import make_choices, open_jobs, waves
from .pool import Answer, Clock, Pool, make_bench, run_here
from .runs import Job
from .settings import REPOSITORY, Settings, read_settings, to_dict
from .store import Store

DEFAULT_CONFIG = "configs/study/gpu.json"
LEFT_STATUS = 3


class Study:
    """One shard: what is left, and what to do with the answer to a job."""

    def __init__(self, settings: Settings, store: Store, work: Path) -> None:
        self.settings, self.store, self.work = settings, store, work / settings.fingerprint
        self.failed: dict[Job, str] = {}
        self.began = time.monotonic()

    def next_job(self, under_way: set[Job] = frozenset()) -> Job | None:  # type: ignore[assignment]
        make_choices(self.settings, self.store)
        jobs = (job for job in self.left() if job not in under_way and job not in self.failed)
        return next(jobs, None)

    def left(self) -> list[Job]:
        return open_jobs(self.settings, self.store, self.work, self.failed)

    def take(self, job: Job, answer: Answer) -> None:
        status, value = answer
        if status == "done":
            self.store.append(value)
        elif status == "failed":
            self.failed[job] = value
            print(f"{job.label} failed:\n{value}", file=sys.stderr, flush=True)
        minutes = (time.monotonic() - self.began) / 60
        print(f"[{minutes:5.2f} min] {job.label}: {status}{_end(value)}", flush=True)


def _end(record: object) -> str:
    if not isinstance(record, dict) or "curve" not in record:
        return ""
    last = record["curve"][-1]
    shares = " ".join(f"{n}:{share:.2f}" for n, share in last["recall"].items())
    rate = record["shared_tokens_per_second"]
    return f", {record['seconds']:.0f} s at {rate:,} tokens/s; text {last['text_loss']}; recall {shares}"


def parse(arguments: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(this command's own keys, overrides of the configuration)."""
    own = {"config": DEFAULT_CONFIG, "results": "", "work": "output/recall_study", "plan": "false"}
    overrides = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            raise ValueError(f"{argument!r}: expected key=value")
        (own if key in own else overrides)[key] = text
    return own, overrides


def main(arguments: list[str]) -> int:
    clock_began = time.monotonic()
    try:
        own, overrides = parse(arguments)
        settings = read_settings(own["config"], overrides)
        check_arms(settings)
        default = REPOSITORY / "benchmarks/recall_study/results" / f"{settings.name}.jsonl"
        file, work = Path(own["results"] or default), Path(own["work"])
        if own["plan"] == "true":
            return _plan(settings)
        if settings.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("device=cuda, and torch sees no GPU: add config=configs/study/cpu.json")
        store = Store(file, settings.fingerprint, to_dict(settings))
        return run_shard(settings, store, work, clock_began)
    except ValueError as error:
        print(f"benchmarks.recall_study: {error}", file=sys.stderr)
        return 2


def run_shard(settings: Settings, store: Store, work: Path, began: float) -> int:
    clock = Clock(settings.shard_seconds - (time.monotonic() - began), settings.grace_seconds)
    clock.listen()
    work.mkdir(parents=True, exist_ok=True)
    store.check_corpus(load_corpus(settings, work, "cpu").digest)  # workers find it made
    study = Study(settings, store, work)
    if settings.workers == 1:
        run_here(make_bench(settings, work, clock.stopped), study.next_job, study.take)
    else:
        pool = Pool(settings, work)
        try:
            pool.run(settings.workers, clock, study.next_job, study.take)
        finally:
            pool.close()
    return _report(study)


def _report(study: Study) -> int:
    make_choices(study.settings, study.store)
    left = [job for job in study.left() if job not in study.failed]
    runs = [record for record in study.store.records if record["kind"] in ("base", "arm", "cost")]
    print(
        f"{study.store.file}: {len(runs)} runs done, {len(left)} more can begin, {len(study.failed)} failed"
    )
    if study.failed:
        return 1
    return LEFT_STATUS if left else 0


def _plan(settings: Settings) -> int:
    """Sizes of the whole study, without data or device."""
    seeds = len(settings.seeds)
    print(f"{settings.name}, fingerprint {settings.fingerprint}; seeds in waves {waves(settings)}")
    for family in settings.families:
        main = len(settings.arms[family])
        sweep = settings.sweep_best * len(other_props(settings.of(family)))
        base = settings.of(family).base_steps + settings.base_decay_steps
        steps = seeds * (base + (main + sweep) * settings.post_steps)
        print(
            f"{family}: {seeds} bases of at most {base} steps, {seeds * (main + sweep)} arms of "
            f"{settings.post_steps} steps, {steps * settings.tokens_per_step / 1e6:,.0f} M tokens at most"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
