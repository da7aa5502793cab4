"""Documents as tokens, slot by slot.

Document number d of an epoch belongs to slot d % n_slots; empty and broken lines keep their number, so that a
reader need not parse lines of other slots. A feed answers `next(slot)` with that slot's next non-empty
document, epoch after epoch; where a slot stands is a position (see data.positions).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.corpus import Corpus, epoch_order
from data.encoding import Encoder
from data.health import BrokenReport, Health
from data.lines import BrokenLineError, Line, parse_document, read_lines
from data.tokens import TokenCorpus

BATCH_DOCUMENTS = 32  # a thread and call of the tokenizer
BATCH_BYTES = 1 << 17  # the same
MAX_QUEUED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Place:
    """A line on the way through the epochs."""

    epoch: int
    file: str
    line: int
    offset: int | None  # None: read from token files, which know no byte offsets
    document: int  # running number of the line in its epoch

    def after(self, end: int | None) -> Place:
        return Place(self.epoch, self.file, self.line + 1, end, self.document + 1)


@dataclass(frozen=True, slots=True)
class Document:
    place: Place
    end: int | None  # byte offset of the next line
    tokens: np.ndarray


def too_few_documents(slot: int, n_slots: int) -> ValueError:
    if n_slots == 1:
        return ValueError("no document with text was found in a whole epoch: its lines are empty or broken")
    return ValueError(
        f"slot {slot} of {n_slots} found no document in a whole epoch (its lines, every {n_slots}th, are "
        f"missing or empty): the corpus needs many more than {n_slots} documents. Use a larger corpus, or "
        "fewer sequences a step (tokens_per_step / max_len)"
    )


def _walk(corpus: Corpus, seed: int | None, start: Place | None) -> Iterator[tuple[Place, Line]]:
    """Every line from `start` on, epoch after epoch, without end."""
    names = [file.name for file in corpus.files]
    epoch = start.epoch if start else 0
    order = epoch_order(names, seed, epoch)
    if start:
        order = order[[names[i] for i in order].index(start.file) :]
    line, offset, document = (start.line, start.offset, start.document) if start else (0, 0, 0)
    while True:
        for index in order:
            for item in read_lines(corpus.files[index].path, line, offset):
                yield Place(epoch, names[index], item.number, item.offset, document), item
                document += 1
            line, offset = 0, 0
        if document == 0:
            raise ValueError(f"corpus {corpus.root} holds no line at all")
        epoch, document = epoch + 1, 0
        order = epoch_order(names, seed, epoch)


class _Lines:
    """One pass through the files for a group of slots; lines wait in a queue until their slot wants them."""

    def __init__(
        self, corpus: Corpus, seed: int | None, n_slots: int, starts: dict[int, Place | None]
    ) -> None:
        self.n_slots = n_slots
        self.starts = {
            slot: (start.epoch, start.document) if start else (0, 0) for slot, start in starts.items()
        }
        first = min(starts, key=self.starts.__getitem__)
        self._walk = _walk(corpus, seed, starts[first])
        self.epoch = self.starts[first][0]
        self.queues: dict[int, deque[tuple[Place, Line]]] = {slot: deque() for slot in starts}
        self.queued_bytes = 0

    def advance(self) -> None:
        place, line = next(self._walk)
        self.epoch = place.epoch
        slot = place.document % self.n_slots
        if slot in self.queues and (place.epoch, place.document) >= self.starts[slot]:
            self.queues[slot].append((place, line))
            self.queued_bytes += len(line.raw)

    def pop(self, slot: int) -> tuple[Place, Line]:
        place, line = self.queues[slot].popleft()
        self.queued_bytes -= len(line.raw)
        return place, line

    def release(self, slot: int) -> Place:
        """Forget a slot's queue; answers where it started."""
        queue = self.queues.pop(slot)
        self.queued_bytes -= sum(len(line.raw) for _, line in queue)
        return queue[0][0]


class TextFeed:
    """Documents of a jsonl corpus, tokenised as they come."""

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        *,
        seed: int | None,
        n_slots: int,
        starts: dict[int, Place | None],
        health: Health,
        batch_bytes: int = BATCH_BYTES,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
    ) -> None:
        self.corpus, self.encoder, self.seed, self.n_slots, self.health = (
            corpus,
            encoder,
            seed,
            n_slots,
            health,
        )
        self.batch_bytes, self.max_queued_bytes = batch_bytes * encoder.threads, max_queued_bytes
        shared = _Lines(corpus, seed, n_slots, starts)
        self._lines = dict.fromkeys(starts, shared)
        self._ready: dict[int, deque[Document]] = {slot: deque() for slot in starts}
        # the last epoch in which the slot found something, or of which it may have missed the first part
        self._fed_epoch = {slot: start.epoch if start else -1 for slot, start in starts.items()}

    def next(self, slot: int) -> Document:
        ready = self._ready[slot]
        while not ready:
            ready.extend(self._encode_some(slot))
        return ready.popleft()

    def _encode_some(self, slot: int) -> list[Document]:
        places, texts, size = [], [], 0
        lines, reports = 0, []
        while size < self.batch_bytes and lines < BATCH_DOCUMENTS * self.encoder.threads:
            place, line = self._next_line(slot)
            lines += 1
            try:
                text = self._text(line)
            except BrokenLineError as error:
                reports.append(BrokenReport(place.file, line.number + 1, str(error)))
                continue
            if text:
                places.append((place, line.end))
                texts.append(text)
                size += len(text)
                self._fed_epoch[slot] = place.epoch
        self.health.add(lines, reports)
        encoded = self.encoder.encode(texts)
        return [
            Document(place, end, tokens)
            for (place, end), tokens in zip(places, encoded, strict=True)
            if tokens.size
        ]

    def _text(self, line: Line) -> str:
        if line.problem:
            raise BrokenLineError(line.problem)
        return parse_document(line.raw, self.corpus.text_field)

    def _next_line(self, slot: int) -> tuple[Place, Line]:
        lines = self._lines[slot]
        while not lines.queues[slot]:
            # one whole epoch, first line to last, went by since the slot was fed
            if lines.epoch > self._fed_epoch[slot] + 1:
                raise too_few_documents(slot, self.n_slots)
            lines.advance()
            if lines.queued_bytes > self.max_queued_bytes:
                self._detach(lines, slot)
        place, line = lines.pop(slot)
        if place.epoch > self._fed_epoch[slot] + 1:
            raise too_few_documents(slot, self.n_slots)
        return place, line

    def _detach(self, lines: _Lines, reading: int) -> None:
        """Slots drift apart as their documents differ in length: one too far behind gets its own pass."""
        behind = max(lines.queues, key=lambda slot: sum(len(line.raw) for _, line in lines.queues[slot]))
        if behind == reading:
            return
        start = lines.release(behind)
        self._lines[behind] = _Lines(self.corpus, self.seed, self.n_slots, {behind: start})


class TokenFeed:
    """Documents of a pretokenised corpus, read in place."""

    def __init__(
        self, corpus: TokenCorpus, *, seed: int | None, n_slots: int, starts: dict[int, Place | None]
    ) -> None:
        self.corpus, self.seed, self.n_slots = corpus, seed, n_slots
        self._cursor = {
            slot: (start.epoch, start.document + (slot - start.document) % n_slots) if start else (0, slot)
            for slot, start in starts.items()
        }
        self._orders: dict[int, tuple[list[int], list[int]]] = {}

    def next(self, slot: int) -> Document:
        epoch, number = self._cursor[slot]
        last_epoch = epoch + (1 if number != slot else 0)
        while True:
            order, first = self._order(epoch)
            while number < first[-1]:
                index = bisect_right(first, number) - 1
                line = number - first[index]
                file = self.corpus.files[order[index]]
                tokens = file.document(line)
                if tokens.size:
                    self._cursor[slot] = epoch, number + self.n_slots
                    return Document(Place(epoch, file.name, line, None, number), None, tokens)
                number += self.n_slots
            epoch, number = epoch + 1, slot
            if epoch > last_epoch:
                raise too_few_documents(slot, self.n_slots)

    def _order(self, epoch: int) -> tuple[list[int], list[int]]:
        """File indices in the epoch's order, and the number of each one's first document (and of the end)."""
        if epoch not in self._orders:
            order = epoch_order([file.name for file in self.corpus.files], self.seed, epoch)
            first = [0]
            for index in order:
                first.append(first[-1] + self.corpus.files[index].lines)
            if len(self._orders) > 4:
                self._orders.clear()
            self._orders[epoch] = order, first
        return self._orders[epoch]
