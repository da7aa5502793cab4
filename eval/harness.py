"""lm-eval 0.4.13 as a library: its tasks ask, its rules score, and a session answers, resumably."""

import difflib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from .items import GENERATE, LOGLIKELIHOOD, Item, as_tokens, encode
from .session import Session
from .store import Record

INSTALL = 'pip install "lm_eval==0.4.13"'
MAIN_METRICS = ("acc_norm", "acc", "contains", "exact_match")  # the first that a task has is its score
ROLLING = "loglikelihood_rolling"  # lm-eval's name for the likelihood of a whole text
ROLLING_TOKENS = 2**20
CHUNK = 128  # requests that are tokenised together
FEWSHOT_SEED = 1234  # with which lm-eval's own command draws examples


def installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def load() -> None:
    """What takes a second is done before a model waits for it."""
    importlib.import_module("lm_eval.tasks")


def items_of(
    requests: Iterable[Any], tokenizer: Any, task: str, gold: Callable[[Any], tuple[Any, ...]]
) -> Iterator[Item]:
    """lm-eval's requests as items, tokenised many at a time: one by one takes twice as long."""
    for chunk in _chunks(requests):
        likelihoods = [request for request in chunk if request.request_type == LOGLIKELIHOOD]
        made = iter(_likelihoods(likelihoods, tokenizer, task, gold))
        for request in chunk:
            if request.request_type == LOGLIKELIHOOD:
                yield next(made)
            elif request.request_type == ROLLING:
                yield _rolling(request, tokenizer, task)
            else:
                yield _generation(request, tokenizer, task, gold(request))


def answers_of(requests: Iterable[Any], records: Iterable[Record]) -> Iterator[Any]:
    """In the form of lm-eval's own models: (log likelihood, is it the greedy continuation?), or a text.

    Of a whole text the log likelihood alone.
    """
    for request, record in zip(requests, records, strict=True):
        answer = record["answer"]
        if request.request_type == LOGLIKELIHOOD:
            yield answer[0], bool(answer[1])
        else:
            yield answer[0] if request.request_type == ROLLING else answer


def _chunks(requests: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(requests)
    while chunk := list(itertools.islice(rest, CHUNK)):
        yield chunk


def _key(request: Any) -> str:
    return f"{request.doc_id}/{request.idx}"


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


def _likelihoods(
    requests: Sequence[Any], tokenizer: Any, task: str, gold: Callable[[Any], tuple[Any, ...]]
) -> Iterator[Item]:
    parts = []
    for request in requests:
        context, continuation = request.args
        # spaces at the border belong to the continuation: " word" is one token, as in lm-eval's own models
        stripped = context.rstrip()
        parts.append((stripped, context[len(stripped) :] + continuation))
    contexts = list(dict.fromkeys(context for context, _ in parts if context))  # options share theirs
    encoded = _encode_all(tokenizer, [*contexts, *(context + rest for context, rest in parts if context)])
    before = dict(zip(contexts, encoded))
    wholes = iter(encoded[len(contexts) :])
    for request, (context, rest) in zip(requests, parts):
        if context:
            head = before[context]
            body = next(wholes)[len(head) :]
        else:
            head, body = _start(tokenizer), encode(tokenizer, rest, special=False).tolist()
        yield _likelihood(task, _key(request), head, body, gold(request))


def _encode_all(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, truncation=False, verbose=False, return_attention_mask=False)["input_ids"]


def _rolling(request: Any, tokenizer: Any, task: str) -> Item:
    # the state is carried from piece to piece, so a document of any length is one continuation
    body = encode(tokenizer, request.args[0], special=False).tolist()
    if len(body) > ROLLING_TOKENS:
        raise ValueError(f"{task} {_key(request)}: {len(body)} tokens in one text, {ROLLING_TOKENS} at most")
    return _likelihood(task, _key(request), _start(tokenizer), body, ())


def _generation(request: Any, tokenizer: Any, task: str, answers: tuple[Any, ...]) -> Item:
    prompt, options = request.args
    if options.get("do_sample") or options.get("temperature"):
        raise ValueError(f"{task} samples its answers (do_sample); only greedy tasks are supported")
    until = options.get("until") or []
    return Item(
        task=task,
        key=_key(request),
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

    lm-eval's own loop (`evaluator.evaluate`) writes all prompts before the first is answered, and hashes and
    copies every document for its log; here prompts are written while the model reads.

    Args:
        name: what lm-eval calls it; `label` is the name of the results.
        home: lm-eval's own folder of the task, where it is known.
        folder: read the data set from here instead of the hub.

    Raises:
        ValueError: lm-eval does not know the task, or its data cannot be had.
    """
    task = _load(name, home, folder)
    from lm_eval import utils

    # lm-eval compiles a prompt's template anew for each document, which takes longer than all else it does
    compiled = functools.cache(utils.env.from_string)
    with mock.patch.object(utils.env, "from_string", compiled):
        documents = _documents(task, limit)
        _write_once(task, documents)
        scores = Scores(task, label, documents)
        gold = functools.lru_cache(maxsize=1)(lambda index: _target(task, documents[index]))
        items = items_of(
            _requests(task, documents, scores),
            session.model.tokenizer,
            label,
            lambda request: gold_of(request, gold(request.doc_id)),
        )
        session.run(label, items, _count(task, documents), scores.answered)
        return scores.finish()


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


def _requests(task: Any, documents: Sequence[dict[str, Any]], scores: "Scores") -> Iterator[Any]:
    """What `build_all_requests` makes, one document after the other."""
    config = task.config
    for index, document in enumerate(documents):
        context = task.fewshot_context(
            document, num_fewshot=config.num_fewshot or 0, gen_prefix=task.doc_to_prefix(document)
        )
        made = task.construct_requests(
            doc=document, ctx=context, metadata=(config.task, index, config.repeats)
        )
        made = made if isinstance(made, list) else [made]
        scores.asked.append(made)
        yield from made
        scores.catch_up()


class Scores:
    """Scores documents once they are answered, in the thread that writes prompts: the model is busy then.

    Attributes:
        asked: the requests of each document, in the order in which they are asked.
        answered: their answers, one request after the other, of which the last are still to come.
    """

    def __init__(self, task: Any, label: str, documents: Sequence[dict[str, Any]]) -> None:
        self.task = task
        self.label = label
        self.documents = documents
        self.asked: list[list[Any]] = []
        self.answered: list[Record] = []
        self._used = 0  # answers
        self._scored = 0  # documents
        self._records: dict[str, list[Record]] = {}  # by filter

    def catch_up(self) -> None:
        while self._scored < len(self.asked):
            requests = self.asked[self._scored]
            end = self._used + len(requests)
            if end > len(self.answered):
                return
            self._score(self._scored, requests, answers_of(requests, self.answered[self._used : end]))
            self._used = end
            self._scored += 1

    def finish(self) -> list[Record]:
        """All records, by filter if lm-eval defines several."""
        self.catch_up()
        assert self._scored == len(self.documents)
        return list(itertools.chain.from_iterable(self._records.values()))

    def _score(self, index: int, requests: list[Any], answers: Iterable[Any]) -> None:
        for request, answer in zip(requests, answers, strict=True):
            request.resps = [answer] * request.repeats  # greedy: asked again it would be the same
        self.task._instances = requests
        self.task.apply_filters()
        ordered = sorted(requests, key=lambda request: request.idx)
        for name in requests[0].filtered_resps:
            filtered = [request.filtered_resps[name] for request in ordered]
            metrics = self.task.process_results(self.documents[index], filtered)
            record = _record(self.label, index, metrics, [request.resps for request in ordered])
            self._records.setdefault(name, []).append(record)


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
    import datasets
    from datasets.exceptions import DatasetsError
    from lm_eval.api.task import ConfigurableTask

    check_name(name, home)
    manager = _manager(home)
    spec: Any = name
    if folder is not None:
        # a group is where lm-eval takes a task of its own with one field changed
        cache = Path(datasets.config.HF_DATASETS_CACHE) / f"local-{_state_of(folder)}"
        local = {"dataset_path": str(folder), "dataset_kwargs": {"cache_dir": str(cache)}}
        spec = {"group": "local", "task": [{"task": name, **local}]}
    examples = ConfigurableTask.fewshot_docs

    def only_if_shown(task: Any) -> Any:
        return examples(task) if task.config.num_fewshot else None

    try:
        # to read a whole training split takes longer than to answer the questions
        with mock.patch.object(ConfigurableTask, "fewshot_docs", only_if_shown):
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


def _state_of(folder: Path) -> str:
    """Changes with any file of the folder.

    `datasets` keeps what it has read, for a named part of a folder under that name alone: without this it
    would go on answering with rows that are no longer there, or with those of another folder.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


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
