"""Configuration: precedence, messages, and the files in configs/training."""

import json
from pathlib import Path

import pytest

from training.config import REPOSITORY, ConfigError, parse_arguments, to_json
from training.rules import accumulation, slots_per_step

PUBLISHED = "configs/training/drop/10b_bsz-512k_64k_cos_3e-4_slimpj.json"


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_arguments(arguments)
    message = str(raised.value)
    assert "\n" not in message
    return message


def write_json(folder: Path, text: str) -> str:
    (folder / "run.json").write_text(text)
    return str(folder / "run.json")


def test_command_line_rules_over_json_and_json_over_default(tmp_path):
    file = write_json(tmp_path, '{"lr": 0.1, "seed": 3}')
    config = parse_arguments([f"train_config={file}", "--seed=4"])
    assert (config.lr, config.seed, config.beta1) == (0.1, 4, 0.9)


def test_both_spellings_of_an_argument_mean_the_same():
    assert parse_arguments(["--lr=0.5"]).lr == parse_arguments(["lr=0.5"]).lr == 0.5
    assert parse_arguments(["--plan"]).plan


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("learning_rat=1", ["learning_rat", "did you mean"]),
        ("drop_pro=6", ["did you mean drop_prop?"]),
        ("lr=fast", ["lr=fast", "number"]),
        ("lr=-1", ["lr=-1.0", "above 0"]),
        ("lr=nan", ["lr=nan"]),
        ("max_len=0", ["max_len=0", "at least 2"]),
        ("n_train_steps=1.5", ["n_train_steps=1.5", "whole number"]),
        ("freeze_rest=maybe", ["freeze_rest=maybe", "true or false"]),
        ("layers=1,x", ["layers=1,x", "whole numbers"]),
        ("launch=zero4", ["launch=zero4", "zero1, zero2, zero3, ddp, cpu"]),
        ("lr_scheduler=linear", ["cosine, constant, wsd, cosine_restarts"]),
        ("report_to=mlflow", ["tensorboard, wandb, swanlab, trackio"]),
        ("train_config=nowhere.json", ["no such file", PUBLISHED]),
        ("run_name=a/b", ["run_name=a/b"]),
        ("oops", ["oops", "key=value"]),
        ("--lr", ["lr=VALUE"]),
        ("lr=", ["lr="]),
        ("beta2=1", ["beta2=1.0", "below 1"]),
        ("n_warmup_steps=30000", ["n_train_steps=20000"]),
        ("drop_mode=gla", ["give drop_prop or layers"]),
        ("tokens_per_step=1000", ["multiple of max_len"]),
    ],
)
def test_a_wrong_argument_names_the_key_and_what_is_allowed(argument, words):
    message = refused(argument)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["drop_prop=6", "layers=0,1"], "exclude each other"),
        (["init_from=scratch", "ckpt_path=x"], "reads no weights"),
        (["n_decay_steps=5"], "wsd"),
        (["lr_scheduler=cosine_restarts", "n_train_steps=9", "n_warmup_steps=2"], "7 come after the warm-up"),
        (["grad_accum_steps=2", "tokens_per_step=131072"], "exclude each other"),
        (["min_lr=1", "lr=0.1"], "min_lr"),
        (["launch=ddp", "grad_comm_dtype=bf16"], "zero1"),
        (["tokens_per_step=131072", "n_gpus=3"], "do not divide"),
    ],
)
def test_impossible_combinations_are_refused(arguments, words):
    assert words in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{lr: 1}", "readable JSON"),
        ("[1]", "JSON object"),
        ('{"lrr": 1}', "did you mean lr?"),
        ('{"lr": "1"}', "expected a number"),
        ('{"seed": true}', "expected a whole number"),
        ('{"plan": true}', "belongs on the command line"),
    ],
)
def test_a_wrong_json_file_is_refused_by_name(tmp_path, text, words):
    file = write_json(tmp_path, text)
    message = refused(f"train_config={file}")
    assert words in message
    assert "run.json" in message


def test_the_published_file_holds_the_published_values():
    values = json.loads((REPOSITORY / PUBLISHED).read_text())
    published = {
        "data_name": "slimpj", "data_path": "/home/data/slimpj-chunked", "validation_data_name": None,
        "validation_data_path": None, "max_len": 65536, "batch_size": 1, "grad_accum_steps": 1, "min_lr": 0,
        "lr_scheduler": "cosine", "lr": 3e-4, "n_train_steps": 20000, "n_warmup_steps": 1000,
        "grad_clip": 1.0, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "save_interval": 1000,
        "log_interval": 1, "compile": 0, "dtype": "bf16", "seed": 0,
    }  # fmt: skip
    assert {key: values[key] for key in published} == published


@pytest.mark.parametrize("n_gpus", [1, 2, 4, 8])
def test_the_published_file_keeps_524288_tokens_a_step_on_any_number_of_gpus(n_gpus):
    config = parse_arguments([f"train_config={PUBLISHED}"])
    assert accumulation(config, n_gpus) == 8 // n_gpus
    assert slots_per_step(config, n_gpus) * config.max_len == 524_288


def test_accumulation_on_the_command_line_rules_over_tokens_per_step_of_the_file():
    config = parse_arguments([f"train_config={PUBLISHED}", "grad_accum_steps=3"])
    assert accumulation(config, 2) == 3


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "configs" / "training").rglob("*.json")), ids=lambda f: f.stem
)
def test_every_file_in_configs_training_is_valid(file):
    parse_arguments([f"train_config={file}"])


def test_args_json_starts_the_same_run_again(tmp_path):
    config = parse_arguments(
        [f"train_config={PUBLISHED}", "drop_prop=6", "layers=none", "lr=1e-3", "report_to=none"]
    )
    file = write_json(tmp_path, json.dumps(to_json(config)))
    again = parse_arguments([f"train_config={file}"])
    assert to_json(again) == to_json(config)


def test_a_run_without_a_name_is_named_after_method_and_file():
    assert parse_arguments([f"train_config={PUBLISHED}"]).run_name == f"LPT_{Path(PUBLISHED).stem}"
    config = parse_arguments([f"train_config={PUBLISHED}", "drop_prop=6", "drop_mode=extend"])
    assert config.run_name == f"StateX_prop6_extend_{Path(PUBLISHED).stem}"
