"""What a task asks, and what becomes of the answers."""

from collections.abc import Iterable, Sequence

from .items import Item
from .store import Record


class Questions:
    """Items in the order in which they are asked, whose records come back in that order.

    Attributes:
        items: made while they are iterated over, which is done once, in a thread that prepares.
        total: how many there are at most; None where that is not known.
    """

    def __init__(self, items: Iterable[Item], total: int | None = None) -> None:
        self.items = items
        self.total = total
        self._records: list[Record] = []

    def take(self, records: Sequence[Record]) -> None:
        """The next records, some at a time, in a thread that scores while the model answers others."""
        self._records += records

    def results(self) -> list[Record]:
        """The task's records, once all of its items' were taken."""
        return self._records
