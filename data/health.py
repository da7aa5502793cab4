"""Broken lines: counted, reported with file and line, and too many of them stop the run."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_BROKEN = 10
MAX_BROKEN_SHARE = 0.001


@dataclass(frozen=True)
class BrokenReport:
    file: str
    line: int  # 1-based, as editors count
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass
class Health:
    """Lines read and lines broken; `news` holds the reports that nobody has taken yet.

    A line that is broken in every epoch is one broken line, reported once.
    """

    lines: int = 0
    known: set[BrokenReport] = field(default_factory=set)
    news: list[BrokenReport] = field(default_factory=list)

    @property
    def broken(self) -> int:
        return len(self.known)

    def add(self, lines: int, reports: list[BrokenReport]) -> None:
        self.lines += lines
        new = [report for report in dict.fromkeys(reports) if report not in self.known]
        self.known.update(new)
        self.news += new
        if new and self.broken > MAX_BROKEN and self.broken > MAX_BROKEN_SHARE * self.lines:
            raise ValueError(
                f"{self.broken} of the {self.lines} lines read are broken (more than {MAX_BROKEN} and "
                f"{MAX_BROKEN_SHARE:.1%}), the last: {new[-1]}. "
                'Each line must be one JSON object {"text": "..."} in UTF-8: repair or remove these files'
            )

    def take_news(self) -> list[BrokenReport]:
        news, self.news = self.news, []
        return news
