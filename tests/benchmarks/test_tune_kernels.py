"""The search for kernel settings: what it tries, keeps and writes, with kernels that only pretend to run."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks import tune_kernels
from models.ops.gla_triton_settings import default

SHAPE = (4, 256, 512)


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Times and results by settings; returns the function that tunes, and the file it writes."""
    times, wrong, broken = {}, [], []
    launched = threading.local()  # those that only compile run in other threads meanwhile

    def kernel_calls(tokens, H, K, V, settings, real=True):
        def call(kernel):
            values = tuple(settings[kernel][name] for name in tune_kernels.FIELDS[kernel])
            if values in broken:
                raise RuntimeError("out of shared memory")
            launched.last = values
            return torch.full((2,), float("nan") if values in wrong else 1.0)

        return {kernel: lambda kernel=kernel: call(kernel) for kernel in tune_kernels.FIELDS}

    def pretended_call(call, repeats):
        call()
        return times.get(launched.last, 1.0)

    monkeypatch.setattr(tune_kernels, "kernel_calls", kernel_calls)
    monkeypatch.setattr(tune_kernels, "time_call", pretended_call)
    monkeypatch.setattr(tune_kernels, "comparable", lambda kernel, result, chunk: [result])
    monkeypatch.setattr(tune_kernels, "measure_kernels", lambda *_: [])
    monkeypatch.setattr(tune_kernels, "gpu_name", lambda _: "a-gpu")
    monkeypatch.setattr(tune_kernels, "processes", ThreadPoolExecutor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setenv("STATEX_KERNEL_CONFIGS", str(tmp_path / "used"))

    def tune(seconds=60.0):
        tune_kernels.tune({SHAPE: default(*SHAPE)}, 1024, tmp_path, time.time() + seconds, 1)
        path = tmp_path / "a-gpu" / "gla.json"
        return json.loads(path.read_text()) if path.is_file() else None

    return tune, times, wrong, broken, tmp_path


def test_candidates_begin_with_what_is_used_and_fit_the_chunk():
    base = default(*SHAPE)
    base["chunk"]["size"] = 64
    found = tune_kernels.candidates("intra_backward", SHAPE, base)
    assert found[0] == base["intra_backward"]
    assert len(found) > 2
    assert all(one["BM"] <= 64 for one in found[1:])
    assert len({str(one) for one in found}) == len(found)


def test_the_winner_is_laid_over_the_file_in_use(pretended):
    tune, times, _, _, folder = pretended
    used = folder / "used" / "a-gpu" / "gla.json"
    used.parent.mkdir(parents=True)
    used.write_text(json.dumps({"K1-V1-H1-16bit": {"chunk": {"size": 64}}}))
    times[64, 32, 8, 1, 128] = 0.5
    times[32, 2, 2] = 0.995  # too little to leave the settings in use for
    won = {"BM": 64, "BK": 32, "num_warps": 8, "num_stages": 1, "maxnreg": 128}
    kept = {"K1-V1-H1-16bit": {"chunk": {"size": 64}}}
    assert tune() == {**kept, "K256-V512-H4-16bit": {"intra_backward": won}}


def test_a_fast_setting_with_wrong_results_or_none_does_not_win(pretended, capsys):
    tune, times, wrong, broken, _ = pretended
    wrong.append((64, 32, 8, 1, 128))
    broken.append((64, 32, 4, 1, None))
    times |= {(64, 32, 8, 1, 128): 0.1, (64, 32, 4, 1, None): 0.1, (64, 16, 4, 1, None): 0.9}
    assert tune()["K256-V512-H4-16bit"]["intra_backward"]["BK"] == 16
    said = capsys.readouterr().out
    assert "computes something else" in said
    assert "out of shared memory" in said


def test_it_ends_when_its_time_is_over(pretended, capsys):
    tune, times, *_ = pretended
    times[64, 32, 8, 1, 128] = 0.5
    assert tune(seconds=-1.0) is None
    assert "out of time" in capsys.readouterr().out


def test_processes_at_work_are_ended():
    begin = time.time()
    with tune_kernels.processes(1) as pool:
        pool.submit(time.sleep, 300)
        time.sleep(1)
    assert time.time() - begin < 30


def test_only_scores_that_a_kernel_promises_are_compared():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 128, 2, 64, generator=draw)
    behind = (torch.arange(64)[None, :] > torch.arange(64)[:, None]).repeat(2, 1)[
        None, :, None
    ]  # a key is ahead
    spoiled = torch.where(behind, float("nan"), scores)
    got, want = (tune_kernels.comparable("dscores", x, 64) for x in (spoiled, scores))
    torch.testing.assert_close(got, want)
    assert tune_kernels.difference([got], [want]) == 0.0
    assert tune_kernels.difference([tune_kernels.comparable("march", (spoiled, None), 64)], [[scores]]) != 0.0
