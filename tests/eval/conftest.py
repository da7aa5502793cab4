"""Tiny stand-ins: tokenizers, models, and data sets of a few rows in the schema of the real ones."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.items import Item, as_tokens
from eval.scripted import byte_tokenizer
from eval.session import Session
from eval.settings import Settings, read_settings
from eval.store import Store
from models import build_model

IDENTITY = {"path": "model", "weights": "w", "config": "c", "tokenizer": "t", "dtype": None}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """Whole words as tokens, as most vocabularies have them: 600 made-up ones and the single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġ{a}{b}{c}" for a in "bdfgklmnpr" for b in "aeiou" for c in "bdfgklmnpr" if a != c][:400]
    vocabulary = {text: i for i, text in enumerate(["<|endoftext|>", *alphabet, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    folders = {}
    for name in ("gla", "mamba2"):
        model = build_model(f"configs/models/{name}-tiny.json", vocab_size=257, seed=1)
        folders[name] = tmp_path_factory.mktemp("models") / f"tiny_{name}"
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=1024, **sizes))


@pytest.fixture
def settings(tmp_path: Path, data: Path, corpus: Path) -> Callable[..., Settings]:
    def make(**changed: Any) -> Settings:
        given = {"model": "scripted:oracle", "output": tmp_path / "out", "data": data, "corpus": corpus}
        return read_settings([f"{key}={value}" for key, value in (given | changed).items()])

    return make


@pytest.fixture
def session(tmp_path: Path) -> Callable[[Any], Session]:
    def make(model: Any, folder: str = "answers") -> Session:
        store = Store(tmp_path / folder, IDENTITY)
        store.__enter__()
        return Session(model, store, "identity", quiet=True)

    return make


def text_item(tokenizer: Any, text: str, **fields: Any) -> Item:
    tokens = as_tokens(tokenizer(text)["input_ids"])
    return Item(**{"task": "t", "key": text, "kind": "generate", "tokens": tokens, **fields})


# ----------------------------------------------------------------------------------------------------
# data

FACTS = [("Ada", "Lima"), ("Ben", "Oslo"), ("Cleo", "Quito")]


def recall_rows(kind: str) -> list[dict[str, Any]]:
    rows = []
    for number, (name, city) in enumerate(FACTS):
        story = " ".join(f"Sentence {i} of many others." for i in range(80 * number))
        body = f"{story} {name} lives in {city} these days. {story}".strip()
        if kind == "attribute":
            rows.append({"text": f"{body}\nlives in:", "key": "lives in", "value": city})
        elif kind == "completion":
            cue = f"The city where {name} lives is"
            rows.append(
                {"text": f"{body} {cue}", "context": body, "question": f"Where is {name}?", "value": city}
            )
        else:
            cue = f"{name} lives in the city of"
            question = f"Where does {name} live?"
            rows.append(
                {
                    "context": f"[DOC] [TLE] {body}",
                    "question": cue,
                    "orig_question": question,
                    "answers": [city, city + "!"],
                }
            )
    return rows


COMMONSENSE: dict[str, tuple[str | None, list[dict[str, Any]]]] = {
    "piqa": (
        None,
        [
            {"goal": "cut bread", "sol1": "use a knife", "sol2": "use a cloud", "label": i % 2}
            for i in range(4)
        ],
    ),
    "hellaswag": (
        None,
        [
            {
                "ind": i,
                "activity_label": "Baking",
                "ctx_a": "A man bakes.",
                "ctx_b": "he",
                "ctx": "A man bakes. he",
                "endings": ["eats", "flies", "sings", "melts"],
                "source_id": "x",
                "split": "val",
                "split_type": "indomain",
                "label": str(i % 4),
            }
            for i in range(4)
        ],
    ),
    "winogrande": (
        "winogrande_xl",
        [
            {
                "sentence": "The cup fell off the desk as _ was wet.",
                "option1": "cup",
                "option2": "desk",
                "answer": str(1 + i % 2),
            }
            for i in range(4)
        ],
    ),
    "ai2_arc": (
        "ARC-Easy,ARC-Challenge",
        [
            {
                "id": str(i),
                "question": "What is wet?",
                "choices": {"text": ["sand", "water", "air"], "label": ["A", "B", "C"]},
                "answerKey": "ABC"[i % 3],
            }
            for i in range(4)
        ],
    ),
    "siqa": (
        None,
        [
            {
                "context": "Kim fell.",
                "question": "How is Kim?",
                "answerA": "sad",
                "answerB": "tall",
                "answerC": "new",
                "label": str(1 + i % 3),
            }
            for i in range(4)
        ],
    ),
}


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _commonsense(root: Path) -> None:
    for folder, (names, rows) in COMMONSENSE.items():
        for split in ("train", "validation", "test"):
            _write(root / folder / f"{split}.jsonl", rows)
        if names:
            splits = "".join(
                f"  - split: {s}\n    path: {s}.jsonl\n" for s in ("train", "validation", "test")
            )
            configs = "".join(f"- config_name: {name}\n  data_files:\n{splits}" for name in names.split(","))
            (root / folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What lm-eval reads of these folders is kept with them, not in the cache of whoever runs the tests."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every evaluation data set, in a few rows."""
    root = tmp_path_factory.mktemp("eval_data")
    kinds = {"based-swde-v2": "attribute", "based-fda": "attribute", "based-squad": "completion"}
    passages = ("triviaqa", "drop", "nq_512", "nq_1024", "nq_2048")
    for folder, kind in {**kinds, **{f"based_{name}": "passage" for name in passages}}.items():
        _write(root / folder / "validation.jsonl", recall_rows(kind))
    for folder in ("sst2", "ag_news", "TREC-QC", "subj", "banking77"):
        rows = [{"text": f"text {i}", "label_text": ["good", "bad"][i % 2]} for i in range(8)]
        for split in ("train", "test"):
            _write(root / folder / f"{split}.jsonl", rows)
    essays = [{"text": " ".join(f"Essay {e} says thing {i} twice." for i in range(3000))} for e in range(6)]
    _write(root / "paul_graham_essays" / "train.jsonl", essays)
    _commonsense(root)
    return root


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    _write(folder / "a.jsonl", [{"text": f"Document {i}. " * 40} for i in range(8)])
    return folder
