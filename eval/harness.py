"""lm-eval 0.4.13 as a library: its tasks ask, its rules score, and a session answers, resumably.

lm-eval's own loop (`evaluator.evaluate`) writes all prompts before the first is answered, and hashes and
copies every document for its log; here prompts are written, and documents scored, while the model reads.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .datafiles import Problem
from .harness_loading import load_task
from .harness_requests import answers_of, items_of
from .items import LOGLIKELIHOOD
from .questions import Questions
from .store import Record

MAIN_METRICS = ("acc_norm", "acc", "contains", "exact_match")  # the first that a task has is its score


def questions(
    name: str,
    label: str,
    home: str | None,
    folder: Path | None,
    problem: Problem,
    limit: int | None,
    tokenizer: Any,
) -> "Documents":
    """Documents of one lm-eval task, whose results are their scores.

    Args:
        name: what lm-eval calls it; `label` is the name of the results.
        home: lm-eval's own folder of the task, where it is known.
        folder: read the data set from here instead of the hub.
        problem: what keeps a row of the folder from being asked; lm-eval itself would ask about "None".

    Raises:
        ValueError: lm-eval does not know the task, or its data cannot be had or has such a row.
    """
    task = load_task(name, home, folder, problem)
    documents = _documents(task, limit)
    _write_once(task, documents)
    return Documents(task, label, documents, tokenizer)


def _documents(task: Any, limit: int | None) -> list[dict[str, Any]]:
    # what the task has read: asking it for `eval_docs` processes the whole split again
    documents = getattr(task, "task_docs", None)
    documents = task.eval_docs if documents is None else documents
    if limit is not None:
        documents = itertools.islice(documents, limit)
    elif hasattr(documents, "to_list"):  # a data set of `datasets`, whose rows are slow to read one by one
        return documents.to_list()
    return list(documents)


def _write_once(task: Any, documents: Sequence[dict[str, Any]]) -> None:
    """A document has one text, answer and options; lm-eval renders their templates up to four times."""
    for name in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        if hasattr(task, name):  # tasks written in Python need not have options
            setattr(task, name, _remembering(getattr(task, name), {id(document) for document in documents}))


def _remembering(write: Callable[..., Any], documents: set[int]) -> Callable[..., Any]:
    known: dict[int, Any] = {}

    def remembered(document: Any, *template: Any) -> Any:
        if template or id(document) not in documents:  # an example, written in its own way
            return write(document, *template)
        if id(document) not in known:
            known[id(document)] = write(document)
        return known[id(document)]

    return remembered


def _count(task: Any, documents: Sequence[dict[str, Any]]) -> int:
    """How many requests the documents make."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return len(documents)
    options = sum(len(task.doc_to_choice(document)) for document in documents)
    return 2 * options if "acc_mutual_info" in getattr(task, "_metric_fn_list", ()) else options


class Documents(Questions):
    """What documents ask: a request for each option or text; a document is scored when all are answered."""

    def __init__(self, task: Any, label: str, documents: Sequence[dict[str, Any]], tokenizer: Any) -> None:
        gold = functools.lru_cache(maxsize=1)(lambda index: _target(task, documents[index]))
        items = items_of(
            self._requests(), tokenizer, label, lambda request: gold_of(request, gold(request.doc_id))
        )
        super().__init__(items, _count(task, documents))
        self._task = task
        self._label = label
        self._documents = documents
        self._asked: list[list[Any]] = []  # the requests of each document
        self._answered: list[Record] = []  # one request after the other, without those to come
        self._used = 0  # answers
        self._scored = 0  # documents
        self._by_filter: dict[str, list[Record]] = {}

    def take(self, records: Sequence[Record]) -> None:
        self._answered += records
        while self._scored < len(self._asked):
            requests = self._asked[self._scored]
            end = self._used + len(requests)
            if end > len(self._answered):
                return
            self._score(self._scored, requests, answers_of(requests, self._answered[self._used : end]))
            self._used = end
            self._scored += 1

    def results(self) -> list[Record]:
        """One document after the other, by filter if lm-eval defines several."""
        assert self._scored == len(self._documents)
        return list(itertools.chain.from_iterable(self._by_filter.values()))

    def _requests(self) -> Iterator[Any]:
        """What `build_all_requests` makes, one document after the other."""
        config = self._task.config
        for index, document in enumerate(self._documents):
            context = self._task.fewshot_context(
                document, num_fewshot=config.num_fewshot or 0, gen_prefix=self._task.doc_to_prefix(document)
            )
            made = self._task.construct_requests(
                doc=document, ctx=context, metadata=(config.task, index, config.repeats)
            )
            made = made if isinstance(made, list) else [made]
            self._asked.append(made)
            yield from made

    def _score(self, index: int, requests: list[Any], answers: Iterable[Any]) -> None:
        for request, answer in zip(requests, answers, strict=True):
            request.resps = [answer] * request.repeats  # greedy: asked again it would be the same
        self._task._instances = requests
        self._task.apply_filters()
        ordered = sorted(requests, key=lambda request: request.idx)
        for name in requests[0].filtered_resps:
            filtered = [request.filtered_resps[name] for request in ordered]
            metrics = self._task.process_results(self._documents[index], filtered)
            record = _record(self._label, index, metrics, [request.resps for request in ordered])
            self._by_filter.setdefault(name, []).append(record)


def _target(task: Any, document: dict[str, Any]) -> Any:
    asks = task.doc_to_text if getattr(task, "multiple_input", 0) else task.doc_to_target
    return asks(document)


def gold_of(request: Any, target: Any) -> tuple[Any, ...]:
    """What a scripted model needs to be right: is this option the right one, or which text is."""
    if request.request_type == LOGLIKELIHOOD:
        return (isinstance(target, int) and target == request.idx,)
    return tuple(target) if isinstance(target, list) else (target,)


def _record(label: str, index: int, results: dict[str, Any], responses: Sequence[Any]) -> Record:
    metrics = {name: float(value) for name, value in results.items() if _is_number(value)}
    if _all_tie(responses):
        metrics = dict.fromkeys(metrics, 0.0)
    main = next((name for name in MAIN_METRICS if name in metrics), next(iter(metrics), None))
    if main is None:
        raise ValueError(f"{label} has no metric of single documents; only such tasks are supported")
    return {
        "task": label,
        "key": str(index),
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
