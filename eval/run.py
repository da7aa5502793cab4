"""The command from its arguments to the report: everything is checked before the first model is loaded."""

import contextlib
import functools
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from . import opening, output, report
from .ahead import Ahead
from .outcomes import answer_all, outside_share
from .registry import Family, load_families, select
from .session import Session
from .settings import EvalArguments, Settings, read_settings
from .store import Store, locked

Tasks = list[tuple[Family, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input and nothing loaded, 1 some task failed, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help", "help"} & set(argv):
        print(EvalArguments.__doc__.strip())
        return 0
    if {"tasks=list", "--tasks=list"} & set(argv):
        _print_tasks()
        return 0
    prepared = False
    try:
        settings, tasks, skipped, sources = prepare(argv)
        with locked(settings.output):
            prepared = True
            return evaluate(settings, tasks, skipped, sources, argv)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1 if prepared else 2


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _print_tasks() -> None:
    for family in load_families().values():
        print(f"{family.name}: {' '.join(family.tasks + family.extra)}")


def prepare(argv: Sequence[str]) -> tuple[Settings, Tasks, dict[str, str], list[tuple[Any, dict]]]:
    """Settings, the tasks that can run, why others cannot, and the models with what identifies them.

    Raises:
        ValueError: anything wrong that can be seen before a model is loaded.
    """
    settings = read_settings(argv)
    chosen = select(settings.tasks)
    for family in {family.name: family for family, _ in chosen}.values():
        family.check(settings)
    opening.check_machine(settings)
    sources = opening.find_sources(settings.models)
    opening.check_sources(sources, settings)
    runnable, skipped = [], {}
    for family, task in chosen:
        reason = family.lacks(task, settings)
        if reason is None:
            runnable.append((family, task))
        else:
            skipped[task] = reason
    _print_skipped(skipped)
    if not runnable:
        raise ValueError("none of the chosen tasks can run; what each of them lacks stands above")
    identified = [(source, opening.identify(source, settings)) for source in sources]
    return settings, runnable, skipped, output.claim(settings.output, identified)


def _print_skipped(skipped: dict[str, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for task, reason in skipped.items():
        by_reason.setdefault(reason, []).append(task)
    for reason, names in by_reason.items():
        print(f"skipped {', '.join(names)}: {reason}", file=sys.stderr)


def evaluate(
    settings: Settings,
    tasks: Tasks,
    skipped: dict[str, str],
    sources: list[tuple[Any, dict]],
    argv: Sequence[str],
) -> int:
    results: report.Results = {
        "format": 1,
        "command": f"python -m eval {' '.join(argv)}",
        "seed": settings.seed,
        "skipped": skipped,
        "not_finished": {},
        "plots": [],
        "models": [],
    }
    earlier = output.plots(settings.output)
    for source, identity in sources:
        try:
            results["models"].append(run_model(source, identity, settings, tasks))
        except Exception as error:  # the other models are still compared
            reason = _one_line(error)
            if not isinstance(error, (ValueError, OSError, MemoryError, torch.OutOfMemoryError)):
                traceback.print_exc()  # nobody foresaw it
                reason = f"{type(error).__name__}: {reason}"
            results["not_finished"][source.label] = reason
            print(f"error: {source.label}: {reason}", file=sys.stderr)
        if not results["models"]:
            continue
        if settings.plots:
            from .plots import draw

            results["plots"] = [file.name for file in draw(results, settings.output / "plots")]
            for stale in earlier - set(results["plots"]):
                (settings.output / "plots" / stale).unlink(missing_ok=True)
        # after each model: what is done is on the disk if the next one is interrupted
        report.write(results, settings.output)
    if results["models"]:
        print(report.table(results))
        written = "report.md, results.json, plots/" if settings.plots else "report.md, results.json"
        print(f"\n{settings.output}: {written}")
    failed = results["not_finished"] or any(model["failed"] for model in results["models"])
    return 1 if failed else 0


def run_model(source: Any, identity: dict[str, Any], settings: Settings, tasks: Tasks) -> dict[str, Any]:
    """All tasks with one model, the first of them prepared while it loads."""
    began = time.perf_counter()
    device = opening.device_of(settings)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    key = opening.identity_key(identity)
    tokenizer = opening.tokenizer_of(source, settings)
    prepare = [functools.partial(family.questions, task, settings, tokenizer) for family, task in tasks]
    with Store(settings.output / source.label, identity) as store, Ahead(prepare, key) as ahead:
        model = opening.open_model(source, settings, tokenizer)
        loaded = time.perf_counter()
        with Session(model, store, key) as session:
            outcomes = answer_all(tasks, session, ahead)
    return {
        "label": source.label,
        "path": source.path,
        "identity": identity,
        "state_elements": state_elements(model),
        "seconds": time.perf_counter() - began,
        "load_seconds": loaded - began,
        "outside_share": outside_share(sum(session.model_seconds.values()), sum(outcomes.seconds.values())),
        "peak_gpu_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.startswith("cuda") else None,
        "tasks": outcomes.done,
        "failed": outcomes.failed,
    }


def state_elements(model: Any) -> int | None:
    """Recurrent state of one sequence over all layers; None for models that are not of this repository."""
    from models import state_report

    with contextlib.suppress(AttributeError, TypeError, ValueError):
        return state_report(model.model).total_elements
    return None
