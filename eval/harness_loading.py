"""lm-eval 0.4.13's tasks by name, with their data read from a folder here instead of the hub."""

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

INSTALL = 'pip install "lm_eval==0.4.13"'
FEWSHOT_SEED = 1234  # with which lm-eval's own command draws examples
_ONE_AT_A_TIME = threading.Lock()  # what is changed in lm-eval for a while is put back as it was


def installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def import_lm_eval() -> None:
    """What takes a second is done before a model waits for it."""
    importlib.import_module("lm_eval.tasks")
    _compile_templates_once()


def _compile_templates_once() -> None:
    """lm-eval compiles a prompt's template anew for each document, which takes longer than all else it does.

    For good, as tasks are prepared in one thread and scored in another.
    """
    from lm_eval import utils

    if not hasattr(utils.env.from_string, "cache_info"):
        utils.env.from_string = functools.cache(utils.env.from_string)


@functools.cache
def _manager(home: str | None) -> Any:
    """lm-eval's tasks; with `home` those of one folder alone, as reading all its YAML files takes seconds."""
    from lm_eval import tasks

    if home is None:
        return tasks.TaskManager()
    folder = Path(tasks.__file__).parent / home
    return tasks.TaskManager(include_path=str(folder), include_defaults=False)


def check_name(name: str, home: str | None = None) -> None:
    """Raises ValueError when lm-eval has no such task; the nearest names are shown."""
    known = _manager(home).all_tasks
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
        raise ValueError(f"lm-eval 0.4.13 has no task {name!r}; {hint}")


def load_task(name: str, home: str | None, folder: Path | None) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    _compile_templates_once()
    check_name(name, home)
    manager = _manager(home)
    spec: Any = name
    if folder is not None:
        # a group is where lm-eval takes a task of its own with one field changed
        cache = _cache_of(folder)
        local = {"dataset_path": str(folder), "dataset_kwargs": {"cache_dir": str(cache)}}
        spec = {"group": "local", "task": [{"task": name, **local}]}
    # files are read in no time, and bars would come between those of another task
    (datasets.enable_progress_bars if folder is None else datasets.disable_progress_bars)()
    try:
        with _examples_only_if_shown():
            loaded = manager.load([spec])["tasks"]
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        cause = error.__cause__ or error  # "an error occurred while generating" says nothing by itself
        raise ValueError(
            f"lm-eval cannot read the data of {name}{f' in {folder}' if folder else ''}: "
            f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        ) from None
    if len(loaded) != 1:
        raise ValueError(f"lm_eval:{name} stands for {len(loaded)} tasks; name them one by one")
    task = next(iter(loaded.values()))
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise ValueError(f"lm_eval:{name} runs code that models write, or shows images; neither is supported")
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return task


@contextlib.contextmanager
def _examples_only_if_shown() -> Iterator[None]:
    """To read a whole training split takes longer than to answer the questions."""
    from lm_eval.api.task import ConfigurableTask

    with _ONE_AT_A_TIME:
        examples = ConfigurableTask.fewshot_docs

        def only_if_shown(task: Any) -> Any:
            return examples(task) if task.config.num_fewshot else None

        with mock.patch.object(ConfigurableTask, "fewshot_docs", only_if_shown):
            yield


def _cache_of(folder: Path) -> Path:
    """Where `datasets` keeps what it has read of a folder: another place with any change of its files.

    It goes by the name of a part of a folder alone, and would go on answering with rows that are no longer
    there, or with those of another folder. What it kept of earlier states of the folder is deleted.
    """
    import datasets

    files = sorted(file for file in folder.rglob("*") if file.is_file())
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    caches, name = Path(datasets.config.HF_DATASETS_CACHE), f"local-{_digest(str(folder.resolve()))}"
    cache = caches / f"{name}-{_digest(state)}"
    for other in caches.glob(f"{name}-*"):
        if other != cache:
            shutil.rmtree(other, ignore_errors=True)
    return cache


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
