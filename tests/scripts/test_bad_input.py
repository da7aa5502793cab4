"""Bad input ends before training: one clear line, exit status 2, nothing written."""

import json
from pathlib import Path

import pytest

from tests.scripts.conftest import REPOSITORY, script, write_corpus


def refused(tiny: list[str], tmp_path: Path, *arguments: str, name: str = "gla_StateX") -> str:
    """The one line that the script answers; nothing may have been written."""
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    answer = script(name, *tiny, *arguments)
    assert answer.returncode == 2, answer.stderr
    lines = [line for line in answer.stderr.splitlines() if "Setting accelerator" not in line]
    assert len(lines) == 1, answer.stderr
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    return lines[0]


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("drop_porp=6", "did you mean drop_prop?"),
        ("n_train_steps=ten", "n_train_steps=ten: expected a whole number"),
        ("lr=-1", "lr=-1.0"),
        ("max_len=0", "max_len=0: must be at least"),
        ("drop_prop=3", "use one of 1, 2, 4"),
        ("drop_mode=mamba4", "gla, merge, qk_gla, lora_4, extend"),
        ("n_gpus=999", "n_gpus=999"),
        ("scale=huge", "only scale is tiny"),
        ("StateX", "no key=value argument"),
        ("value=3", "unknown key 'value'"),
        ("drop_porp=", "did you mean drop_prop?"),
        ("n_gpus=08", "n_gpus=08: a number of GPUs"),
        ("main_port=http", "main_port=http: a port number"),
    ],
)
def test_arguments(tiny, tmp_path, argument, answer):
    assert answer in refused(tiny, tmp_path, argument)


@pytest.fixture
def fresh_clone(tmp_path) -> Path:
    """The repository by links, without anything that runs wrote."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("train.py", "scripts", "configs", "models", "training", "data"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


@pytest.mark.parametrize(
    ("argument", "status", "answer"),
    [
        ("drop_porp=2", 2, "did you mean drop_prop?"),
        ("drop_prop=3", 2, "use one of 1, 2, 4"),
        ("plan=true", 0, "state elements"),
    ],
)
def test_no_corpus_is_made_for_wrong_arguments_or_a_plan(fresh_clone, argument, status, answer):
    said = script("gla_StateX", "scale=tiny", argument, folder=fresh_clone)
    assert said.returncode == status
    assert answer in said.stdout + said.stderr
    assert not (fresh_clone / "output").exists()


def test_own_text_needs_no_quickstart_corpus(fresh_clone, corpus, tmp_path):
    own = [f"data_path={corpus / 'train'}", f"tokenizer={corpus / 'tokenizer'}", "validate_only=true"]
    said = script("gla_LPT", "scale=tiny", *own, folder=fresh_clone)
    assert said.returncode == 0, said.stderr
    assert not (fresh_clone / "output").exists()


def test_config_that_is_not_json(tiny, tmp_path):
    config = tmp_path / "broken.json"
    config.write_text("lr: 3e-4")
    assert "is not readable JSON" in refused(tiny, tmp_path, f"train_config={config}")


def test_model_folder_without_weights(tiny, tmp_path):
    shape = json.loads(Path("configs/models/gla-tiny.json").read_text())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    assert "holds no weights" in refused(tiny, tmp_path, f"ckpt_path={folder}")


def test_tokenizer_larger_than_the_vocabulary(tiny, tmp_path):
    shape = json.loads(Path("configs/models/gla-tiny.json").read_text())
    (tmp_path / "small.json").write_text(json.dumps({**shape, "vocab_size": 100}))
    answer = refused(tiny, tmp_path, f"model_name={tmp_path / 'small.json'}")
    assert "512 tokens, the model's vocabulary only 100" in answer


def test_corpus_of_one_short_document(tiny, tmp_path):
    folder = write_corpus(tmp_path / "short", ["x = 1\n"])
    assert "short" in refused(tiny, tmp_path, f"data_path={folder}")


def test_output_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert "cannot be written" in refused(tiny, tmp_path, f"output_dir={tmp_path / 'file' / 'output'}")


def test_second_run_into_the_same_output(tiny, tmp_path):
    folder = tmp_path / "output" / "statex" / "gla-tiny" / "again"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text("{}")
    answer = refused(tiny, tmp_path, "run_name=again")
    assert "resume=auto goes on with it, another run_name starts a new one" in answer


def test_no_gpu_names_both_ways_out(tmp_path):
    answer = refused([f"output_dir={tmp_path}"], tmp_path)
    assert "no GPU is visible" in answer
    assert "machine with GPUs" in answer
    assert "scale=tiny" in answer
