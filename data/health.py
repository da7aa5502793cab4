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
    """Lines seen and lines broken; `news` holds the reports that nobody has taken yet."""

    lines: int = 0
    broken: int = 0
    news: list[BrokenReport] = field(default_factory=list)

    def add(self, lines: int, reports: list[BrokenReport]) -> None:
        self.lines += lines
        self.broken += len(reports)
        self.news += reports
        if self.broken > MAX_BROKEN and self.broken > MAX_BROKEN_SHARE * self.lines:
            raise ValueError(
                f"{self.broken} of the {self.lines} lines read are broken (more than {MAX_BROKEN} and "
                f"{MAX_BROKEN_SHARE:.1%}), the last: {self.news[-1] if self.news else reports[-1]}. "
                'Each line must be one JSON object {"text": "..."} in UTF-8: repair or remove these files'
            )

    def take_news(self) -> list[BrokenReport]:
        news, self.news = self.news, []
        return news
