"""The training stream: the same global batch at any number of ranks, workers and accumulation steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data import worker
from data.corpus import Corpus, open_corpus
from data.encoding import Encoder, load_tokenizer, tokenizer_fingerprint
from data.feeds import BATCH_BYTES, TextFeed, TokenFeed
from data.health import BrokenReport, Health
from data.packing import START, Packed, Position, SlotStream, place_of
from data.size_check import check_fills_a_step
from data.tokens import TokenCorpus

STATE_VERSION = 1
logger = logging.getLogger(__name__)


def slots_of_rank(n_slots: int, rank: int, world_size: int) -> range:
    """Rank r of W owns slots r * n/W ... (r + 1) * n/W - 1."""
    if n_slots % world_size:
        raise ValueError(
            f"{n_slots} sequences a step (tokens_per_step / max_len) do not divide among {world_size} ranks: "
            f"choose tokens_per_step as a multiple of {world_size} x max_len"
        )
    share = n_slots // world_size
    return range(rank * share, (rank + 1) * share)


def merge_states(states: list[dict]) -> dict:
    """One state out of those of all ranks, which any number of ranks can load."""
    settings = [{key: value for key, value in state.items() if key != "positions"} for state in states]
    if any(entry != settings[0] for entry in settings):
        raise ValueError("the loader states come from different runs: their seed, slots or corpus differ")
    positions = {slot: position for state in states for slot, position in state["positions"].items()}
    return {**settings[0], "positions": dict(sorted(positions.items(), key=lambda item: int(item[0])))}


@dataclass(frozen=True)
class _Recipe:
    """What a worker process needs in order to make its share of the micro-batches."""

    corpus: Corpus | TokenCorpus
    tokenizer: object
    max_len: int
    n_slots: int
    micro_batches: tuple[tuple[int, ...], ...]  # slots of each micro-batch of a step on this rank
    seed: int | None
    reset_at_documents: bool
    threads: int

    def streams(self, positions: dict[int, Position], health: Health) -> dict[int, SlotStream]:
        starts = {slot: place_of(position) for slot, position in positions.items()}
        if isinstance(self.corpus, TokenCorpus):
            feed = TokenFeed(self.corpus, seed=self.seed, n_slots=self.n_slots, starts=starts)
        else:
            encoder = Encoder(self.tokenizer, self.threads)
            feed = TextFeed(
                self.corpus,
                encoder,
                seed=self.seed,
                n_slots=self.n_slots,
                starts=starts,
                health=health,
                # about two sequences: with many short ones a first step would wait for a lot of text
                batch_bytes=min(BATCH_BYTES, 8 * self.max_len),
            )
        return {slot: SlotStream(feed, slot, self.max_len, positions[slot]) for slot in positions}


class _MicroBatches(IterableDataset):
    """Micro-batches first, first + 1, ... of the endless stream; worker w of W makes every W-th."""

    def __init__(self, recipe: _Recipe, positions: dict[int, Position], first: int) -> None:
        self.recipe, self.positions, self.first = recipe, positions, first

    def __iter__(self) -> Iterator[dict]:
        try:
            yield from self._batches()
        except (ValueError, OSError) as error:
            # the user's to repair: the parent raises it as one line, without this traceback
            yield {"error": str(error)}

    def _batches(self) -> Iterator[dict]:
        info = get_worker_info()
        first, n_workers = (info.id, info.num_workers) if info else (0, 1)
        groups = self.recipe.micro_batches
        mine = {(self.first + first + i * n_workers) % len(groups) for i in range(len(groups))}
        slots = [slot for index in sorted(mine) for slot in groups[index]]
        health = Health()
        streams = self.recipe.streams({slot: self.positions[slot] for slot in slots}, health)
        number, lines = self.first + first, 0
        while True:
            group = groups[number % len(groups)]
            batch = collate(group, [streams[slot].take() for slot in group], self.recipe.reset_at_documents)
            batch["lines"], batch["broken"] = health.lines - lines, health.take_news()
            lines = health.lines
            yield batch
            number += n_workers


def collate(slots: tuple[int, ...], rows: list[Packed], reset_at_documents: bool) -> dict:
    """[b, T] ids and labels; with `reset_at_documents` [1, b*T] and `cu_seqlens` [segments + 1]."""
    input_ids = torch.from_numpy(np.stack([row.tokens for row in rows]).astype(np.int64))  # [b, T]
    batch = {"slots": list(slots), "positions": [row.position for row in rows]}
    if not reset_at_documents:
        return {"input_ids": input_ids, "labels": input_ids.clone(), **batch}
    length = input_ids.shape[1]
    starts = [row * length + start for row in range(len(rows)) for start in rows[row].starts]
    input_ids = input_ids.reshape(1, -1)  # [1, b*T]
    labels = input_ids.clone()
    # the model shifts labels by one: without this the last token of a segment would predict the next one's
    # first
    labels[0, starts] = -100
    cu_seqlens = torch.tensor([*starts, input_ids.shape[1]], dtype=torch.int32)
    return {"input_ids": input_ids, "labels": labels, "cu_seqlens": cu_seqlens, **batch}


def _start_worker(lifeline: worker.Lifeline, _worker_id: int) -> None:
    worker.hold(lifeline)


class TrainingLoader:
    """Endless micro-batches of this rank's slots, epoch after epoch, from jsonl or pretokenised files.

    An optimiser step has `n_slots` sequences (tokens_per_step / max_len); `slots` are this rank's (all by
    default, see `slots_of_rank`), handed out `micro_batch_size` at a time in order, so `batches_per_step`
    batches make a step. Each slot is one contiguous token stream: sequence n + 1 of a slot goes on where its
    sequence n stopped, which is what carrying the recurrent state from step to step needs.

    A batch: "input_ids" and "labels" int64 [b, T] (labels not shifted); "slots" and "positions" (after this
    batch), a list each. With `reset_at_documents` the rows are flattened to [1, b*T] and "cu_seqlens" int32
    [n + 1] bounds the documents (a row that starts inside one starts a segment); the first label of each
    segment is -100.

    `num_workers` is the number of cores to use: up to one process a micro-batch, the rest as tokenizer
    threads; 0 works in this process. Raises ValueError for a corpus that is missing, empty, mostly broken, or
    too small for one step. `on_broken_line(report)` is told of each broken line that is skipped; by default
    it is logged.

    Ranks that share a sequence (sequence parallelism) pass the same `slots`, get the same batch, and take
    their slice of dimension 1; neighbouring tokens for labels and convolution are in the same batch.
    """

    def __init__(
        self,
        path: str | Path | Corpus | TokenCorpus,
        tokenizer,
        *,
        max_len: int,
        n_slots: int,
        slots: range | list[int] | None = None,
        micro_batch_size: int = 1,
        seed: int | None = 0,
        reset_at_documents: bool = False,
        num_workers: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
        on_broken_line: Callable[[BrokenReport], None] | None = None,
    ) -> None:
        slots = list(range(n_slots) if slots is None else slots)
        _check_sizes(max_len, n_slots, slots, micro_batch_size, num_workers)
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer)
        corpus = open_corpus(path) if isinstance(path, (str, Path)) else path
        self._tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        if isinstance(corpus, TokenCorpus):
            corpus.check_tokenizer(self._tokenizer_fingerprint)
        check_fills_a_step(corpus, tokenizer, seed=seed, n_slots=n_slots, max_len=max_len)
        groups = tuple(tuple(slots[i : i + micro_batch_size]) for i in range(0, len(slots), micro_batch_size))
        self.batches_per_step = len(groups)
        self._processes = max((n for n in range(1, num_workers + 1) if len(groups) % n == 0), default=0)
        threads = max(1, num_workers // max(1, self._processes))
        self._recipe = _Recipe(corpus, tokenizer, max_len, n_slots, groups, seed, reset_at_documents, threads)
        self._prefetch, self._pin_memory = prefetch, pin_memory
        self._on_broken_line = on_broken_line or (
            lambda report: logger.warning("skipped a broken line: %s", report)
        )
        self._positions: dict[int, Position] = dict.fromkeys(slots, START)
        self._emitted = 0
        self.health = Health()

    def __iter__(self) -> Iterator[dict]:
        """Goes on after the last batch handed out (or the loaded state).

        Raises:
            ValueError: the corpus cannot be read any more, or too many of its lines are broken.
            RuntimeError: a worker died.
        """
        with worker.lifeline() as lifeline:
            batches = self._start(lifeline)
            try:
                for batch in batches:
                    if "error" in batch:
                        raise ValueError(batch["error"])
                    self._report(batch.pop("lines"), batch.pop("broken"))
                    self._positions.update(zip(batch["slots"], batch["positions"], strict=True))
                    self._emitted += 1
                    yield batch
            except (ConnectionError, EOFError):
                # a worker's pipe closes before torch hears of its death: its handler, which says of what the
                # worker died, interrupts this wait
                time.sleep(5)
                raise RuntimeError("DataLoader worker ended unexpectedly") from None
            finally:
                # ends the workers in good order, where no traceback holds them; the lifeline ends the others
                del batches

    def _start(self, lifeline: worker.Lifeline) -> Iterator[dict]:
        return iter(
            DataLoader(
                _MicroBatches(self._recipe, dict(self._positions), self._emitted),
                batch_size=None,
                num_workers=self._processes,
                prefetch_factor=self._prefetch if self._processes else None,
                pin_memory=self._pin_memory,
                worker_init_fn=partial(_start_worker, lifeline),
            )
        )

    def _report(self, lines: int, broken: list[BrokenReport]) -> None:
        for report in broken:
            self._on_broken_line(report)
        self.health.add(lines, broken)
        self.health.take_news()

    def state_dict(self) -> dict:
        """Position of this rank's slots after the last batch handed out; JSON-serialisable."""
        return {
            "version": STATE_VERSION,
            "seed": self._recipe.seed,
            "n_slots": self._recipe.n_slots,
            "corpus": self._recipe.corpus.fingerprint(),
            "tokenizer": self._tokenizer_fingerprint,
            "positions": {str(slot): dict(position) for slot, position in self._positions.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes this rank's slots out of a state that holds at least those (see `merge_states`)."""
        own = self.state_dict()
        for key in ("version", "seed", "n_slots", "corpus", "tokenizer"):
            if state.get(key) != own[key]:
                raise ValueError(
                    f"the saved data position has {key} {state.get(key)!r}, this run {own[key]!r}: resume "
                    "with the same corpus (names of its files), tokenizer, seed and n_slots (sequences a "
                    "step over all GPUs: tokens_per_step / max_len), or start a new run"
                )
        missing = [slot for slot in own["positions"] if slot not in state["positions"]]
        if missing:
            raise ValueError(
                f"the saved data position lacks slots {', '.join(missing)}: merge the states of all ranks "
                "when saving"
            )
        positions = {slot: dict(state["positions"][str(slot)]) for slot in self._positions}
        self._emitted = _emitted(self._recipe.micro_batches, positions)
        self._positions = positions


def _emitted(groups: tuple[tuple[int, ...], ...], positions: dict[int, Position]) -> int:
    """Micro-batches handed out so far, from the sequences that each slot has given."""
    given = [{int(positions[slot]["sequence"]) for slot in group} for group in groups]
    total = sum(min(counts) for counts in given)
    expected = [{total // len(groups) + (index < total % len(groups))} for index in range(len(groups))]
    if given != expected:
        raise ValueError(
            "the data position was saved in the middle of a step that was split in another way: "
            "resume it with the micro-batch size and number of ranks that saved it"
        )
    return total


def _check_sizes(
    max_len: int, n_slots: int, slots: list[int], micro_batch_size: int, num_workers: int
) -> None:
    for name, value in (("max_len", max_len), ("n_slots", n_slots), ("micro_batch_size", micro_batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}: expected 0 (in this process) or more")
    if not slots or not set(slots) <= set(range(n_slots)) or len(set(slots)) != len(slots):
        raise ValueError(f"slots {slots} are not distinct members of range({n_slots})")
    if len(slots) % micro_batch_size:
        raise ValueError(
            f"{len(slots)} sequences a step on this rank do not divide into micro-batches of "
            f"{micro_batch_size}: "
            "choose a micro-batch size that divides them"
        )
