"""lm-eval 0.4.13's tasks by name, with their data read from a folder here instead of the hub."""

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from .datafiles import DOWNLOAD, JSON_LINES, Problem, RowError, check_files, checked

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


def load_task(name: str, home: str | None, folder: Path | None, problem: Problem) -> Any:
    """
    Args:
        problem: what keeps a row of the folder, in the split that is asked about, from being asked.

    Raises:
        ValueError: no such task, no such data, or a row with a problem.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    _compile_templates_once()
    check_name(name, home)
    # files are read in no time, and bars would come between those of another task
    (datasets.enable_progress_bars if folder is None else datasets.disable_progress_bars)()
    try:
        with _lm_eval_changed(folder, problem), _without_retries():
            loaded = _manager(home).load([name])["tasks"]
    except RowError:
        raise
    except ConnectionError as error:
        raise ValueError(
            f"lm-eval wants data for {name} that is not on this machine and cannot be fetched: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
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
def _lm_eval_changed(folder: Path | None, problem: Problem) -> Iterator[None]:
    """Examples are read only if they are shown, and data from the folder if there is one."""
    from lm_eval.api.task import ConfigurableTask

    with _ONE_AT_A_TIME:
        examples = _only_if_shown(ConfigurableTask.fewshot_docs)
        download = ConfigurableTask.download
        if folder is not None:
            download = _from_folder(download, folder, problem)
        with mock.patch.multiple(ConfigurableTask, fewshot_docs=examples, download=download):
            yield


def _only_if_shown(examples: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """To read a whole training split takes longer than to answer the questions."""
    return lambda task: examples(task) if task.config.num_fewshot else None


def _from_folder(download: Callable[..., None], folder: Path, problem: Problem) -> Callable[..., None]:
    """Reads what `download` would fetch, and refuses rows with a problem before lm-eval writes a prompt.

    A task that is written in Python names its data set there, and takes no other from a configuration.
    """
    cache = str(_cache_of(folder))

    def read(task: Any, dataset_kwargs: dict[str, Any] | None = None) -> None:
        # what `eval_docs` chooses; those written in Python do not say it before they have read their data
        split = task.config.test_split or task.config.validation_split or "validation"
        part = task.config.dataset_name
        task.DATASET_PATH = str(folder)
        try:
            download(task, {**(dataset_kwargs or {}), "cache_dir": cache})
            check(task.dataset, part, split)
        except Exception:
            # which names the file and, if that is why, the row; not of CSV, where all is text
            check_files(folder, part, split, problem, (".parquet", *JSON_LINES))
            raise

    def check(dataset: Any, part: str | None, split: str) -> None:
        rows = dataset.get(split)
        if not rows:
            there = ", ".join(name for name, found in dataset.items() if found)
            raise RowError(
                f"{folder} has no rows in a split {split!r} (it has {there}): {DOWNLOAD} brings it"
            )
        # JSON as it stands: for one row of another kind `datasets` puts the others in quotes
        if check_files(folder, part, split, problem, JSON_LINES) == len(rows):
            return
        source = f"{folder}{f' ({part})' if part else ''} split {split}"
        for _ in checked(rows.to_list(), problem, source):
            pass

    return read


@contextlib.contextmanager
def _without_retries() -> Iterator[None]:
    """Without a network each attempt is two lines, and the error that follows them says the same."""
    own = threading.get_ident()
    logger = logging.getLogger("huggingface_hub.utils._http")

    def others(record: logging.LogRecord) -> bool:
        return record.thread != own

    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


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
