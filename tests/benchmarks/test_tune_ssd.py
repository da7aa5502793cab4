"""The search for settings of the SSD kernels, with launches that only pretend to run."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from benchmarks import tune_kernels, tune_ssd
from models.ops.ssd_triton_shape import CONFIGS


@pytest.fixture
def pretended(interpreter, monkeypatch, tmp_path):
    """Times, wrong and broken settings; returns the function that tunes and gives what it wrote."""
    times, wrong, broken = {}, [], []
    shape = SimpleNamespace(config={k: dict(v) for k, v in CONFIGS[2].items()}, head_dim=64)

    def launch(kernel):
        settings = shape.config[kernel]
        if settings in broken:
            raise RuntimeError("out of shared memory")
        return torch.full((2,), float("nan") if settings in wrong else 1.0)

    made = SimpleNamespace(shape=shape, launches=lambda: {"march": [lambda: launch("march")]})

    def milliseconds(launched, repeats):
        launched()
        return times.get(json.dumps(shape.config["march"]), 1.0)

    monkeypatch.setattr(tune_ssd, "pieces", lambda state_size, tokens: made)
    monkeypatch.setattr(tune_ssd, "milliseconds", milliseconds)
    monkeypatch.setattr(tune_ssd, "processes", lambda workers: ThreadPoolExecutor(1))
    monkeypatch.setattr(tune_kernels, "gpu_name", lambda _: "a-gpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setenv("STATEX_KERNEL_CONFIGS", str(tmp_path / "used"))

    def tune(seconds=60.0):
        tune_ssd.tune([512], tmp_path, time.time() + seconds, 1)
        path = tmp_path / "a-gpu" / "ssd.json"
        return json.loads(path.read_text()) if path.is_file() else None

    used = dict(CONFIGS[2]["march"])
    faster = next(one for one in tune_ssd.candidates("march", used, 512) if one["STAGES"] == 3)
    return tune, times, wrong, broken, used, faster


def test_the_fastest_that_computes_the_same_is_written(pretended, capsys):
    tune, times, wrong, broken, used, faster = pretended
    wrong.append(used | {"STAGES": 2})
    broken.append(used | {"STAGES": 5})
    for settings, taken in ((wrong[0], 0.1), (broken[0], 0.1), (faster, 0.5)):
        times[json.dumps(settings)] = taken
    assert tune() == {"P64-N512-16bit": {"march": faster}}
    said = capsys.readouterr().out
    assert "computes something else" in said
    assert "out of shared memory" in said


def test_settings_in_use_stay_where_nothing_is_faster(pretended):
    tune, times, *_, faster = pretended
    times[json.dumps(faster)] = 0.995
    assert tune() is None


def test_no_time_no_result(pretended, capsys):
    tune, *_ = pretended
    assert tune(seconds=0) is None
    assert "out of time" in capsys.readouterr().out


def test_candidates_fit_the_state_and_exist():
    for kernel in tune_ssd.CANDIDATES:
        used = CONFIGS[2][kernel]
        found = tune_ssd.candidates(kernel, used, 64)
        assert found[0] == used
        assert all(one.get("BLOCK_N", 0) <= 64 for one in found[1:])
        assert all(set(one) == set(used) for one in tune_ssd.candidates(kernel, used, 512))
