"""A corpus that every machine has: the running Python's standard library, with associative recall mixed in.

    python -m data.quickstart out=FOLDER [recall_share=0.3] [key=value ...]     (all keys: `Settings` below)

writes FOLDER/train (documents in random order: source files and recall examples), FOLDER/validation (other
source files) and FOLDER/tokenizer (byte-level BPE, trained here, with the recall tokens). The sources are
read in place and written nowhere but to FOLDER. Files are chosen and split by name; their text differs
between Python versions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import random
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.arguments import REQUIRED, parse_arguments, run_command
from data.recall import N_KEYS, N_VALUES, recall_example, recall_text, recall_tokens

END_OF_TEXT = "<|endoftext|>"
MANIFEST = "quickstart.json"
# tests and tables, which some distributions leave out or which hold no prose and no code
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"),
    *("encodings", "pydoc_data", "ensurepip", "__pycache__", "__phello__", "msilib"),
}
VALIDATION_SHARE = 0.05
N_SHARDS = 8


@dataclass(frozen=True)
class Settings:
    """What a corpus is made from; equal settings give equal corpora on one Python version."""

    seed: int = 0
    text_share: float = 1.0  # of the source files for training, chosen by name
    recall_share: float = 0.3  # of the training tokens
    recall_pairs: str = "4,8,16,32"  # small ones teach the task, large ones fill the state
    recall_queries: int = 0  # questions of a recall document; 0: as many as it has pairs
    recall_keys: int = N_KEYS  # different keys; fewer are learned sooner
    recall_values: int = N_VALUES  # different values; where several keys share one, guessing is no help
    vocabulary_size: int = 4096

    def check(self) -> None:
        """Raises ValueError for the first value out of its range."""
        if not 0 < self.text_share <= 1:
            raise ValueError(f"text_share is {self.text_share}: expected above 0 up to 1")
        if not 0 <= self.recall_share < 1:
            raise ValueError(f"recall_share is {self.recall_share}: expected 0 up to below 1")
        if not 1 <= self.recall_keys <= N_KEYS:
            raise ValueError(f"recall_keys is {self.recall_keys}: expected 1 to {N_KEYS}")
        if not 1 <= self.recall_values <= N_VALUES:
            raise ValueError(f"recall_values is {self.recall_values}: expected 1 to {N_VALUES}")
        if not all(part.isdecimal() and 1 <= int(part) <= self.recall_keys for part in self.sizes):
            raise ValueError(
                f"recall_pairs is {self.recall_pairs}: expected numbers from 1 to {self.recall_keys}, as 2,4"
            )
        if self.recall_queries < 0:
            raise ValueError(f"recall_queries is {self.recall_queries}: expected at least 0")
        smallest = 1 + self.recall_keys + self.recall_values + 256
        if self.vocabulary_size < smallest:
            raise ValueError(
                f"vocabulary_size is {self.vocabulary_size}: expected at least {smallest} (bytes and recall"
                " tokens)"
            )

    @property
    def sizes(self) -> list[str]:
        return self.recall_pairs.split(",")


def main(arguments: list[str]) -> None:
    fields = {field.name: (type(field.default), field.default) for field in dataclasses.fields(Settings)}
    given = parse_arguments(arguments, {"out": (Path, REQUIRED), **fields})
    summary = build(**given)
    print(f"{given['out']}: " + ", ".join(f"{key} {value}" for key, value in summary.items()))


def build(out: Path, **given: object) -> dict:
    """Build the corpus unless it is there; answers its manifest. It is written beside `out`, then renamed.

    Args:
        given: fields of `Settings`.
    """
    settings = Settings(**given)
    settings.check()
    out = Path(out)
    if (out / MANIFEST).exists():
        return _existing(out, settings)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds other files: give a new folder, or delete it")
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    work.mkdir(parents=True)
    try:
        summary = {
            **dataclasses.asdict(settings),
            "python": platform.python_version(),
            **_write(work, settings),
        }
        (work / MANIFEST).write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(work, out)
    except OSError:
        # another process finished the same corpus first
        if not (out / MANIFEST).exists():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _existing(out, settings)


def _existing(out: Path, settings: Settings) -> dict:
    summary = json.loads((out / MANIFEST).read_text())
    wanted = dataclasses.asdict(settings)
    different = [f"{key}={summary.get(key)}" for key in wanted if summary.get(key) != wanted[key]]
    if different:
        raise ValueError(
            f"{out} was built with {', '.join(different)}: give another folder, or delete this one"
        )
    return summary


def source_files(root: Path | None = None) -> Iterator[tuple[str, Path]]:
    """(name relative to the library, path) of the standard library's source files, sorted by name."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not SKIPPED_FOLDERS & set(name.parts) and path.is_file():
            yield name.as_posix(), path


def is_validation(name: str) -> bool:
    return _lot(name, 0) < VALIDATION_SHARE


def _lot(name: str, draw: int) -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[4 * draw : 4 * draw + 4], "big") / 2**32


def _write(work: Path, settings: Settings) -> dict:
    texts = {name: path.read_text(encoding="utf-8", errors="replace") for name, path in source_files()}
    texts = {name: text for name, text in texts.items() if text.strip()}
    if not texts:
        raise ValueError(
            f"no source files under {sysconfig.get_paths()['stdlib']}: this Python comes without them"
        )
    train = {name: text for name, text in texts.items() if not is_validation(name)}
    train = {name: text for name, text in train.items() if _lot(name, 1) < settings.text_share}
    validation = {name: text for name, text in texts.items() if is_validation(name)}
    known = recall_tokens(settings.recall_keys, settings.recall_values)
    tokenizer = train_tokenizer(list(train.values()), settings.vocabulary_size, known)
    tokenizer.save_pretrained(work / "tokenizer")
    n_text_tokens = sum(len(ids) for ids in tokenizer(list(train.values()), verbose=False)["input_ids"])
    documents = [{"text": text, "meta": {"source": name}} for name, text in train.items()]
    share = settings.recall_share
    recall = list(_recall_documents(settings, n_text_tokens * share / (1 - share)))
    documents += recall
    random.Random(settings.seed).shuffle(documents)
    for shard in range(N_SHARDS):
        path = work / "train" / f"chunk{1 + shard % 2}" / f"part_{shard}.jsonl"
        _write_jsonl(path, documents[shard::N_SHARDS])
    held_out = [{"text": text, "meta": {"source": name}} for name, text in validation.items()]
    _write_jsonl(work / "validation" / "part_0.jsonl", held_out)
    return {
        "train_files": len(train),
        "validation_files": len(validation),
        "recall_documents": len(recall),
        "text_tokens": n_text_tokens,
    }


def _recall_documents(settings: Settings, n_tokens: float) -> Iterator[dict]:
    """Recall examples of the mixed sizes, `n_tokens` in all."""
    sizes = [int(size) for size in settings.sizes]
    kinds = {"n_keys": settings.recall_keys, "n_values": settings.recall_values}
    index = 0
    while n_tokens > 0:
        n_pairs = sizes[index % len(sizes)]
        n_queries = settings.recall_queries or n_pairs
        example = recall_example(settings.seed, index, n_pairs, n_queries, **kinds)
        yield {"text": recall_text(example), "meta": {"source": f"recall-{n_pairs}"}}
        n_tokens -= 2 * (n_pairs + n_queries) + 1
        index += 1


def train_tokenizer(texts: list[str], vocabulary_size: int, known: list[str] | None = None):
    """A byte-level BPE tokenizer: end-of-text is token 0, then the `known` ones (None: those of recall)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT, *(recall_tokens() if known is None else known)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)


def _write_jsonl(path: Path, documents: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)


if __name__ == "__main__":
    run_command(main)
