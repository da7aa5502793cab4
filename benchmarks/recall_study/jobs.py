"""Which jobs are left, and in which order: a pure function of settings, records and the bases on disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .arms import CONTROL, main_arms, sweep_arms
from .measure import mean_recall
from .runs import Job, base_file
from .settings import Settings
from .store import Record, Store


def open_jobs(settings: Settings, store: Store, work: Path) -> list[Job]:
    """Jobs that can begin now, the most urgent first: bases, arms, sweeps, cost; then further seeds."""
    everything = [job for wave in waves(settings) for job in _wave(settings, store, wave)]
    left = [job for job in everything if store.newest(job.kind, job.family, job.seed, job.arm) is None]
    wanted = {(job.family, job.seed) for job in left if job.kind == "arm"}

    def has_base(job: Job) -> bool:
        known = store.newest("base", job.family, job.seed) is not None
        return known and base_file(job, work).is_file()

    def is_open(job: Job) -> bool:
        if job.kind == "base":  # one whose weights were lost is made again when an arm still wants it
            return job in left or ((job.family, job.seed) in wanted and not has_base(job))
        return job in left and (job.kind == "cost" or has_base(job))

    return [job for job in everything if is_open(job)]


def waves(settings: Settings) -> list[tuple[int, ...]]:
    first = settings.seeds[: settings.first_seeds]
    return [seeds for seeds in (first, settings.seeds[settings.first_seeds :]) if seeds]


def _wave(settings: Settings, store: Store, seeds: tuple[int, ...]) -> Iterator[Job]:
    families = settings.families
    yield from (Job("base", family, seed) for seed in seeds for family in families)
    for seed in seeds:
        for family in families:
            yield from (Job("arm", family, seed, arm.name) for arm in main_arms(settings, family))
    for family in families:
        names = [arm.name for arm in sweep_arms(settings, chosen(store, family))]
        yield from (Job("arm", family, seed, name) for seed in seeds for name in names)
    if settings.cost_steps and seeds[0] == settings.seeds[0]:
        for family in families:
            names = [arm.name for arm in main_arms(settings, family)]
            names += [arm.name for arm in sweep_arms(settings, chosen(store, family))]
            yield from (Job("cost", family, seeds[0], name) for name in names)


def chosen(store: Store, family: str) -> list[str]:
    record = store.newest("choice", family)
    return record["best"] if record else []


def make_choices(settings: Settings, store: Store) -> None:
    """Record the arms that the sweep follows, once all main arms of the first seeds are there."""
    seeds = waves(settings)[0]
    for family in settings.families:
        if not settings.sweep_best or not settings.sweep or store.newest("choice", family):
            continue
        names = [arm.name for arm in main_arms(settings, family)]
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
