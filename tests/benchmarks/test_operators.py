"""The operator benchmark: every case runs, its inputs get gradients, and its table is one."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import operators
from benchmarks.operator_cases import Case, cases

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs on the GPU")
CASES = {f"{case.operator}, {case.shape}": case for case in cases()}
SMALL = [name for name, case in CASES.items() if "words" not in case.shape]  # a head of 2048 x 32000 is slow


@on_cpu
@pytest.mark.parametrize("name", SMALL)
def test_every_case_gives_rows_for_both_passes(name, monkeypatch):
    def once(call: Callable[[], object], repeats: int = 7) -> float:
        call()
        return 1.0

    monkeypatch.setattr(operators, "milliseconds", once)
    rows = operators.measure(CASES[name], "ours", 16)
    assert [row.part for row in rows] == ["forward", "backward"]
    # at a millisecond, a GB/s is a megabyte
    assert rows[0].gbs == pytest.approx(16 * CASES[name].forward.moved / 1e6)


@pytest.mark.parametrize("name", CASES)
def test_least_bytes_are_those_of_inputs_and_outputs(name):
    """The forward pass reads its inputs and writes as many outputs as the count leaves room for."""
    case, tokens = CASES[name], 8

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype).requires_grad_()

    inputs = case.inputs(draw, tokens).values()
    read = sum(x.nbytes for x in inputs if tokens in x.shape[:2]) / tokens
    assert 0.4 * case.forward.moved < read < case.forward.moved or case.backward is None
    assert case.backward is None or case.backward.moved >= case.forward.moved


def test_work_of_known_shapes():
    gla = CASES["GLA, four heads, K=256, V=512"]
    assert gla.forward.flops == 4 * 4 * 256 * 512
    ssd = CASES["SSD, 64 heads of 64, N=512"]
    assert ssd.forward.flops == 4 * 64 * 64 * 512
    assert ssd.backward.flops == 2 * ssd.forward.flops


def test_operators_and_implementations_are_chosen_by_name():
    work = operators.chosen(operators.Arguments(operators="gla,ssd", implementations="ours"))
    assert [cases()[index].operator for index, _ in work] == ["GLA", "GLA", "SSD", "SSD"]
    with pytest.raises(ValueError, match="none begins with 'gal'"):
        operators.chosen(operators.Arguments(operators="gal"))
    with pytest.raises(ValueError, match="'theirs' is unknown"):
        operators.chosen(operators.Arguments(implementations="theirs"))


def test_one_case_that_fails_does_not_stop_the_others(monkeypatch):
    def measure(case: Case, implementation: str, tokens: int) -> list[operators.Row]:
        if implementation == "fla":
            raise RuntimeError("no such kernel\nat all")
        return []

    monkeypatch.setattr(operators, "measure", measure)
    found = list(operators.measure_all([(0, "fla"), (0, "ours")], [64], until=float("inf")))
    assert found[0]["error"] == "RuntimeError: no such kernel"
    assert found[1] == []
    (late,) = operators.measure_all([(0, "ours")], [64], until=0)
    assert late["error"] == "no time left"


def test_table_has_one_width():
    ceilings = operators.Ceilings(800.0, 4000.0)
    rows = [
        operators.Row("GLA", "four heads", 65536, "ours", "forward", 1.25, 400.0, 2000.0, None),
        operators.Row("SwiGLU", "5632", 65536, "ours", "backward", 2.0, 0.0, 3000.0, 1.4),
    ]
    lines = [*operators.header(ceilings).splitlines(), *(operators.line(row, ceilings) for row in rows)]
    assert len({line.count("|") for line in lines}) == 1
    assert "| 1.250 | 400 | 50% | 2000 | 50% |  |" in lines[2]
    assert "| 2.000 |  |  | 3000 | 75% | 1.4 |" in lines[3]


@on_cpu
def test_the_record_says_what_could_not_be_measured(tmp_path, capsys):
    output = tmp_path / "operators.json"
    operators.act(operators.Arguments(lengths="16", operators="residual", output=str(output)))
    record = json.loads(output.read_text())
    assert {row["implementation"] for row in record["rows"]} == {"ours"}
    assert [failure["implementation"] for failure in record["failures"]] == ["fla"]
    assert "not measured: residual + RMS norm" in capsys.readouterr().out
