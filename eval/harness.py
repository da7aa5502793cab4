"""lm-eval 0.4.13 as a library: its tasks ask, its rules score, and a session answers, resumably."""

import difflib
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from .items import GENERATE, LOGLIKELIHOOD, Item, as_tokens, encode
from .session import Session
from .store import Record

INSTALL = 'pip install "lm_eval==0.4.13"'
MAIN_METRICS = ("acc_norm", "acc", "contains", "exact_match")  # the first that a task has is its score
ROLLING_TOKENS = 2**20


def installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def adapter(session: Session, task_name: str, is_gold: Callable[[Any], tuple[Any, ...]]) -> Any:
    """An lm-eval LM over a session. Made in a function because lm-eval is imported only where it is used."""
    from lm_eval.api.model import LM

    class SessionLM(LM):
        def _items(self, requests: Sequence[Any], make: Callable[[Any, str], Item]) -> list[Any]:
            items = (make(request, f"{request.doc_id}/{request.idx}") for request in requests)
            records = session.run(task_name, items, total=len(requests))
            return [record["answer"] for record in records]

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            make = _likelihood_maker(session.model.tokenizer, task_name, is_gold)
            return [(answer[0], bool(answer[1])) for answer in self._items(requests, make)]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            # the state is carried from piece to piece, so a document of any length is one continuation
            def make(request: Any, key: str) -> Item:
                tokenizer = session.model.tokenizer
                body = encode(tokenizer, request.args[0], special=False).tolist()
                if len(body) > ROLLING_TOKENS:
                    raise ValueError(
                        f"{task_name} {key}: {len(body)} tokens in one text, {ROLLING_TOKENS} at most"
                    )
                return _likelihood(task_name, key, _start(tokenizer), body, ())

            return [answer[0] for answer in self._items(requests, make)]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            def make(request: Any, key: str) -> Item:
                return _generation(session.model.tokenizer, task_name, key, request, is_gold(request))

            return self._items(requests, make)

    return SessionLM()


def _start(tokenizer: Any) -> list[int]:
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [next((i for i in ids if i is not None), 0)]


def _likelihood(
    task: str, key: str, context: list[int], continuation: list[int], gold: tuple[Any, ...]
) -> Item:
    if not continuation:
        raise ValueError(f"{task} {key}: an option is empty, and nothing can be said of its likelihood")
    return Item(
        task=task,
        key=key,
        kind=LOGLIKELIHOOD,
        tokens=as_tokens([*context, *continuation]),
        answers=gold,
        rule="from_harness",
        continuation=len(continuation),
    )


def _likelihood_maker(tokenizer: Any, task: str, is_gold: Callable[[Any], tuple[Any, ...]]) -> Callable:
    context_tokens = functools.lru_cache(maxsize=1)(lambda text: encode(tokenizer, text).tolist())

    def make(request: Any, key: str) -> Item:
        context, continuation = request.args
        # spaces at the border belong to the continuation: " word" is one token, as in lm-eval's own models
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            body = encode(tokenizer, continuation, special=False).tolist()
            return _likelihood(task, key, _start(tokenizer), body, is_gold(request))
        before = context_tokens(stripped)  # the same for all options of a question
        whole = encode(tokenizer, stripped + continuation).tolist()
        return _likelihood(task, key, before, whole[len(before) :], is_gold(request))

    return make


def _generation(tokenizer: Any, task: str, key: str, request: Any, answers: tuple[Any, ...]) -> Item:
    prompt, options = request.args
    if options.get("do_sample") or options.get("temperature"):
        raise ValueError(f"{task} samples its answers (do_sample); only greedy tasks are supported")
    until = options.get("until") or []
    return Item(
        task=task,
        key=key,
        kind=GENERATE,
        tokens=encode(tokenizer, prompt),
        answers=tuple(str(answer) for answer in answers),
        rule="from_harness",
        max_new_tokens=int(options.get("max_gen_toks", 256)),
        stop=tuple([until] if isinstance(until, str) else until),
    )


def run_task(
    name: str, label: str, home: str | None, folder: Path | None, limit: int | None, session: Session
) -> list[Record]:
    """Documents of one lm-eval task with their scores, as records.

    Args:
        name: what lm-eval calls it; `label` is the name of the results.
        home: lm-eval's own folder of the task, where it is known.
        folder: read the data set from here instead of the hub.

    Raises:
        ValueError: lm-eval does not know the task, or its data cannot be had.
    """
    task = _load(name, home, folder)
    from lm_eval import evaluator, utils

    model = adapter(session, label, lambda request: gold_of(task, request))
    # lm-eval compiles a prompt's template anew for each document, which takes longer than all else it does
    compiled = functools.cache(utils.env.from_string)
    with mock.patch.object(utils.env, "from_string", compiled):
        results = evaluator.evaluate(
            model, {"tasks": {name: task}, "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=0
        )
    return [_record(label, sample) for sample in results["samples"][name]]


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


def _load(name: str, home: str | None, folder: Path | None) -> Any:
    from datasets.exceptions import DatasetsError

    check_name(name, home)
    manager = _manager(home)
    spec: Any = name
    if folder is not None:
        # a group is where lm-eval takes a task of its own with one field changed
        spec = {"group": "local", "task": [{"task": name, "dataset_path": str(folder)}]}
    try:
        loaded = manager.load([spec])["tasks"]
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        cause = error.__cause__ or error  # "an error occurred while generating" says nothing by itself
        raise ValueError(
            f"lm-eval cannot read the data of {name}{f' in {folder}' if folder else ''}: "
            f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        ) from None
    if len(loaded) != 1:
        raise ValueError(f"lm_eval:{name} stands for {len(loaded)} tasks; name them one by one")
    return next(iter(loaded.values()))


def gold_of(task: Any, request: Any) -> tuple[Any, ...]:
    """What a scripted model needs to be right: is this option the right one, or which text is."""
    if request.request_type == "loglikelihood":
        target = task.doc_to_target(request.doc)
        if getattr(task, "multiple_input", 0):
            target = task.doc_to_text(request.doc)
        return (isinstance(target, int) and target == request.idx,)
    target = task.doc_to_target(request.doc)
    return tuple(target) if isinstance(target, list) else (target,)


def _record(label: str, sample: dict[str, Any]) -> Record:
    metrics = {name: float(sample[name]) for name in sample["metrics"] if _is_number(sample[name])}
    if _all_tie(sample["resps"]):
        metrics = dict.fromkeys(metrics, 0.0)
    main = next((name for name in MAIN_METRICS if name in metrics), next(iter(metrics), None))
    if main is None:
        raise ValueError(f"{label} has no metric of single documents; only such tasks are supported")
    return {
        "task": label,
        "key": str(sample["doc_id"]),
        "group": {},
        "score": metrics[main],
        "metric": main,
        "metrics": metrics,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isnan(value)


def _all_tie(responses: Sequence[Any]) -> bool:
    """Options that are all equally likely are no answer, although argmax names the first of them."""
    likelihoods = [response[0][0] for response in responses if isinstance(response[0], (tuple, list))]
    return len(likelihoods) > 1 and len(set(likelihoods)) == 1
