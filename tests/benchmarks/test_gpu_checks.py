"""What the GPU checks do without a GPU: their cases, their arguments, and what they count."""

import time
from concurrent.futures import Future

import pytest
import torch

from benchmarks import gpu_check_backends as backends
from benchmarks import gpu_check_gla, gpu_check_ssd
from models.command_line import run_command


def test_optional_backends_are_checked_at_all_lengths_plain_and_packed():
    labels = [label for group in backends.groups(list(backends.PACKAGES)) for label, _ in group]
    assert len(labels) == len(set(labels))
    for name in ("chunk_gla 2x256x512", "chunk_gla 1x1024x2048", "mamba_ssm 128", "mamba_ssm 512"):
        for dtype in ("bfloat16", "float32"):
            mine = [label for label in labels if label.startswith(name) and dtype in label]
            lengths = {int(label.split("T=")[1].split()[0]) for label in mine}
            assert lengths == {1, 63, 64, 65, 1000, 8192}, name
            assert sum("packed=True" in label for label in mine) == 5


def test_a_case_that_fails_is_counted_and_the_others_go_on(capfd):
    def broken() -> int:
        raise RuntimeError("no kernel")

    class OutOfResources(RuntimeError):  # noqa: N818  what triton calls it
        pass

    def too_large() -> int:
        raise OutOfResources("shared memory")

    cases = [("first", broken), ("second", too_large), ("third", lambda: 1), ("fourth", lambda: 0)]
    assert backends.run_group(cases, time.time() + 60) == (2, 0)
    printed = capfd.readouterr().out
    assert "FAIL first RuntimeError: no kernel" in printed
    assert "none second" in printed
    assert backends.run_group(cases, 0) == (0, 4)
    assert "left out fourth" in capfd.readouterr().out


def test_wrong_arguments_are_named(capsys):
    assert run_command(backends.Arguments, backends.act, ["only=flax"]) == 2
    assert "only=flax" in capsys.readouterr().err


def done(rows: list[str] | Exception) -> Future:
    job = Future()
    job.set_exception(rows) if isinstance(rows, Exception) else job.set_result(rows)
    return job


def test_gla_rows_that_fail_are_counted_for_our_kernels(capsys):
    jobs = [
        ("triton-bf16", done(["triton a  ok", "triton b  FAIL"])),
        ("triton-bf16", done(RuntimeError("no kernel"))),
        ("fla-bf16", done(["fla a  FAIL"])),
        ("fla-bf16", done(RuntimeError("not there"))),
    ]
    assert gpu_check_gla.section("errors", lambda: gpu_check_gla.print_errors(jobs)) == 2
    assert gpu_check_gla.section("times", lambda: None) == 0
    assert gpu_check_gla.section("broken", lambda: 1 / 0) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["sections=eror", "groups=triton", "second=3"])
def test_gla_checks_name_what_they_do_not_know(word, capsys):
    assert run_command(gpu_check_gla.Arguments, gpu_check_gla.act, [word]) == 2
    assert word.split("=")[0] in capsys.readouterr().err


def test_an_ssd_section_that_fails_or_finds_no_time_is_counted(capsys):
    late = time.time() + 60
    assert gpu_check_ssd.section(late, "fine", lambda: None) == 0
    assert gpu_check_ssd.section(late, "two", lambda: 2) == 2
    assert gpu_check_ssd.section(late, "broken", lambda: 1 / 0) == 1
    assert gpu_check_ssd.section(0, "late", lambda: 0) == 1
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize(("failures", "status"), [(0, 0), (3, 1)])
def test_the_ssd_checks_end_with_their_status(failures, status, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu_check_ssd, "warm_compiler_cache", lambda: None)
    for name in ("check_packed", "check_conv", "time_whole", "time_conv", "time_pieces"):
        monkeypatch.setattr(gpu_check_ssd, name, lambda *given, name=name: begun.append((name, *given)))
    monkeypatch.setattr(gpu_check_ssd, "check_ssd", lambda *_: failures)
    assert run_command(gpu_check_ssd.Arguments, gpu_check_ssd.act, ["quick=true"]) == status
    assert ("time_whole", "triton", 512) in begun
    assert not any(name == "time_pieces" for name, *_ in begun)
    assert run_command(gpu_check_ssd.Arguments, gpu_check_ssd.act, []) == status
    assert ("time_pieces", 512, 256) in begun
    assert run_command(gpu_check_ssd.Arguments, gpu_check_ssd.act, ["quik=true"]) == 2
    assert "did you mean quick?" in capsys.readouterr().err


def test_ssd_checks_run_every_case(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_check_ssd, "check_ssd_case", lambda *case: seen.append(case) or 1)
    dtypes = (torch.bfloat16, torch.float32)
    assert gpu_check_ssd.check_ssd(("triton",), (128, 512), dtypes, (1, 63)) == 12
    assert (("triton",), 512, torch.float32, 63, True) in seen
    assert not any(length == 1 and packed for *_, length, packed in seen)


@pytest.mark.parametrize("word", ["none", "FAIL"])
def test_only_a_package_may_lack_a_kernel(word, monkeypatch, capsys):
    class OutOfResources(RuntimeError):  # noqa: N818
        pass

    def raising(*arguments):
        raise OutOfResources("shared memory")

    monkeypatch.setattr(gpu_check_ssd, "gradients_of", raising)
    backend = {"none": "mamba_ssm", "FAIL": "triton"}[word]
    good = gpu_check_ssd.compare("label", None, None, {}, backend, torch.float32)
    assert good is (word == "none")
    assert capsys.readouterr().out.startswith(word)
