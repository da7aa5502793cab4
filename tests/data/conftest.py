import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.lines import parse_document


@pytest.fixture(scope="session")
def tokenizer():
    """256 bytes and end-of-text: every ASCII character of a document is one token, so counts are obvious."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{character: i + 1 for i, character in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"text": text, "meta": {"n": i}}) + "\n" for i, text in enumerate(texts))
    )
    return path


def document(number: int) -> str:
    """A document that names itself, of a length of its own, now and then a long one."""
    return f"[{number}]" + "abcdefghij"[number % 10] * (number * 7919 % 61 + (400 if number % 17 == 0 else 0))


def make_corpus(root: Path, n_documents: int = 120, n_files: int = 5, empty_every: int = 11) -> list[str]:
    """Five files in two chunks; every 11th document is empty. Returns the non-empty texts."""
    texts = ["" if number % empty_every == 3 else document(number) for number in range(n_documents)]
    for index in range(n_files):
        write_jsonl(root / f"chunk{1 + index % 2}" / f"part_{index}.jsonl", texts[index::n_files])
    return [text for text in texts if text]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("corpus")
    return root, make_corpus(root)


__all__ = ["document", "make_corpus", "parse_document", "write_jsonl"]
