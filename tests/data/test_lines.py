"""Reading files: plain, compressed, broken."""

import gzip
import json

import pytest
import zstandard

from data import TrainingLoader, open_corpus
from data.health import BrokenReport, Health
from data.lines import BrokenLineError, parse_document, read_lines
from tests.data.corpora import document, take, write_jsonl

CONTENT = b"".join(b"%d " % i * (i % 7) + b"\n" for i in range(3000)) + b"last without newline"
PACKERS = {
    "jsonl": lambda content: content,
    "gz": lambda content: gzip.compress(content[:5000]) + gzip.compress(content[5000:]),
    "zst": lambda content: b"".join(zstandard.compress(part) for part in (content[:5000], content[5000:])),
}


@pytest.fixture(params=sorted(PACKERS))
def packed(request, tmp_path):
    path = tmp_path / f"a.{request.param}"
    path.write_bytes(PACKERS[request.param](CONTENT))
    return path


def test_lines_are_those_of_the_file(packed):
    assert [line.raw for line in read_lines(packed)] == CONTENT.split(b"\n")


def test_reading_starts_anywhere_with_or_without_a_byte_offset(packed):
    lines = list(read_lines(packed))
    for start in (0, 1, 1234, 3000):
        assert list(read_lines(packed, start, lines[start].offset)) == lines[start:]
        assert list(read_lines(packed, start, None)) == lines[start:]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_truncated_file_gives_its_lines_then_one_problem(tmp_path, kind):
    content = "".join(json.dumps({"text": document(i)}) + "\n" for i in range(20000)).encode()
    path = tmp_path / f"a.{kind}"
    path.write_bytes({"gz": gzip.compress, "zst": zstandard.compress}[kind](content)[:-2000])
    *whole, last = read_lines(path)
    assert b"\n".join(line.raw for line in whole) == content[: whole[-1].end - 1]
    assert len(whole) > 10
    assert "ends early" in last.problem
    assert last.number == len(whole)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_garbage_in_a_compressed_file_is_one_problem(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"this is no compressed data")
    (line,) = read_lines(path)
    assert "does not decompress" in line.problem


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"text": "cut off', "not JSON"),
        (b"[1, 2]", "a JSON list"),
        (b'{"meta": {}}', "no field 'text'"),
        (b'{"text": 5}', "is a int"),
        (b'{"text": null}', "is a NoneType"),
        (b'{"text": "\xff\xfe"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_broken_line_says_why(raw, reason):
    with pytest.raises(BrokenLineError, match=reason):
        parse_document(raw)


def test_good_lines():
    assert parse_document('{"text": "\\ud83d\\ude42 狀態", "meta": 1}'.encode()) == "🙂 狀態"
    assert parse_document(b'\xef\xbb\xbf{"text": "after a byte order mark"}\r') == "after a byte order mark"
    assert parse_document(b"  ") == parse_document(b'{"text": ""}') == ""


def corpus_with_broken_lines(root, n_broken, n_good):
    write_jsonl(root / "a.jsonl", [document(i) for i in range(n_good)])
    with open(root / "a.jsonl", "a") as file:
        file.writelines('{"text": \n' for _ in range(n_broken))
    return root


def test_broken_lines_are_reported_with_file_and_line_and_skipped(tmp_path, tokenizer):
    corpus_with_broken_lines(tmp_path, 1, 50)
    reports = []
    loader = TrainingLoader(tmp_path, tokenizer, max_len=2000, n_slots=1, on_broken_line=reports.append)
    take(loader, 1)
    assert str(reports[0]).startswith("a:51: not JSON")
    assert loader.health.broken == len(reports)


def test_ten_broken_lines_pass_and_eleven_stop(tmp_path, tokenizer):
    take(TrainingLoader(corpus_with_broken_lines(tmp_path, 10, 90), tokenizer, max_len=64, n_slots=1), 2)
    with pytest.raises(ValueError, match=r"11 of the \d+ lines read are broken.*a:\d+: not JSON"):
        take(
            TrainingLoader(corpus_with_broken_lines(tmp_path, 11, 90), tokenizer, max_len=4000, n_slots=1), 2
        )


def test_one_in_a_thousand_is_the_limit():
    health = Health()
    health.add(19_999, [])
    reports = [BrokenReport("a", line, "not JSON") for line in range(20)]
    with pytest.raises(ValueError, match="20 of the 19999"):
        health.add(0, reports)
    health = Health()
    health.add(20_000, [])
    health.add(0, reports)


def test_a_line_broken_in_every_epoch_is_one_broken_line(tmp_path, tokenizer):
    corpus_with_broken_lines(tmp_path, 2, 60)
    reports = []
    loader = TrainingLoader(tmp_path, tokenizer, max_len=64, n_slots=1, on_broken_line=reports.append)
    epochs = [batch["positions"][0]["epoch"] for batch in take(loader, 600)]
    assert epochs[-1] >= 8  # counted anew in each epoch they would be eleven in the sixth
    assert (len(reports), loader.health.broken) == (2, 2)


@pytest.mark.parametrize("content", [None, "folder", "empty file", "other file"])
def test_missing_or_empty_corpus_says_what_is_expected(tmp_path, content):
    root = tmp_path / "corpus"
    if content is not None:
        root.mkdir()
    if content == "empty file":
        (root / "a.jsonl").touch()
    if content == "other file":
        (root / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=rf"{root} .*expected a folder with \*\.jsonl.*chunk"):
        open_corpus(root)


def test_chunks_that_are_links_are_read(tmp_path):
    write_jsonl(tmp_path / "disk" / "b.jsonl", ["x"])
    root = write_jsonl(tmp_path / "corpus" / "a.jsonl", ["x"]).parent
    (root / "chunk1").symlink_to(tmp_path / "disk")
    (root / "chunk2").mkdir()
    (root / "chunk2" / "back").symlink_to(root)
    assert [file.name for file in open_corpus(root).files] == ["a", "chunk1/b"]


def test_a_file_beside_its_compressed_twin_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match="same file twice"):
        open_corpus(tmp_path)
