"""What RULER's generator makes with the tokenizer's stand-in is what it makes with the tokenizer."""

from pathlib import Path
from typing import Any

import pytest

from eval import ruler
from eval.ruler_lengths import LengthFinder, MisjudgedError


class Counting:
    """A tokenizer, and the characters it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.characters = 0

    def __call__(self, text: str) -> Any:
        self.characters += len(text)
        return self.tokenizer(text)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
@pytest.mark.parametrize("length", [1024, 65536])
def test_the_same_documents_from_less_tokenising(task: str, length: int, tokenizer: Any) -> None:
    plain, sparing = Counting(tokenizer), Counting(tokenizer)
    expected = ruler._documents(task, length, 3, 7, plain, Path("none"))
    assert ruler.documents(task, length, 3, 7, sparing, Path("none")) == expected
    assert sparing.characters <= plain.characters
    if length == 65536 and task != "niah_multikey_3":  # whose steps are long: few are tokenised anyway
        assert sparing.characters < 0.7 * plain.characters


def test_a_text_that_does_not_grow_is_tokenised(tokenizer: Any) -> None:
    finder = LengthFinder(tokenizer, 10**6)
    texts = ["the grass " * n for n in (10, 20, 30, 40)]
    assert [isinstance(finder(text).input_ids, range) for text in texts] == [False, False, True, True]
    assert len(finder("the grass " * 40).input_ids) == len(tokenizer("the grass " * 40).input_ids)
    assert not isinstance(finder("the grass " * 50).input_ids, range)  # samples, one after the other


def test_a_length_that_was_misjudged_is_searched_for_again(tokenizer: Any) -> None:
    finder = LengthFinder(tokenizer, 1000)
    for text in ("grass " * 10, "grass " * 20):
        finder(text)
    finder("grass " * 30)
    with pytest.raises(MisjudgedError):
        finder("grass " * 1000)


def test_documents_come_out_where_the_stand_in_gives_up(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: Any) -> None:
        raise MisjudgedError

    expected = ruler.documents("niah_single_1", 1024, 2, 7, tokenizer, Path("none"))
    monkeypatch.setattr(LengthFinder, "__call__", give_up)
    assert ruler.documents("niah_single_1", 1024, 2, 7, tokenizer, Path("none")) == expected
