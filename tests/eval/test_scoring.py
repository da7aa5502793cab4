"""Rules by hand-made answers, intervals against the normal approximation, kept answers on the disk."""

import math
from pathlib import Path
from typing import Any

import pytest

from eval import scoring
from eval.items import Item, as_tokens
from eval.store import Store

from .conftest import IDENTITY


def item(*answers: Any, **fields: Any) -> Item:
    return Item("t", "k", "generate", as_tokens([1, 2]), answers=answers, **fields)


@pytest.mark.parametrize(
    ("rule", "answer", "expected", "score"),
    [
        ("contains", " It is LIMA, I think", ("Lima",), 1.0),
        ("contains", " Oslo", ("Lima", "oslo"), 1.0),
        ("contains", "", ("Lima",), 0.0),
        ("contains", " in New York", ("New \n York",), 1.0),
        ("contains", " NewYork", ("New York",), 0.0),
        ("contains", " anything", (" ",), 0.0),
        ("contains", " (c++)", ("C++",), 1.0),  # no pattern, a text
        ("contains_all", " 12 or 34", ("12", "56"), 0.5),
        ("first_number", " 12345.", ("12345",), 1.0),
        ("first_number", " 11111 12345", ("12345",), 0.0),
        ("first_number", " 123456", ("12345",), 0.0),
        ("first_number", " none", ("12345",), 0.0),
        ("first_line", " Blue.\nand so on", ("blue",), 1.0),
        ("first_line", " bluebird", ("blue",), 0.0),
        ("predictions", [5, 6, -1, 8], (5, 7, 9, 8), 0.5),
    ],
)
def test_rules(rule: str, answer: Any, expected: tuple, score: float) -> None:
    assert scoring.RULES[rule](answer, item(*expected)) == score


def test_token_probability_is_the_inverse_of_perplexity() -> None:
    assert scoring.token_probability([[math.log(4) * 10, 10], [math.log(2) * 20, 20]], item()) == (
        pytest.approx(1 / math.exp((10 * math.log(4) + 20 * math.log(2)) / 30))
    )


def test_text_ends_at_the_first_stop() -> None:
    assert scoring.cut_at("a\nb;c", (";", "\n")) == "a"
    assert scoring.cut_at("abc", ("x", "")) == "abc"


def test_bootstrap_interval_of_a_coin() -> None:
    low, high = scoring.bootstrap_interval([0.0, 1.0] * 200)
    half = 1.96 * 0.5 / math.sqrt(400)  # normal approximation; 1,000 resamples leave a tenth of it uncertain
    assert low == pytest.approx(0.5 - half, abs=half / 5)
    assert high == pytest.approx(0.5 + half, abs=half / 5)
    assert scoring.bootstrap_interval([1.0] * 9) == (1.0, 1.0)


def test_position_buckets_cover_every_predicted_token_once() -> None:
    for length in (2, 64, 65, 1000, 4096):
        covered = [t for low, high in scoring.position_buckets(length) for t in range(low, high)]
        assert covered == list(range(1, length))


def test_any_change_of_item_or_model_is_another_answer() -> None:
    first = item("a").fingerprint("m")
    assert first == item("a").fingerprint("m")
    others = [item("b").fingerprint("m"), item("a").fingerprint("n"), item("a", stop=("x",)).fingerprint("m")]
    assert first not in others


def test_two_runs_may_not_write_to_one_folder(tmp_path: Path) -> None:
    with (
        Store(tmp_path, IDENTITY),
        pytest.raises(ValueError, match="another evaluation is writing"),
        Store(tmp_path, IDENTITY),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_full_disk_fails_the_task_that_met_it_and_no_other(tmp_path: Path) -> None:
    with Store(tmp_path, IDENTITY) as store:
        (tmp_path / "answers" / "a.jsonl").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            store.add("a", [{"fingerprint": "a"}])
        store.add("b", [{"fingerprint": "b"}])
        assert store.finished("b") == {"b": {"fingerprint": "b"}}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with Store(tmp_path, IDENTITY) as store:
        store.add("t", [{"fingerprint": "a"}, {"fingerprint": "b"}])
        file = tmp_path / "answers" / "t.jsonl"
        file.write_text(file.read_text().replace('"b"}', '"b'))
        with pytest.raises(ValueError, match="line 2 is damaged"):
            store.finished("t")
