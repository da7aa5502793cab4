"""Every kind of bad input: one clear line, exit status 2, nothing written."""

import json

import pytest

import train
from models import build_model
from tests.training.conftest import run_arguments
from training.config import parse_arguments
from training.plan import make_plan
from training.validate import main as validate


def refused(capsys, arguments: list[str]) -> str:
    assert validate(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def change(arguments: list[str], **keys) -> list[str]:
    return [
        *(text for text in arguments if text.partition("=")[0] not in keys),
        *(f"{k}={v}" for k, v in keys.items()),
    ]


@pytest.fixture
def start(world, tmp_path) -> list[str]:
    return run_arguments(world, tmp_path / "out")


@pytest.fixture(autouse=True)
def nothing_written(tmp_path):
    yield
    assert not (tmp_path / "out").exists()


def test_a_good_configuration_passes_and_writes_nothing(start):
    assert validate(start) == 0


def test_a_wrong_drop_prop_lists_the_divisors(start, capsys):
    assert "use one of 1, 2" in refused(capsys, change(start, drop_prop=3))


def test_a_wrong_mode_lists_the_modes_of_the_family(start, capsys):
    said = refused(capsys, change(start, drop_prop=2, drop_mode="mamba4"))
    assert all(mode in said for mode in ("gla", "merge", "qk_gla", "lora_4", "extend"))


def test_arguments_are_checked_before_any_checkpoint_is_opened(start, capsys):
    said = refused(capsys, change(start, drop_prop=3, init_from="pretrained", ckpt_path="/nowhere"))
    assert "drop_prop=3" in said


def test_an_unknown_model_lists_the_shapes(start, capsys):
    assert "gla-1.3B" in refused(capsys, change(start, model_name="gla-7B"))


def test_a_model_folder_without_weights_is_refused(start, capsys, tmp_path, world):
    folder = tmp_path / "empty"
    arguments = change(start, init_from="pretrained", ckpt_path=folder)
    assert "no such folder" in refused(capsys, arguments)
    folder.mkdir()
    assert "no config.json" in refused(capsys, arguments)
    (folder / "config.json").write_text((world / "model.json").read_text())
    assert "no weights" in refused(capsys, arguments)


def test_a_weight_file_that_was_cut_short_is_refused_before_a_run_is_launched(start, capsys, tmp_path):
    build_model("configs/models/gla-tiny.json", num_hidden_layers=2).save_pretrained(tmp_path / "weights")
    weights = tmp_path / "weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()  # transformers' progress bar
    asked = change(start, init_from="pretrained", ckpt_path=tmp_path / "weights", model_name="mine")
    assert "model.safetensors cannot be read" in refused(capsys, asked)


def test_weights_of_another_shape_than_the_model_name_says_are_refused(start, capsys, tmp_path):
    build_model("configs/models/gla-tiny.json", num_hidden_layers=2).save_pretrained(tmp_path / "weights")
    capsys.readouterr()  # transformers' progress bar
    asked = change(start, init_from="pretrained", ckpt_path=tmp_path / "weights", model_name="gla-tiny")
    assert "num_hidden_layers differs" in refused(capsys, asked)
    assert validate(change(asked, model_name="mine", drop_prop="none")) == 0


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(start, capsys, tmp_path, world):
    shape = json.loads((world / "model.json").read_text()) | {"vocab_size": 20}
    (tmp_path / "small.json").write_text(json.dumps(shape))
    said = refused(capsys, change(start, model_name=tmp_path / "small.json"))
    assert "27 tokens" in said
    assert "only 20" in said


def test_a_missing_tokenizer_is_refused(start, capsys, tmp_path):
    assert "tokenizer" in refused(capsys, change(start, tokenizer=tmp_path / "nowhere"))
    assert "give tokenizer=FOLDER" in refused(capsys, [a for a in start if "tokenizer" not in a])


def test_a_missing_empty_or_short_corpus_is_refused(start, capsys, tmp_path):
    folder = tmp_path / "corpus"
    arguments = change(start, data_path=folder)
    assert str(folder) in refused(capsys, arguments)
    folder.mkdir()
    assert str(folder) in refused(capsys, arguments)
    (folder / "a.jsonl").write_text('{"text": "abc"}\n')
    assert "too small" in refused(capsys, arguments)


def test_a_missing_held_out_corpus_is_refused(start, capsys, tmp_path):
    assert "validation_data_path" in refused(capsys, change(start, validation_data_path=tmp_path / "nowhere"))


def test_a_held_out_corpus_without_text_is_refused(start, capsys, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    said = refused(capsys, change(start, validation_data_path=tmp_path / "a.jsonl"))
    assert "validation_data_path" in said
    assert "no document with text" in said


def test_a_run_name_too_long_for_a_folder_is_refused(start, capsys, tmp_path):
    (tmp_path / "other" / "p" / "model").mkdir(parents=True)
    said = refused(capsys, change(start, output_dir=tmp_path / "other", run_name="x" * 300))
    assert "cannot be written" in said
    assert "run_name" in said


def test_an_output_that_is_a_file_is_refused(start, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, change(start, output_dir=tmp_path / "file"))


def test_a_second_run_into_the_same_folder_is_told_both_ways_out(start, capsys, tmp_path):
    folder = tmp_path / "other" / "p" / "model" / "r"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text("{}")
    said = refused(capsys, change(start, output_dir=tmp_path / "other"))
    assert "resume=auto" in said
    assert "another run_name" in said
    assert list(folder.iterdir()) == [folder / "args.json"]


def test_checkpoints_without_args_json_are_a_run_too(start, capsys, tmp_path):
    (tmp_path / "other" / "p" / "model" / "r" / "ckpt_2").mkdir(parents=True)
    assert "holds a run already" in refused(capsys, change(start, output_dir=tmp_path / "other"))


@pytest.mark.parametrize("content", ["{", "", "[1]"])
def test_an_args_json_that_is_none_is_named(start, capsys, tmp_path, content):
    folder = tmp_path / "other" / "p" / "model" / "r"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(content)
    said = refused(capsys, change(start, output_dir=tmp_path / "other", resume="auto"))
    assert f"{folder / 'args.json'} is no readable JSON" in said


def test_resuming_with_another_model_is_refused(start, capsys, tmp_path):
    folder = tmp_path / "other" / "p" / "model" / "r"
    folder.mkdir(parents=True)
    from training.config import to_json

    arguments = change(start, output_dir=tmp_path / "other", resume="auto")
    (folder / "args.json").write_text(json.dumps(to_json(parse_arguments(arguments))))
    assert validate(arguments) == 0
    said = refused(capsys, change(arguments, drop_prop=2))
    assert "started with drop_prop=None" in said


def test_a_gpu_launch_without_gpus_says_both_ways_out(start, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    said = refused(capsys, change(start, launch="zero1"))
    assert "launch=cpu" in said


def test_a_level_of_recomputation_that_the_model_lacks_is_refused(start, capsys):
    said = refused(capsys, change(start, model_name="mamba2-tiny", recompute="mlp"))
    assert "this model offers auto, none" in said


def test_a_tracker_that_is_not_installed_is_refused(start, capsys):
    pytest.importorskip("tensorboard")
    said = refused(capsys, change(start, report_to="swanlab"))
    assert "pip install swanlab" in said


@pytest.mark.parametrize("arguments", [["lrr=1"], ["lr=-1"], ["max_len=0"], ["train_config=nowhere"]])
def test_train_py_answers_2_as_well(capsys, arguments):
    assert train.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_plan_of_the_published_recipe_needs_nothing(capsys):
    recipe = "train_config=configs/training/drop/10b_bsz-512k_64k_cos_3e-4_slimpj.json"
    arguments = [recipe, "init_from=scratch", "drop_prop=6", "n_gpus=8", "plan=true"]
    assert train.main(arguments) == 0
    said = capsys.readouterr().out
    # the paper's state sizes and the published recipe
    assert "12,582,912 -> 18,874,368 (1.50x)" in said
    assert "1,365,514,240" in said
    assert "524,288 = 8 x 1 sequence(s) x 65,536 tokens x 1 micro-batch(es)" in said
    assert "20,000" in said
    assert "10,485,760,000" in said


def test_the_plan_for_one_gpu_says_what_a_plain_launch_saves():
    start = ["model_name=gla-1.3B", "init_from=scratch", "plan=true"]
    plans = {
        (launch, gpus): str(make_plan(parse_arguments([*start, f"launch={launch}"]), gpus))
        for launch, gpus in (("zero1", 1), ("zero1", 8), ("ddp", 1))
    }
    assert ["launch=ddp" in plan for plan in plans.values()] == [True, False, False]


def test_the_plan_counts_what_trains(world, tmp_path):

    start = run_arguments(world, tmp_path / "out")
    whole = make_plan(parse_arguments([*start, "drop_prop=2"]), 1)
    frozen = make_plan(parse_arguments([*start, "drop_prop=2", "freeze_rest=true"]), 1)
    assert whole.trained_parameters == whole.after.total_parameters > frozen.trained_parameters > 0
    assert frozen.checkpoint_bytes < whole.checkpoint_bytes
