"""Pretokenised corpora train the same sequences."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import TrainingLoader, ValidationLoader
from data.pretokenize import pretokenize
from data.quickstart import train_tokenizer
from data.tokens import index_path, open_token_corpus, token_path
from tests.data.corpora import make_corpus, rows, take


@pytest.fixture(scope="module")
def tokens(corpus, tokenizer, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokens") / "out"
    pretokenize(corpus, out, tokenizer, workers=2)
    return out


def loader(path, tokenizer, **settings):
    return TrainingLoader(path, tokenizer, **{"max_len": 96, "n_slots": 4, "seed": 3, **settings})


@pytest.mark.parametrize("settings", [{}, {"reset_at_documents": True, "micro_batch_size": 2}])
def test_same_batches_as_from_jsonl(corpus, tokens, tokenizer, settings):
    n_batches = 240 if not settings else 20  # three epochs
    for ours, theirs in zip(
        take(loader(tokens, tokenizer, **settings), n_batches),
        take(loader(corpus, tokenizer, **settings), n_batches),
        strict=True,
    ):
        assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
        assert ours["labels"].tolist() == theirs["labels"].tolist()
        assert ours["slots"] == theirs["slots"]


def test_same_validation_sequences_as_from_jsonl(corpus, tokens, tokenizer):
    ours, theirs = (
        [batch["labels"].tolist() for batch in ValidationLoader(path, tokenizer, max_len=50)]
        for path in (tokens, corpus)
    )
    assert ours == theirs


@pytest.mark.parametrize("stop", [1, 38, 133])
def test_a_run_goes_on_from_one_kind_in_the_other(corpus, tokens, tokenizer, stop):
    expected = rows(take(loader(corpus, tokenizer), stop + 10))[stop:]
    for first, second in ((corpus, tokens), (tokens, corpus)):
        begun, resumed = loader(first, tokenizer), loader(second, tokenizer)
        take(begun, stop)
        resumed.load_state_dict(begun.state_dict())
        assert rows(take(resumed, 10)) == expected


def test_another_tokenizer_is_refused(tokens):
    other = train_tokenizer(["some text"], 400)
    with pytest.raises(ValueError, match="written with another tokenizer"):
        loader(tokens, other)
    with pytest.raises(ValueError, match="begun with another tokenizer"):
        pretokenize(tokens.parent.parent / "corpus0", tokens, other)


def test_an_output_that_is_a_file_is_refused(corpus, tokenizer, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file or holds other files"):
        pretokenize(corpus, tmp_path / "out", tokenizer)


def test_a_killed_run_goes_on_without_doing_finished_files_again(tokenizer, tmp_path):
    make_corpus(tmp_path / "in")
    out = tmp_path / "out"

    def stop_after_two(message, seen=[]):  # noqa: B006
        seen.append(message)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretokenize(tmp_path / "in", out, tokenizer, report=stop_after_two)
    with pytest.raises(ValueError, match="is not finished"):
        loader(out, tokenizer)
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*.tokens")}
    assert len(finished) == 2
    pretokenize(tmp_path / "in", out, tokenizer)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert rows(take(loader(out, tokenizer), 9)) == rows(take(loader(tmp_path / "in", tokenizer), 9))


def test_a_cut_token_file_is_refused(tokenizer, tmp_path):
    make_corpus(tmp_path / "in")
    pretokenize(tmp_path / "in", tmp_path / "out", tokenizer)
    path = next((tmp_path / "out").rglob("*.tokens"))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"\.tokens should have \d+ bytes"):
        loader(tmp_path / "out", tokenizer)


def test_files_on_disk_are_what_the_manifest_says(tokens, texts):
    corpus = open_token_corpus(tokens)
    assert corpus.manifest["dtype"] == "<u2"
    assert sum(entry["documents"] for entry in corpus.manifest["files"]) == len(texts)
    assert sum(entry["tokens"] for entry in corpus.manifest["files"]) == sum(len(text) + 1 for text in texts)
    for file, entry in zip(corpus.files, corpus.manifest["files"], strict=True):
        assert np.load(index_path(file.path))[-1] * 2 == token_path(file.path).stat().st_size
        assert file.lines == entry["lines"]


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "data.pretokenize", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_command(corpus, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    done = command(
        f"in={corpus}", f"out={tmp_path / 'out'}", f"tokenizer={tmp_path / 'tokenizer'}", "--workers=2"
    )
    assert done.returncode == 0, done.stderr
    assert "109 documents, 0 broken" in done.stdout
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["vocabulary_size"] == 257
    wrong = command(f"in={corpus}", f"out={tmp_path / 'x'}", "tokeniser=t")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: unknown argument 'tokeniser' (did you mean tokenizer?)")
    assert not (tmp_path / "x").exists()
