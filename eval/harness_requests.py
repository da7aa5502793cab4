"""lm-eval's requests as items of a session, and its answers in the form that lm-eval scores."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from .items import GENERATE, LOGLIKELIHOOD, Item, as_tokens, encode
from .store import Record

ROLLING = "loglikelihood_rolling"  # lm-eval's name for the likelihood of a whole text
ROLLING_TOKENS = 2**20
CHUNK = 512  # requests that are tokenised together


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
