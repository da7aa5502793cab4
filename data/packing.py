"""Packs the documents of a slot into sequences of max_len tokens; the remainder goes into the next one.

A slot's whole position is one small dict:
    {"epoch", "file", "line", "offset", "document", "token", "sequence"}
the next document's file, its line there and byte offset (None from token files), its number in the epoch, how
many of its tokens are already used, and how many sequences the slot has given.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from typing import NamedTuple, Protocol

import numpy as np

from data.feeds import Document, Place

Position = dict[str, int | str | None]
START: Position = {"epoch": 0, "file": None, "line": 0, "offset": 0, "document": 0, "token": 0, "sequence": 0}


def place_of(position: Position) -> Place | None:
    """Where a feed starts reading; None is the very beginning, whichever file comes first there."""
    if position["file"] is None:
        return None
    return Place(**{name: position[name] for name in ("epoch", "file", "line", "offset", "document")})


class EndOfCorpusError(Exception):
    """Raised by a feed that does not start over."""


class Feed(Protocol):
    def next(self, slot: int) -> Document: ...


class Packed(NamedTuple):
    tokens: np.ndarray  # [T] int32; shorter only in the last one of a stream that ends
    starts: list[int]  # where documents start, 0 always among them
    position: Position  # of the slot after this sequence


class SlotStream:
    """The contiguous token stream of one slot."""

    def __init__(self, feed: Feed, slot: int, max_len: int, position: Position = START) -> None:
        self.feed, self.slot, self.max_len = feed, slot, max_len
        self._pending: deque[Document] = deque()
        self._used = int(position["token"])  # tokens taken from the first pending document
        self._sequence = int(position["sequence"])
        self._skip_to = place_of(position) if self._used else None

    def take(self) -> Packed:
        """The next sequence. Every token of every document appears once: nothing is padded, cut or dropped.

        A feed that ends gives a last, shorter sequence, then EndOfCorpusError.
        """
        parts: list[np.ndarray] = []
        starts, filled = {0}, 0
        while filled < self.max_len:
            try:
                self._fill_pending()
            except EndOfCorpusError:
                if not parts:
                    raise
                break
            document = self._pending[0]
            if self._used == 0:
                starts.add(filled)
            part = document.tokens[self._used : self._used + self.max_len - filled]
            parts.append(part)
            filled += len(part)
            self._used += len(part)
            if self._used == len(document.tokens):
                last, self._used = self._pending.popleft(), 0
        self._sequence += 1
        position = self._position(self._pending[0] if self._pending else last)
        return Packed(np.concatenate(parts), sorted(starts), position)

    def _fill_pending(self) -> None:
        if not self._pending:
            self._pending.append(self._next_document())

    def _next_document(self) -> Document:
        document = self.feed.next(self.slot)
        if self._skip_to is not None:
            expected, self._skip_to = self._skip_to, None
            found = (document.place.epoch, document.place.document) == (expected.epoch, expected.document)
            if not found or len(document.tokens) <= self._used:
                raise ValueError(
                    f"slot {self.slot} stopped inside line {expected.line + 1} of {expected.file}, which "
                    "now holds "
                    "other text: resume with the corpus and tokenizer of the run that saved this state"
                )
        return document

    def _position(self, document: Document) -> Position:
        place = document.place if self._used else document.place.after(document.end)
        return {**asdict(place), "token": self._used, "sequence": self._sequence}
