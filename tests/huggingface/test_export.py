"""Exporting to published layouts (oracle: transformers' own Mamba2), and pushing a folder to the Hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Mamba2ForCausalLM

from huggingface import push as push_module
from huggingface.export import main as export
from huggingface.push import main as push
from models import expand_state, load_pretrained
from tests.models.tiny_models import tiny, tokens

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model"
    tiny("mamba2").save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "state").mkdir()
    (path / "state" / "optimizer.bin").write_bytes(b"0" * 100)
    (path / ".git").mkdir()  # as in a clone
    (path / ".git" / "config").write_text("url = https://user:secret@hub")
    return path


def test_exported_mamba2_is_transformers_mamba2(folder, tmp_path):
    out = tmp_path / "out"
    assert export([f"in={folder}", f"out={out}"]) == 0
    theirs = Mamba2ForCausalLM.from_pretrained(out).eval()
    ours = load_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()).logits, rtol=0, atol=1e-4)
    assert (out / "tokenizer.json").is_file()
    assert not (out / "state").exists()


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_exported_folders_load_bitwise_here(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path / "in")
    assert export([f"in={tmp_path / 'in'}", f"out={tmp_path / 'out'}"]) == 0
    again = load_pretrained(tmp_path / "out")
    assert again.config.layers == model.config.layers
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_export_in_bf16_keeps_decays_in_fp32(folder, tmp_path):
    assert export([f"in={folder}", f"out={tmp_path / 'out'}", "dtype=bfloat16"]) == 0
    mixer = load_pretrained(tmp_path / "out").blocks[0].mixer
    assert (mixer.in_proj.weight.dtype, mixer.A_log.dtype) == (torch.bfloat16, torch.float32)


def test_an_expanded_model_has_no_published_layout(tmp_path, capsys):
    model = tiny("gla")
    expand_state(model, layers=[1])
    model.save_pretrained(tmp_path / "in")
    assert export([f"in={tmp_path / 'in'}", f"out={tmp_path / 'out'}"]) == 2
    assert "layers [1] are expanded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"), [(["dtype=int8"], "dtype='int8' must be one of"), ([], "exists already")]
)
def test_export_says_what_is_wrong(folder, capsys, words, message):
    out = folder.parent / "out" if words else folder
    assert export([f"in={folder}", f"out={out}", *words]) == 2
    assert message in capsys.readouterr().err


def test_dry_run_lists_files_and_shows_the_card(folder, capsys):
    model = load_pretrained(folder)
    expand_state(model, drop_prop=2, drop_mode="extend")
    model.save_pretrained(folder)
    words = [f"folder={folder}", "repo=someone/some-model", "base_model=a/b", "license=mit", "dry_run=true"]
    assert push(words) == 0
    said = capsys.readouterr().out
    assert "  model.safetensors  " in said
    assert "  tokenizer.json  2 bytes" in said
    assert "optimizer.bin" not in said
    assert ".git" not in said
    for part in (
        "base_model: a/b",
        "license: mit",
        "`extend` in layers 0, 2",
        "trust_remote_code=True",
        "dry run: nothing",
    ):
        assert part in said, part
    assert not (folder / "README.md").exists()


def test_a_readme_in_the_folder_is_the_card(folder, capsys):
    (folder / "README.md").write_text("# mine")
    assert push([f"folder={folder}", "repo=someone/some-model", "dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert "its own model card" in said
    assert "trust_remote_code" not in said


def test_push_sends_one_commit_with_the_card(folder, capsys, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, repo, **options):
            calls.append(("create_repo", repo, options))

        def create_commit(self, repo, operations, commit_message):
            calls.append(("create_commit", repo, [operation.path_in_repo for operation in operations]))
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})()

    monkeypatch.setattr(push_module, "HfApi", Hub)
    assert push([f"folder={folder}", "repo=someone/some-model"]) == 0
    assert calls[0] == ("create_repo", "someone/some-model", {"private": True, "exist_ok": True})
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(calls[1][2])
    assert not any(name.startswith("state/") for name in calls[1][2])
    assert "pushed: https://hub/commit/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["repo=nobody"], "must be OWNER/NAME"),
        (["repo=a/b/c"], "repo='a/b/c'"),
        (["repo=a/b", "private=maybe"], "private='maybe' is not true or false"),
    ],
)
def test_push_says_what_is_wrong(folder, capsys, words, message):
    assert push([f"folder={folder}", *words]) == 2
    assert message in capsys.readouterr().err


def test_push_wants_a_model_folder(tmp_path, capsys):
    assert push([f"folder={tmp_path}", "repo=a/b", "dry_run=true"]) == 2
    assert "is no model folder" in capsys.readouterr().err


def test_push_without_network_is_one_line(folder):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "huggingface.push", f"folder={folder}", "repo=someone/some-model"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing was pushed to someone/some-model: ")
    assert done.stderr.count("\n") == 1
