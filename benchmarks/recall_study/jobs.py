"""Which jobs are left, and in which order: a pure function of settings, records and the bases on disk."""

from collections.abc import Container
from pathlib import Path
from typing import Any

from .arms import CONTROL, main_arms, sweep_arms
from .measure import mean_recall
from .runs import Job, base_file
from .settings import Settings
from .store import Record, Store


def open_jobs(
    settings: Settings, store: Store, work: Path, failed: Container[Job] = frozenset()
) -> list[Job]:
    """Jobs that can begin now, the most urgent first: bases, arms, sweeps, cost.

    Further seeds begin when the first ones are done, `failed` jobs aside, and never slow them down.
    """
    for wave in waves(settings):
        jobs = _wave(settings, store, wave)
        left = [job for job in jobs if job not in failed and not _is_done(job, store)]
        if left:
            return _open(jobs, left, store, work)
    return []


def _open(jobs: list[Job], left: list[Job], store: Store, work: Path) -> list[Job]:
    wanted = {(job.family, job.seed) for job in left if job.kind == "arm"}

    def has_base(job: Job) -> bool:
        base = Job("base", job.family, job.seed)
        return _is_done(base, store) and base_file(base, work).is_file()

    def is_open(job: Job) -> bool:
        if job.kind == "base":  # one whose weights were lost is made again when an arm still wants it
            lost = _is_done(job, store) and not has_base(job)
            return job in left or (lost and (job.family, job.seed) in wanted)
        return job in left and (job.kind == "cost" or has_base(job))

    return [job for job in jobs if is_open(job)]


def _is_done(job: Job, store: Store) -> bool:
    return store.newest(job.kind, job.family, job.seed, job.arm) is not None


def waves(settings: Settings) -> list[tuple[int, ...]]:
    first = settings.seeds[: settings.first_seeds]
    return [seeds for seeds in (first, settings.seeds[settings.first_seeds :]) if seeds]


def _wave(settings: Settings, store: Store, seeds: tuple[int, ...]) -> list[Job]:
    """All jobs of these seeds, done or not, in order."""
    families = settings.families
    main = {f: [arm.name for arm in main_arms(settings, f)] for f in families}
    swept = {f: [arm.name for arm in sweep_arms(settings.of(f), chosen(store, f))] for f in families}
    jobs = [Job("base", family, seed) for seed in seeds for family in families]
    jobs += [Job("arm", f, seed, name) for seed in seeds for f in families for name in main[f]]
    jobs += [Job("arm", f, seed, name) for f in families for seed in seeds for name in swept[f]]
    if settings.cost_steps and seeds[0] == settings.seeds[0]:
        jobs += [Job("cost", f, seeds[0], name) for f in families for name in main[f] + swept[f]]
    return jobs


def chosen(store: Store, family: str) -> list[str]:
    record = store.newest("choice", family)
    return record["best"] if record else []


def make_choices(settings: Settings, store: Store) -> None:
    """Record the arms that the sweep follows, once all main arms of the first seeds are there."""
    seeds = waves(settings)[0]
    for family in settings.families:
        if not settings.sweep_best or not settings.sweep or store.newest("choice", family):
            continue
        names = [arm.name for arm in main_arms(settings, family) if not arm.where]
        rows = {name: [store.newest("arm", family, seed, name) for seed in seeds] for name in names}
        if all(all(records) for records in rows.values()):
            store.append(_choice(settings, family, rows))


def _choice(settings: Settings, family: str, rows: dict[str, list[Any]]) -> Record:
    """Best mean recall over the first seeds at the end of post-training."""
    scores = {
        name: sum(mean_recall(record["curve"][-1]) for record in records) / len(records)
        for name, records in rows.items()
    }
    ranked = sorted((name for name in scores if name != CONTROL), key=lambda name: -scores[name])
    return {
        "kind": "choice",
        "family": family,
        "best": ranked[: settings.sweep_best],
        "scores": {name: round(score, 5) for name, score in scores.items()},
        "seeds": list(waves(settings)[0]),
    }
