"""What a person types: the scripts in a process of their own, on a corpus of a few kilobytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.quickstart import train_tokenizer

REPOSITORY = Path(__file__).parents[2]


def environment(**extra: str) -> dict[str, str]:
    """This interpreter instead of .venv, no GPUs, one thread a process, nothing inherited from a launcher."""
    kept = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE")}
    settings = {"STATEX_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**kept, **settings, **extra}


def script(
    name: str, *arguments: str, folder: Path = REPOSITORY, **extra: str
) -> subprocess.CompletedProcess:
    command = ["bash", f"scripts/{name}.sh", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


def write_corpus(folder: Path, texts: list[str]) -> Path:
    chunk = folder / "chunk1"
    chunk.mkdir(parents=True)
    lines = (json.dumps({"text": text, "meta": {}}) + "\n" for text in texts)
    (chunk / "part_0.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with train/ and tokenizer/."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"def function_{i}(value):\n    return value + {i}\n" * (1 + i % 7) for i in range(400)]
    write_corpus(folder / "train", texts)
    train_tokenizer(texts, 512).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def tiny(corpus, tmp_path) -> list[str]:
    """Arguments of a run that takes seconds and writes to a folder of its own."""
    return [
        "scale=tiny",
        f"data_path={corpus / 'train'}",
        f"tokenizer={corpus / 'tokenizer'}",
        "validation_data_path=none",
        f"output_dir={tmp_path / 'output'}",
        "max_len=64",
        "tokens_per_step=256",
        "n_warmup_steps=1",
        "report_to=none",
    ]
