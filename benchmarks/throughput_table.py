"""Rows of benchmarks.throughput as tables: speed beside flash-linear-attention, and what expansion costs."""

from dataclasses import dataclass

# a row, and the row that its price is counted from
PRICED = {
    "gla-statex": "gla-lpt",
    "gla-one-head": "gla-lpt",
    "gla-lpt-fp8": "gla-lpt",
    "fla-gla-one-head": "fla-gla",
    "mamba2-statex": "mamba2-lpt",
    "mamba2-all": "mamba2-lpt",
    "mamba2-lpt-fp8": "mamba2-lpt",
}


@dataclass
class Row:
    """Figures of one benchmark row; times in seconds, memory in GB (1e9 bytes)."""

    name: str
    length: int  # tokens of a sequence
    batch: int  # sequences of a step
    tokens_per_second: float
    step_seconds: float
    spread: float  # (slowest - fastest) / median of the timed steps
    peak_gb: float  # allocated
    reserved_gb: float  # taken from the card, the allocator's gaps included
    first_step_seconds: float  # from the start of building the model to the end of the first step
    loss: float
    levels: list[str]  # what each layer recomputes

    @property
    def recompute(self) -> str:
        return describe(self.levels)

    @property
    def load(self) -> tuple[int, int]:
        return self.length, self.batch

    @property
    def base(self) -> str:
        """The row's name without what it recomputes."""
        return self.name.partition("@")[0]


@dataclass(frozen=True)
class Price:
    """What a row takes more than the one it is counted from, at the same length and batch."""

    name: str
    over: str
    length: int
    kind: str  # automatic: each recomputes what suits its memory; equal: both recompute the same
    time: float  # share of the cheaper row's step
    memory_gb: float
    recompute: str


def describe(levels: list[str]) -> str:
    """`10 full, 14 none`"""
    return ", ".join(f"{levels.count(level)} {level}" for level in dict.fromkeys(levels))


def equal_row(priced: Row, results: list[Row]) -> Row | None:
    """The row to count `priced` from whose layers recompute the same as its own."""
    wanted = PRICED.get(priced.base)
    same = (row for row in results if row.base == wanted and row.load == priced.load)
    return next((row for row in same if row.levels == priced.levels), None)


def prices(results: list[Row]) -> list[Price]:
    """Every price that the rows at hand allow."""
    found = []
    for row in results:
        over = PRICED.get(row.base)
        automatic = next((r for r in results if r.name == over and r.load == row.load), None)
        equal = equal_row(row, results)
        if automatic is not None and automatic is equal:
            found.append(_price(row, automatic, "automatic and equal"))
            continue
        if automatic is not None and "@" not in row.name:
            found.append(_price(row, automatic, "automatic"))
        if equal is not None:
            found.append(_price(row, equal, "equal"))
    return found


def _price(row: Row, over: Row, kind: str) -> Price:
    time = row.step_seconds / over.step_seconds - 1
    recompute = over.recompute if over.levels == row.levels else f"{row.recompute}; {over.recompute}"
    return Price(row.name, over.name, row.length, kind, time, row.peak_gb - over.peak_gb, recompute)


def table(results: list[Row]) -> str:
    """The figures as a Markdown table, with ratios to the flash-linear-attention rows."""
    lines = [
        "| row | tokens | tokens/s | against fla | step (s) | spread | peak GB | reserved GB "
        "| first step (s) | recomputed |",
        "|" + " --- |" * 10,
    ]
    for row in results:
        tokens = f"{row.length:,}" if row.batch == 1 else f"{row.batch} x {row.length:,}"
        lines.append(
            f"| {row.name} | {tokens} | {row.tokens_per_second:,.0f} | {_against_fla(row, results)} "
            f"| {row.step_seconds:.3f} | {row.spread:.1%} | {row.peak_gb:.1f} | {row.reserved_gb:.1f} "
            f"| {row.first_step_seconds:.1f} | {row.recompute} |"
        )
    return "\n".join(lines)


def _against_fla(row: Row, results: list[Row]) -> str:
    base = "fla-mamba2" if "mamba2" in row.name else "fla-gla"
    reference = next((r for r in results if r.name == base and r.load == row.load), None)
    return f"{row.tokens_per_second / reference.tokens_per_second:.2f}x" if reference else ""


def price_table(found: list[Price]) -> str:
    """The prices as a Markdown table; empty where there are none."""
    if not found:
        return ""
    lines = ["| price of | over | tokens | recomputation | time | memory | recomputed |", "|" + " --- |" * 7]
    lines += [
        f"| {price.name} | {price.over} | {price.length:,} | {price.kind} | {price.time:+.1%} "
        f"| {price.memory_gb:+.1f} GB | {price.recompute} |"
        for price in found
    ]
    return "\n".join(lines)
