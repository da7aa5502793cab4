"""Is the corpus large enough for one step? Asked before training starts."""

from __future__ import annotations

from collections.abc import Iterator

from data.corpus import Corpus, epoch_order
from data.encoding import Encoder
from data.feeds import too_few_documents
from data.health import BrokenReport, Health
from data.lines import BrokenLineError, parse_document, read_lines
from data.tokens import TokenCorpus


def check_fills_a_step(
    corpus: Corpus | TokenCorpus, tokenizer, *, seed: int | None, n_slots: int, max_len: int
) -> None:
    """Raises ValueError unless an epoch gives every slot a document and one step its tokens.

    Reads no further than that takes: a large corpus answers after about one step's worth of text.
    """
    needed, tokens, documents, fed, health = n_slots * max_len, 0, 0, set(), Health()
    for number, size in _document_sizes(corpus, tokenizer, seed, health):
        tokens, documents = tokens + size, documents + 1
        fed.add(number % n_slots)
        if tokens >= needed and len(fed) == n_slots:
            return
    if tokens < needed:
        broken = f" ({health.broken} broken line(s), the last: {health.news[-1]})" if health.broken else ""
        raise ValueError(
            f"corpus {corpus.root} is too small: it holds {tokens} tokens in {documents} documents{broken}, "
            f"one step needs {needed} ({n_slots} sequences of {max_len}). Use a larger corpus, a shorter "
            "max_len or fewer tokens a step"
        )
    raise too_few_documents(min(set(range(n_slots)) - fed), n_slots)


def _document_sizes(
    corpus: Corpus | TokenCorpus, tokenizer, seed: int | None, health: Health
) -> Iterator[tuple[int, int]]:
    """(number in the first epoch, tokens) of each non-empty document."""
    order = [corpus.files[i] for i in epoch_order([file.name for file in corpus.files], seed, 0)]
    if isinstance(corpus, TokenCorpus):
        documents = (file.document(line) for file in order for line in range(file.lines))
        yield from ((number, tokens.size) for number, tokens in enumerate(documents) if tokens.size)
        return
    encoder = Encoder(tokenizer)
    lines = ((file, line) for file in order for line in read_lines(file.path))
    for number, (file, line) in enumerate(lines):
        try:
            if line.problem:
                raise BrokenLineError(line.problem)
            text = parse_document(line.raw, corpus.text_field)
        except BrokenLineError as error:
            health.add(1, [BrokenReport(file.name, line.number + 1, str(error))])
            continue
        health.add(1, [])
        if text and (size := encoder.encode([text])[0].size):
            yield number, size
