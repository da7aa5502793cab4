"""Held-out sequences: each token once, whatever the number of ranks."""

import pytest
import torch

from data import DATASETS, ValidationLoader, open_dataset
from tests.data.corpora import write_jsonl

MAX_LEN = 70


def counted_rows(corpus, tokenizer, world_size, **settings):
    """Sequences cut to their counted labels, all ranks' in their order in the set."""
    ranks = [
        ValidationLoader(corpus, tokenizer, max_len=MAX_LEN, rank=rank, world_size=world_size, **settings)
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    own = [[row for batch in rank for row in batch["labels"].view(-1, MAX_LEN)] for rank in ranks]
    return [row[row != -100].tolist() for together in zip(*own, strict=True) for row in together]


def test_every_token_is_counted_once_in_file_order(corpus, texts, tokenizer):
    rows = counted_rows(corpus, tokenizer, 1)
    stream = tokenizer.decode([token for row in rows for token in row])
    assert sorted(stream.split("<|endoftext|>")[:-1]) == sorted(texts)
    assert all(len(row) == MAX_LEN for row in rows[:-1])


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(2, 1), (3, 2), (4, 4)])
def test_sharing_out_loses_and_repeats_nothing(corpus, tokenizer, world_size, micro_batch_size):
    alone = counted_rows(corpus, tokenizer, 1)
    shared = counted_rows(corpus, tokenizer, world_size, micro_batch_size=micro_batch_size)
    assert [row for row in shared if row] == alone


def test_a_limit_takes_the_first_sequences(corpus, tokenizer):
    assert counted_rows(corpus, tokenizer, 1, n_sequences=5) == counted_rows(corpus, tokenizer, 1)[:5]


def test_iterating_twice_gives_the_same(corpus, tokenizer):
    loader = ValidationLoader(corpus, tokenizer, max_len=MAX_LEN, n_sequences=3)
    for once, again in zip(loader, loader, strict=True):
        assert torch.equal(once["input_ids"], again["input_ids"])


def test_short_corpus_is_filled_up_without_being_counted(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["short"])
    (batch,) = ValidationLoader(tmp_path, tokenizer, max_len=MAX_LEN, reset_at_documents=True)
    assert batch["input_ids"].shape == (1, MAX_LEN)
    assert (batch["labels"] != -100).sum() == len(
        "short"
    )  # end-of-text is counted, the segment's first is not
    assert batch["cu_seqlens"].tolist() == [0, 6, MAX_LEN]


def test_corpus_of_empty_documents_is_refused(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(ValueError, match="no document"):
        ValidationLoader(tmp_path, tokenizer, max_len=MAX_LEN)


def test_unknown_data_name_lists_the_known_ones(corpus):
    with pytest.raises(
        ValueError, match=r"'slimpjs' \(did you mean slimpj\?\): known are corpus, quickstart, slimpj"
    ):
        open_dataset("slimpjs", corpus)
    assert {open_dataset(name, corpus).root for name in DATASETS} == {corpus}
