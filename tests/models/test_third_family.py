"""A third family is one file: a copy of models/ with retention.py added does everything the others do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HERE = """
import torch
from models import build_model, expand_state, load_pretrained
shape = {"model_type": "statex_retention", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
model = build_model(shape, seed=1, num_heads=2)
ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
before = model(ids).logits
report = expand_state(model, drop_prop=2, seed=1)
assert report.after.total_elements == 2 * 16 * 16 + 2 * 64 * 16, report
assert (model(ids).logits - before).abs().max() < 1e-5
model(ids, labels=ids).loss.backward()
assert torch.equal(model.generate(ids, max_new_tokens=4)[:, :9], ids)
model.save_pretrained("folder")
torch.save((ids, model(ids).logits), "expected.pt")
assert torch.equal(load_pretrained("folder")(ids).logits, model(ids).logits)
from models.expansion_command import main
assert main(["in=folder", "out=more", "layers=1", "expand_factor=2"]) == 0
"""
ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM
ids, expected = torch.load("expected.pt")
model = AutoModelForCausalLM.from_pretrained("folder", trust_remote_code=True)
assert "models" not in sys.modules
assert torch.equal(model(ids).logits, expected)
"""


@pytest.fixture
def repository(tmp_path) -> Path:
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "tests/models/retention.py", tmp_path / "models/retention.py")
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "cache"), "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_one_file_builds_expands_trains_generates_saves_and_loads_anywhere(repository):
    here = run(repository, "-c", HERE)
    assert here.returncode == 0, here.stderr
    (repository / "models").rename(repository / "gone")
    elsewhere = run(repository, "-c", ELSEWHERE)
    assert elsewhere.returncode == 0, elsewhere.stderr
