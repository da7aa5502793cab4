"""A tokenizer that spares RULER's generator most of what it tokenises to find how much text fits a length.

The generator lengthens one example step by step and tokenises each from its beginning: at 65,536 tokens that
takes as long as a GPU takes to read a dozen prompts. How long an example is follows from the ones before it.
"""

from typing import Any, NamedTuple

MEASURED = 0.97  # of the length; an example is tokenised where the one after the next would pass it


class Counted(NamedTuple):
    input_ids: Any  # the tokens, or a range of as many as are expected


class MisjudgedError(Exception):
    """The first example that is tokenised again is too long: where to stop had to be known before."""


class LengthFinder:
    """Stands for the tokenizer in one call of `generate_samples`.

    The first two examples are tokenised; of longer ones that are expected far below the length the number of
    tokens is expected to grow with the characters; all others, the samples among them, are tokenised.

    Args:
        longest: tokens that an example may have.
    """

    def __init__(self, tokenizer: Any, longest: int) -> None:
        self._tokenizer = tokenizer
        self._longest = longest
        self._known: list[tuple[int, int]] = []  # (characters, tokens) of the first examples
        self._last = 0  # characters of the last example
        self._skipped = False
        self._growing = True

    def __call__(self, text: str) -> Counted:
        """
        Raises:
            MisjudgedError: use the tokenizer itself.
        """
        if len(self._known) == 2:
            step = self._known[1][0] - self._known[0][0]
            self._growing &= len(text) - self._last > step / 2  # samples do not
            self._last = len(text)
            expected = self._expected(len(text))
            if self._growing and self._expected(len(text) + 2 * step) < MEASURED * self._longest:
                self._skipped = True
                return Counted(range(expected))
        self._growing &= len(self._known) < 2
        counted = Counted(self._tokenizer(text).input_ids)
        if self._skipped and len(counted.input_ids) > self._longest:
            raise MisjudgedError
        self._skipped = False
        if len(self._known) < 2:
            self._known.append((len(text), len(counted.input_ids)))
            self._last = len(text)
        return counted

    def _expected(self, characters: int) -> int:
        (first, tokens), (second, more) = self._known
        return round(more + (characters - second) * (more - tokens) / max(second - first, 1))
