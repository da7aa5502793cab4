"""A corpus, a tokenizer and a model shape small enough for runs of a second."""

import json
import random
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Folder with corpus/, tokenizer/ and model.json."""
    folder = tmp_path_factory.mktemp("world")
    write_corpus(folder / "corpus")
    write_tokenizer(folder / "tokenizer")
    shape = {
        "model_type": "statex_gla", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2,
        "num_heads": 2, "expand_k": 0.5, "expand_v": 1.0, "hidden_ratio": 4, "intermediate_size": 32,
        "norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(shape))
    return folder


@pytest.fixture
def arguments(world, tmp_path) -> list[str]:
    """A run of 8 steps of 4 sequences of 32 tokens, saved every 2 steps, below tmp_path/out."""
    return run_arguments(world, tmp_path / "out")


def run_arguments(world: Path, output: Path) -> list[str]:
    keys = {
        "model_name": world / "model.json", "init_from": "scratch", "tokenizer": world / "tokenizer",
        "data_path": world / "corpus", "launch": "cpu", "dtype": "fp32", "max_len": 32, "batch_size": 2,
        "tokens_per_step": 128, "n_train_steps": 8, "n_warmup_steps": 2, "lr": 1e-2, "save_interval": 2,
        "num_workers": 0, "report_to": "none", "output_dir": output, "proj_name": "p", "run_name": "r",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in keys.items()]


def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "out" / "p" / "model" / "r"


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    draw = random.Random(0)
    with (folder / "a.jsonl").open("w") as stream:
        for _ in range(60):
            text = "".join(chr(draw.randrange(97, 123)) for _ in range(draw.randrange(5, 90)))
            stream.write(json.dumps({"text": text, "meta": {}}) + "\n")


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {chr(97 + i): i for i in range(26)} | {"<end>": 26}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
