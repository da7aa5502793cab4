"""RULER's needle tasks as lm-eval 0.4.13 generates them, as many samples as are asked for, within the length.

Two things of its generator are put right here. It leaves no room for the beginning of the answer that is
appended to each prompt, so that a prompt exceeds its length, which a model with that window would have cut
from the left. And what it cannot fit it leaves out with a warning, or fills with less text than the length
asks for.
"""

import contextlib
import importlib.util
import io
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from .datafiles import DOWNLOAD, read_rows
from .ruler_lengths import LengthFinder, MisjudgedError

TASKS = tuple(f"niah_{kind}_{number}" for kind in ("single", "multikey") for number in (1, 2, 3))
NEEDS_ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1")
ESSAYS = "paul_graham_essays"
NEW_TOKENS = 128
_ONE_AT_A_TIME = threading.Lock()  # lm-eval's module is changed, and Python's global generator seeded
BEGINNING = 48  # tokens kept free for the beginning of the answer, which names the key
INSTALL = 'pip install "lm_eval[ruler]==0.4.13"'


def lacks(task: str, data: Path) -> str | None:
    """What keeps the task from running, and the command that brings it."""
    if any(importlib.util.find_spec(name) is None for name in ("lm_eval", "nltk", "wonderwords")):
        return f"RULER comes with lm-eval: {INSTALL}"
    _generator()  # takes seconds, before a model waits for it
    if task not in NEEDS_ESSAYS:
        return None
    if not (data / ESSAYS).is_dir():
        return f"its haystack of essays is not in {data / ESSAYS}: {DOWNLOAD}"
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return "it splits sentences with nltk's punkt_tab: python -m nltk.downloader punkt_tab"
    return None


def _generator() -> ModuleType:
    # importing it fetches punkt_tab and prints; whether that is needed is for `lacks` to say
    with mock.patch("nltk.download", return_value=False), contextlib.redirect_stdout(io.StringIO()):
        from lm_eval.tasks.ruler import niah_utils
    return niah_utils


def _haystack(original: Any, data: Path) -> Any:
    def haystack(type_haystack: str) -> Any:
        if type_haystack != "essay":
            return original(type_haystack)
        return " ".join(row["text"] for row in read_rows(data / ESSAYS, "train", ("text",))).split()

    return haystack


@contextlib.contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """RULER draws from Python's global generator."""
    kept = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(kept)


def documents(task: str, length: int, count: int, seed: int, tokenizer: Any, data: Path) -> list[dict]:
    """`count` documents of lm-eval's task with fields input, gen_prefix, outputs, index.

    Raises:
        ValueError: fewer came out, or one is longer than `length` or far shorter.
    """
    # a run that was given up leaves its thread at work on the next length while the next run begins
    with _ONE_AT_A_TIME:
        try:
            finder = LengthFinder(tokenizer, length - NEW_TOKENS - BEGINNING)
            rows = _documents(task, length, count, seed, finder, data)
        except MisjudgedError:
            rows = _documents(task, length, count, seed, tokenizer, data)
    _check(task, length, count, rows)
    return rows


def _documents(task: str, length: int, count: int, seed: int, tokenizer: Any, data: Path) -> list[dict]:
    module = _generator()
    original = module.generate_samples

    def generate_samples(haystack: Any, **options: Any) -> list[dict]:
        options.update(num_samples=count, TOKENIZER=tokenizer, tokens_to_generate=NEW_TOKENS + BEGINNING)
        try:
            return original(haystack, **options)
        except ValueError as error:
            if "Could not generate any sample" not in str(error):
                raise
            # which says so, and names an argument of its own to raise
            raise ValueError(_too_few(task, length, count, 0)) from None

    with (
        mock.patch.object(module, "generate_samples", generate_samples),
        mock.patch.object(module, "get_haystack", _haystack(module.get_haystack, data)),
        mock.patch.object(module, "get_tokenizer", return_value=tokenizer),
        mock.patch("tqdm.std.tqdm.__init__", _silent_bar()),
        _seeded(f"{task}:{seed}:{length}"),
    ):
        made = getattr(module, task)(max_seq_lengths=[length], tokenizer="given")
    return list(made["test"])


def _silent_bar() -> Any:
    from tqdm.std import tqdm

    original = tqdm.__init__
    own = threading.get_ident()

    def silent(self: Any, *args: Any, **options: Any) -> None:
        if threading.get_ident() == own:  # others' bars, of tasks that are being answered, go on
            options["disable"] = True
        original(self, *args, **options)

    return silent


def _too_few(task: str, length: int, count: int, made: int) -> str:
    return (
        f"{task} at {length} tokens: only {made} of {count} samples fit that length, of which "
        f"{NEW_TOKENS + BEGINNING} tokens are kept for the answer; choose longer lengths="
    )


def _check(task: str, length: int, count: int, rows: list[dict]) -> None:
    if len(rows) != count:
        raise ValueError(_too_few(task, length, count, len(rows)))
    for row in rows:
        # RULER's steps are hundreds of tokens wide, which is much of a short text and little of a long one
        if length >= 16384 and row["length"] < 0.9 * length:
            raise ValueError(
                f"{task}: its haystack makes {row['length']} tokens, {length} were asked for; "
                "choose a shorter length"
            )
