"""Text and associative recall as tensors, made once and cached; the batch of a step is a pure function.

The text is the quickstart's: sources of the running Python's library, a BPE tokenizer trained on them, some
files held out. Recall examples are those of data/recall.py; their keys and values are ids of their own behind
the tokenizer's. A row of recall is one example, read from a fresh state, with questions up to its end: the
pairs of an earlier example would count as noise. Of recall only the answers are learned (the keys and values
before them cannot be predicted).
"""

import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from data.corpus import open_corpus
from data.encoding import load_tokenizer
from data.lines import parse_document, read_lines
from data.quickstart import build
from data.recall import recall_example, recall_prompt

from .settings import Settings

POOL_SEED, TEST_SEED = 1, 2  # no test example is a training example
IGNORED = -100
CORPUS_FIELDS = (
    *("sequence_length", "train_pairs", "eval_pairs", "eval_rows", "eval_queries", "text_eval_rows"),
    *("n_keys", "keys_per_pair", "n_values", "recall_pool_rows", "text_vocabulary"),
)


@dataclass(frozen=True)
class RecallTest:
    """Examples of one size; an answer is predicted at its question's position. R rows, Q questions."""

    pairs: int
    tokens: Tensor  # [R, T], padded behind the last answer
    positions: Tensor  # [Q], the same in every row
    answers: Tensor  # [R, Q]


@dataclass(frozen=True)
class StudyCorpus:
    """All data on the device. P pool rows, T tokens of a row."""

    text: Tensor  # [N], the training text
    held_out: Tensor  # [R, T]
    pool: Tensor  # [P, T], recall rows
    pool_labels: Tensor  # [P, T], -100 but for answers
    tests: tuple[RecallTest, ...]
    vocab_size: int
    digest: str  # of text, held-out text and recall

    def batch(self, settings: Settings, seed: int, phase: str, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels [rows, T] of a step; the same for every arm of a seed."""
        generator = torch.Generator().manual_seed(_hash(seed, phase, step))
        length = settings.sequence_length
        n_text = settings.rows - settings.recall_rows
        rows = torch.randint(len(self.pool), (settings.recall_rows,), generator=generator)
        if phase == "base":
            rows = _of_sizes(rows, sizes_at(settings, step), len(settings.train_pairs))
        starts = torch.randint(len(self.text) - length, (n_text, 1), generator=generator)
        device = self.text.device
        rows = rows.to(device, non_blocking=True)
        windows = (starts + torch.arange(length)).to(device, non_blocking=True)
        text = self.text[windows]
        tokens = torch.cat([self.pool[rows], text]).long()
        return tokens, torch.cat([self.pool_labels[rows], text]).long()


def sizes_at(settings: Settings, step: int) -> int:
    """How many of train_pairs come up at a step of a base: the first one at first, one more every while."""
    n_sizes, steps = len(settings.train_pairs), settings.curriculum_steps
    return n_sizes if step >= steps else 1 + step * (n_sizes - 1) // steps


def _of_sizes(rows: Tensor, allowed: int, n_sizes: int) -> Tensor:
    """Rows of the first `allowed` sizes in place of others: row r of the pool is of size r % n_sizes."""
    return rows if allowed == n_sizes else rows // n_sizes * n_sizes + rows % n_sizes % allowed


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def load_corpus(settings: Settings, work: Path, device: str | torch.device) -> StudyCorpus:
    """The corpus of these settings from its cache under `work`, which it fills when need be."""
    fields = {name: getattr(settings, name) for name in CORPUS_FIELDS}
    key = hashlib.sha256(repr(fields).encode()).hexdigest()[:12]
    file = work / f"corpus-{key}.pt"
    if not file.is_file():
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        torch.save(_make(settings, work), temporary)
        os.replace(temporary, file)
    data = torch.load(file, map_location=device)
    tests = tuple(RecallTest(**test) for test in data.pop("tests"))
    return StudyCorpus(tests=tests, **data)


def _make(settings: Settings, work: Path) -> dict:
    folder = work / f"text-{settings.text_vocabulary}"
    build(folder, recall_share=0.0, vocabulary_size=settings.text_vocabulary)
    tokenizer = load_tokenizer(folder / "tokenizer")
    text, held_out = (_stream(folder / part, tokenizer) for part in ("train", "validation"))
    if len(text) <= settings.sequence_length:
        raise ValueError(f"{folder} holds {len(text)} tokens: too few for sequence_length")
    rows = min(settings.text_eval_rows, len(held_out) // settings.sequence_length)
    held_out = held_out[: rows * settings.sequence_length].view(rows, -1)
    first_id, start = len(tokenizer), tokenizer.eos_token_id
    pool, labels = _pool(settings, first_id, start)
    digest = hashlib.sha256()
    for tensor in (text, held_out, pool):
        digest.update(tensor.numpy().tobytes())
    return {
        "text": text,
        "held_out": held_out,
        "pool": pool,
        "pool_labels": labels,
        "tests": [_test(settings, pairs, first_id, start) for pairs in settings.eval_pairs],
        "vocab_size": first_id + settings.n_keys + settings.n_values,
        "digest": digest.hexdigest()[:12],
    }


def _stream(folder: Path, tokenizer) -> Tensor:
    """All documents of a folder end to end, end-of-text behind each, int32 [N]."""
    lines = [line for file in open_corpus(folder).files for line in read_lines(file.path)]
    texts = [parse_document(line.raw) for line in lines]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([i for ids in encoded for i in [*ids, tokenizer.eos_token_id]], dtype=torch.int32)


def _prompt(
    settings: Settings, first_id: int, start: int, seed: int, index: int, pairs: int, queries: int
) -> tuple[list[int], list[int], list[int]]:
    n_keys = min(settings.n_keys, pairs * (settings.keys_per_pair or settings.n_keys))
    sizes = {"n_keys": n_keys, "n_values": settings.n_values}
    example = recall_example(seed, index, pairs, queries, **sizes)
    keys = range(first_id, first_id + settings.n_keys)
    values = range(keys.stop, keys.stop + settings.n_values)
    return recall_prompt(example, keys, values, start)


def _test(settings: Settings, pairs: int, first_id: int, start: int) -> dict:
    queries = min(_room(settings, pairs), settings.eval_queries)
    rows = [
        _prompt(settings, first_id, start, TEST_SEED, i, pairs, queries) for i in range(settings.eval_rows)
    ]
    # one shape for all sizes: kernels are compiled once
    padded = [ids + [start] * (settings.sequence_length - len(ids)) for ids, _, _ in rows]
    return {
        "pairs": pairs,
        "tokens": torch.tensor(padded),
        "positions": torch.tensor(rows[0][1]),
        "answers": torch.tensor([answers for _, _, answers in rows]),
    }


def _pool(settings: Settings, first_id: int, start: int) -> tuple[Tensor, Tensor]:
    """Rows of recall [P, T] and their labels, made by all cores when they are many."""
    tasks = [(settings, first_id, start, row) for row in range(settings.recall_pool_rows)]
    cores = min(os.cpu_count() or 1, 16)
    if len(tasks) < 4096 or cores < 4:
        rows = [_pool_row(*task) for task in tasks]
    else:
        with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as executor:
            rows = list(executor.map(_pool_row_of, tasks, chunksize=256))
    tokens, labels = (torch.tensor(part, dtype=torch.int32) for part in zip(*rows))
    return tokens, labels


def _pool_row_of(task: tuple) -> tuple[list[int], list[int]]:
    return _pool_row(*task)


def _pool_row(settings: Settings, first_id: int, start: int, row: int) -> tuple[list[int], list[int]]:
    """Tokens and labels of one row: an example of the row's size, with as many questions as fit."""
    pairs = settings.train_pairs[row % len(settings.train_pairs)]
    ids, positions, answers = _prompt(
        settings, first_id, start, POOL_SEED, row, pairs, _room(settings, pairs)
    )
    labels = [IGNORED] * settings.sequence_length
    for position, answer in zip(positions, answers):
        labels[position + 1] = answer
    return ids + [start] * (settings.sequence_length - len(ids)), labels


def _room(settings: Settings, pairs: int) -> int:
    """Questions that fit into a row behind its pairs."""
    return (settings.sequence_length - 1 - 2 * pairs) // 2
