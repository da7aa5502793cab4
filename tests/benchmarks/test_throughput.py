"""The throughput benchmark's arguments, rows and tables; what it measures needs a GPU."""

import pytest
import torch

from benchmarks import throughput, throughput_rows
from benchmarks.throughput_rows import ROWS, Load, split_name
from benchmarks.throughput_table import PRICED, Row, describe, price_table, prices, table
from models.ops import matmul
from training.rules import _CHOICES


def row(name: str, seconds: float, peak: float = 60.0, levels: str = "mlp", length: int = 65536) -> Row:
    speed = length / seconds
    return Row(name, length, 1, speed, seconds, 0.01, peak, peak + 2, 9.0, 10.4, [levels] * 24)


def test_defaults_measure_every_row_at_64k():
    options = throughput.parse([])
    assert options["rows"].split(",") == list(ROWS)
    assert (options["length"], options["memory_gb"], options["equal"]) == ("65536", "84.9", "false")


def test_a_list_of_lengths_and_rows_with_levels_are_accepted():
    options = throughput.parse(["--length=4096,262144", "rows=gla-lpt@gla-statex,mamba2-lpt@scan,fla-gla"])
    assert throughput.names_to_run(options) == ["gla-lpt@gla-statex", "mamba2-lpt@scan", "fla-gla"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("rows=gla", "unknown row 'gla'"),
        ("rows=gla-lpt@half", "expected a level"),
        ("rows=gla-lpt@mamba2-statex", "same family"),
        ("rows=fla-gla@full", "leave @full out"),
        ("length=4096,", "whole number"),
        ("steps=0", "whole number"),
        ("recompute=some", "expected auto"),
        ("equal=yes", "true or false"),
        ("lenght=4096", "unknown key 'lenght'"),
    ],
)
def test_a_wrong_argument_is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        throughput.parse([argument])


def test_recompute_concerns_our_rows_without_levels_of_their_own():
    options = throughput.parse(["rows=fla-gla,gla-lpt,gla-statex@mlp", "recompute=full"])
    assert throughput.names_to_run(options) == ["fla-gla", "gla-lpt@full", "gla-statex@mlp"]


def test_every_priced_row_exists_and_is_priced_within_its_family():
    for name, over in PRICED.items():
        assert ROWS[name].family == ROWS[over].family
        assert ROWS[name].source == ROWS[over].source


def test_table_compares_rows_of_one_length_only():
    results = [row("fla-gla", 2.0), row("gla-lpt", 1.0), row("gla-lpt", 0.5, length=4096)]
    lines = table(results).splitlines()
    assert "| 2.00x |" in lines[3]
    assert "x |" not in lines[4]
    assert len({line.count("|") for line in lines}) == 1
    assert "24 mlp" in lines[3]


def test_automatic_and_equal_prices_differ_where_recomputation_does():
    lpt, statex = row("gla-lpt", 1.0, 60), row("gla-statex", 1.05, 66, "full")
    equal = row("gla-lpt@gla-statex", 1.04, 59, "full")
    found = prices([lpt, statex, equal])
    assert [(price.kind, price.over) for price in found] == [
        ("automatic", "gla-lpt"),
        ("equal", "gla-lpt@gla-statex"),
    ]
    assert found[0].time == pytest.approx(0.05)
    assert found[0].memory_gb == pytest.approx(6)
    assert found[1].time == pytest.approx(1.05 / 1.04 - 1)
    assert found[1].memory_gb == pytest.approx(7)
    assert "| equal | +1.0% | +7.0 GB | 24 full |" in price_table(found)
    assert price_table([]) == ""


def test_one_price_where_both_recompute_the_same():
    (price,) = prices([row("gla-lpt", 1.0), row("gla-statex", 1.02)])
    assert price.kind == "automatic and equal"


def test_levels_named_for_all_rows_give_an_equal_price():
    (price,) = prices([row("gla-lpt@full", 1.0, levels="full"), row("gla-statex@full", 1.02, levels="full")])
    assert price.kind == "equal"


def test_equal_asks_only_for_rows_that_are_missing():
    lpt, statex = row("gla-lpt", 1.0), row("gla-statex", 1.05, levels="full")
    assert list(throughput.equal_names([lpt, statex])) == ["gla-lpt@gla-statex"]
    assert list(throughput.equal_names([lpt, row("gla-statex", 1.05)])) == []
    assert list(throughput.equal_names([row("fla-gla-one-head", 2.0)])) == []


def test_levels_are_those_of_a_run():
    assert {*throughput_rows.LEVELS, "auto"} == set(_CHOICES["recompute"])


def test_levels_in_words():
    assert describe(["full", "none", "none"]) == "1 full, 2 none"
    assert split_name("gla-lpt") == ("gla-lpt", "auto")


def test_products_are_as_before_after_a_row():
    before = matmul.products()
    with throughput_rows.products_of(ROWS["gla-lpt-fp8"]):
        assert matmul.products() == "fp8"
    assert matmul.products() == before


def test_out_of_memory_is_said_in_words(monkeypatch):
    def build(name, load):
        return torch.nn.Linear(1, 1), ["full"] * 24

    def run_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(throughput, "build", build)
    monkeypatch.setattr(throughput, "_timed_row", run_out)
    with pytest.raises(throughput.DoesNotFitError, match=r"1 x 262,144 tokens, recomputed: 24 full.*84.9 GB"):
        throughput.measure("gla-lpt", Load(262144, 1, 84.9e9), 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the whole benchmark")
def test_without_a_gpu_it_says_so(capsys):
    assert throughput.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
