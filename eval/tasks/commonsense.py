"""Common sense: PIQA, HellaSwag, WinoGrande, ARC and SIQA through lm-eval; and its other tasks by name."""

from pathlib import Path
from typing import Any

from .. import harness, harness_loading
from ..datafiles import DOWNLOAD
from ..questions import Questions
from ..registry import HARNESS_PREFIX, Family, register
from ..settings import Settings

# our name: (lm-eval's name, its folder in lm-eval, folder of its data)
TASKS = {
    "piqa": ("piqa", "piqa", "piqa"),
    "hellaswag": ("hellaswag", "hellaswag", "hellaswag"),
    "winogrande": ("winogrande", "winogrande", "winogrande"),
    "arc_easy": ("arc_easy", "arc", "ai2_arc"),
    "arc_challenge": ("arc_challenge", "arc", "ai2_arc"),
    "siqa": ("social_iqa", "siqa", "siqa"),
}


def _folder(task: str, settings: Settings) -> Path | None:
    return settings.data / TASKS[task][2] if task in TASKS else None


def prepare(task: str, settings: Settings, tokenizer: Any) -> Questions:
    name, home, _ = TASKS.get(task, (task.removeprefix(HARNESS_PREFIX), None, None))
    return harness.questions(name, task, home, _folder(task, settings), settings.limit, tokenizer)


def lacks(task: str, settings: Settings) -> str | None:
    if not harness_loading.installed():
        return f"lm-eval is not installed: {harness_loading.INSTALL}"
    folder: Any = _folder(task, settings)
    if folder is not None and not folder.is_dir():
        return f"no data in {folder}: {DOWNLOAD}"
    try:
        harness_loading.import_lm_eval()
    except ImportError as error:  # something that it needs is missing or does not fit
        return f"lm-eval cannot be imported ({error}): {harness_loading.INSTALL}"
    return None


def check(settings: Settings) -> None:
    for task in settings.tasks:
        if task.startswith(HARNESS_PREFIX) and harness_loading.installed():
            harness_loading.check_name(task.removeprefix(HARNESS_PREFIX))


register(Family(name="commonsense", tasks=tuple(TASKS), prepare=prepare, lacks=lacks, check=check))
