"""A fixed set of held-out sequences, shared out over the ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data.corpus import Corpus, open_corpus
from data.encoding import Encoder, load_tokenizer, tokenizer_fingerprint
from data.feeds import Document, TextFeed, TokenFeed
from data.health import Health
from data.loader import collate
from data.packing import START, EndOfCorpusError, Packed, SlotStream
from data.tokens import TokenCorpus


class _OneEpoch:
    """A feed that stops after one pass."""

    def __init__(self, feed: TextFeed | TokenFeed) -> None:
        self._feed = feed

    def next(self, slot: int) -> Document:
        document = self._feed.next(slot)
        if document.place.epoch > 0:
            raise EndOfCorpusError
        return document


class ValidationLoader:
    """The first `n_sequences` sequences (None: all) of a held-out corpus in file order, tokenised once.

    Sequence i goes to rank i % world_size. Every rank yields the same number of batches of the same shape, so
    that collective forward passes match; rows beyond the set and the tail of the corpus's last sequence are
    filled up with end-of-text and label -100, which no loss counts: sum losses and counted labels over the
    ranks, then divide. Batches as those of `TrainingLoader` ("input_ids", "labels", with `reset_at_documents`
    "cu_seqlens").
    """

    def __init__(
        self,
        path: str | Path | Corpus | TokenCorpus,
        tokenizer,
        *,
        max_len: int,
        n_sequences: int | None = None,
        micro_batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        reset_at_documents: bool = False,
        threads: int = 1,
    ) -> None:
        if max_len < 1 or micro_batch_size < 1 or (n_sequences is not None and n_sequences < 1):
            raise ValueError("max_len, micro_batch_size and n_sequences must be at least 1")
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer)
        self._corpus = open_corpus(path) if isinstance(path, (str, Path)) else path
        self._encoder = Encoder(tokenizer, threads)
        if isinstance(self._corpus, TokenCorpus):
            self._corpus.check_tokenizer(tokenizer_fingerprint(tokenizer))
        self._max_len, self._micro_batch_size = max_len, micro_batch_size
        self._reset_at_documents = reset_at_documents
        rows = list(self._read(n_sequences))
        if not rows:
            raise ValueError(f"held-out corpus {self._corpus.root} holds no document with text")
        self.n_sequences = len(rows)
        self._rows = rows[rank::world_size]
        self._batches = -(-len(rows[::world_size]) // micro_batch_size)

    def __len__(self) -> int:
        """Batches, the same on every rank."""
        return self._batches

    def __iter__(self) -> Iterator[dict]:
        for index in range(self._batches):
            rows = self._rows[index * self._micro_batch_size : (index + 1) * self._micro_batch_size]
            yield self._batch(rows + [_EMPTY] * (self._micro_batch_size - len(rows)))

    def _read(self, limit: int | None) -> Iterator[Packed]:
        """Full sequences, then what the corpus leaves over."""
        stream = SlotStream(_OneEpoch(self._feed()), 0, self._max_len)
        try:
            for _ in itertools.count() if limit is None else range(limit):
                yield stream.take()
        except EndOfCorpusError:
            return

    def _feed(self) -> TextFeed | TokenFeed:
        if isinstance(self._corpus, TokenCorpus):
            return TokenFeed(self._corpus, seed=None, n_slots=1, starts={0: None})
        return TextFeed(self._corpus, self._encoder, seed=None, n_slots=1, starts={0: None}, health=Health())

    def _batch(self, rows: list[Packed]) -> dict:
        sizes = [row.tokens.size for row in rows]
        filled = [self._fill(row) for row in rows]
        batch = collate(tuple(range(len(rows))), filled, self._reset_at_documents)
        labels = batch["labels"].view(len(rows), self._max_len)
        for row, size in enumerate(sizes):
            labels[row, size:] = -100
        return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def _fill(self, row: Packed) -> Packed:
        size = row.tokens.size
        if size == self._max_len:
            return row
        filler = np.full(self._max_len - size, self._encoder.end_of_text, dtype=np.int32)
        return Packed(np.concatenate([row.tokens, filler]), sorted({*row.starts, size}), row.position)


_EMPTY = Packed(np.empty(0, dtype=np.int32), [0], START)
