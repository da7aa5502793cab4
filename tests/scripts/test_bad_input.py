"""Bad input ends before training: one clear line, exit status 2, nothing written."""

import json
from pathlib import Path

import pytest

from tests.scripts.conftest import script, write_corpus


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
    ],
)
def test_arguments(tiny, tmp_path, argument, answer):
    assert answer in refused(tiny, tmp_path, argument)


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
