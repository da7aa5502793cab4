"""The embedded corpus and its associative-recall documents."""

import hashlib
import json
from pathlib import Path

import pytest

from data import TrainingLoader, load_tokenizer
from data.quickstart import build, is_validation, source_files
from data.recall import (
    N_KEYS,
    N_VALUES,
    recall_example,
    recall_prompt,
    recall_text,
    recall_vocabulary,
)
from tests.data.corpora import take


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Built from a tenth of the library, to be quick."""
    files = list(source_files())[::10]
    out = tmp_path_factory.mktemp("quickstart") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.quickstart.source_files", lambda: iter(files))
        build(out, seed=0, recall_share=0.3, vocabulary_size=1024)
    return out


def documents(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.rglob("*.jsonl")) for line in open(path)]


def test_sources_are_read_from_the_library_without_its_tests():
    names = [name for name, _ in source_files()]
    assert len(names) > 300
    assert {"typing.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]


def test_training_and_validation_share_no_file(built):
    train = {document["meta"]["source"] for document in documents(built / "train")}
    validation = {document["meta"]["source"] for document in documents(built / "validation")}
    assert validation
    assert not train & validation
    assert all(map(is_validation, validation))


def test_recall_has_its_share_of_the_tokens(built):
    tokenizer = load_tokenizer(built / "tokenizer")
    sizes = {True: 0, False: 0}
    for document in documents(built / "train"):
        sizes[document["meta"]["source"].startswith("recall-")] += len(
            tokenizer(document["text"])["input_ids"]
        )
    assert sizes[True] / sum(sizes.values()) == pytest.approx(0.3, abs=0.01)


def test_building_again_keeps_what_is_there_and_refuses_other_settings(built):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.is_file()}
    build(built, seed=0, recall_share=0.3, vocabulary_size=1024)
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="was built with seed=0"):
        build(built, seed=1, vocabulary_size=1024)


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("data.quickstart.source_files", lambda: iter([]))
    with pytest.raises(ValueError, match="no source files"):
        build(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds other files"):
        build(tmp_path)


def test_the_loader_reads_it(built):
    loader = TrainingLoader(built / "train", built / "tokenizer", max_len=256, n_slots=4)
    assert take(loader, 8)[-1]["input_ids"].max() < 1024


def test_recall_examples_are_fixed_for_ever():
    example = recall_example(seed=7, index=3, n_pairs=8)
    digest = hashlib.sha256(repr(example).encode()).hexdigest()
    assert digest.startswith("af384930bbc551c7")


def test_recall_keys_differ_and_are_asked_for_at_random():
    for index, n_pairs in enumerate((1, 4, 32, N_KEYS)):
        example = recall_example(0, index, n_pairs)
        assert len(set(example.keys)) == n_pairs == len(example.queries)
        assert all(0 <= value < N_VALUES for value in example.values)
        assert all(0 <= query < n_pairs for query in example.queries)
    assert len(recall_example(0, 0, 32, n_queries=5).queries) == 5
    assert len(recall_example(0, 0, 2, n_queries=50).queries) == 50


def test_ruling_out_the_answers_already_shown_does_not_help():
    """A guess among the values that no earlier question had is right as often as any other guess."""
    n_pairs, right, asked = 4, 0, 0
    for index in range(2000):
        example = recall_example(0, index, n_pairs, n_values=1000)
        left = list(range(n_pairs))
        for query in example.queries:
            right += left[0] == query
            asked += 1
            if query in left and len(left) > 1:
                left.remove(query)
    assert right / asked == pytest.approx(1 / n_pairs, abs=0.02)  # (1 + 1/2 + 1/3 + 1/4) / 4 = 0.52 without


def test_recall_prompt_is_the_document_and_its_answers(built):
    tokenizer = load_tokenizer(built / "tokenizer")
    key_ids, value_ids = recall_vocabulary(tokenizer)
    example = recall_example(1, 0, 12)
    ids, positions, expected = recall_prompt(example, key_ids, value_ids, tokenizer.eos_token_id)
    assert ids == [tokenizer.eos_token_id, *tokenizer(recall_text(example))["input_ids"]]
    pairs = dict(zip(ids[1:25:2], ids[2:25:2]))
    assert len(positions) == len(pairs) == 12
    for position, answer in zip(positions, expected, strict=True):
        assert pairs[ids[position]] == answer == ids[position + 1]


def test_recall_needs_its_tokens_and_sensible_sizes(tokenizer):
    with pytest.raises(ValueError, match="lacks the recall tokens"):
        recall_vocabulary(tokenizer)
    with pytest.raises(ValueError, match="expected 1 to 64"):
        recall_example(0, 0, 65)
    with pytest.raises(ValueError, match="n_queries is 0"):
        recall_example(0, 0, 8, n_queries=0)


@pytest.mark.parametrize("pairs", ["0", "65", "2,x", ""])
def test_sizes_of_recall_that_no_document_can_have(tmp_path, pairs):
    with pytest.raises(ValueError, match="recall_pairs"):
        build(tmp_path / "data", recall_pairs=pairs)
