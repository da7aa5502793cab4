"""A corpus that every machine has: the running Python's standard library, with associative recall mixed in.

    python -m data.quickstart out=FOLDER [seed=0] [recall_share=0.3] [recall_pairs=4,8,16,32]
                              [vocabulary_size=4096]

writes FOLDER/train (documents in random order: source files and recall examples), FOLDER/validation (other
source files) and FOLDER/tokenizer (byte-level BPE, trained here, with the recall tokens). The sources are
read in place and written nowhere but to FOLDER. Files are chosen and split by name; their text differs
between Python versions.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data.arguments import REQUIRED, parse_arguments, run_command
from data.recall import N_KEYS, recall_example, recall_text, recall_tokens

END_OF_TEXT = "<|endoftext|>"
MANIFEST = "quickstart.json"
# tests and tables, which some distributions leave out or which hold no prose and no code
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"),
    *("encodings", "pydoc_data", "ensurepip", "__pycache__", "__phello__", "msilib"),
}
VALIDATION_SHARE = 0.05
RECALL_PAIRS = "4,8,16,32"  # small ones teach the task, large ones fill the state
N_SHARDS = 8


def main(arguments: list[str]) -> None:
    settings = parse_arguments(
        arguments,
        {
            "out": (Path, REQUIRED),
            "seed": (int, 0),
            "recall_share": (float, 0.3),
            "recall_pairs": (str, RECALL_PAIRS),
            "vocabulary_size": (int, 4096),
        },
    )
    summary = build(**settings)
    print(f"{settings['out']}: " + ", ".join(f"{key} {value}" for key, value in summary.items()))


def build(
    out: Path,
    seed: int = 0,
    recall_share: float = 0.3,
    recall_pairs: str = RECALL_PAIRS,
    vocabulary_size: int = 4096,
) -> dict:
    """Build the corpus unless it is there; answers its manifest. It is written beside `out`, then renamed."""
    _check(recall_share, recall_pairs, vocabulary_size)
    settings = {
        "seed": seed,
        "recall_share": recall_share,
        "recall_pairs": recall_pairs,
        "vocabulary_size": vocabulary_size,
    }
    out = Path(out)
    if (out / MANIFEST).exists():
        return _existing(out, settings)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds other files: give a new folder, or delete it")
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    work.mkdir(parents=True)
    try:
        summary = {**settings, "python": platform.python_version(), **_write(work, **settings)}
        (work / MANIFEST).write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(work, out)
    except OSError:
        # another process finished the same corpus first
        if not (out / MANIFEST).exists():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _existing(out, settings)


def _check(recall_share: float, recall_pairs: str, vocabulary_size: int) -> None:
    if not all(part.isdecimal() and 1 <= int(part) <= N_KEYS for part in recall_pairs.split(",")):
        raise ValueError(
            f"recall_pairs is {recall_pairs}: expected numbers from 1 to {N_KEYS}, joined by commas"
        )
    if not 0 <= recall_share < 1:
        raise ValueError(
            f"recall_share is {recall_share}: expected 0 up to below 1 (share of the training tokens)"
        )
    smallest = 1 + len(recall_tokens()) + 256
    if vocabulary_size < smallest:
        raise ValueError(
            f"vocabulary_size is {vocabulary_size}: expected at least {smallest} (bytes, recall tokens)"
        )


def _existing(out: Path, settings: dict) -> dict:
    summary = json.loads((out / MANIFEST).read_text())
    different = [f"{key}={summary[key]}" for key in settings if summary[key] != settings[key]]
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
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < VALIDATION_SHARE * 2**32


def _write(work: Path, seed: int, recall_share: float, recall_pairs: str, vocabulary_size: int) -> dict:
    texts = {name: path.read_text(encoding="utf-8", errors="replace") for name, path in source_files()}
    texts = {name: text for name, text in texts.items() if text.strip()}
    if not texts:
        raise ValueError(
            f"no source files under {sysconfig.get_paths()['stdlib']}: this Python comes without them"
        )
    train = {name: text for name, text in texts.items() if not is_validation(name)}
    validation = {name: text for name, text in texts.items() if is_validation(name)}
    tokenizer = train_tokenizer(list(train.values()), vocabulary_size)
    tokenizer.save_pretrained(work / "tokenizer")
    n_text_tokens = sum(len(ids) for ids in tokenizer(list(train.values()), verbose=False)["input_ids"])
    documents = [{"text": text, "meta": {"source": name}} for name, text in train.items()]
    sizes = [int(part) for part in recall_pairs.split(",")]
    recall = list(_recall_documents(seed, sizes, n_text_tokens * recall_share / (1 - recall_share)))
    documents += recall
    random.Random(seed).shuffle(documents)
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


def _recall_documents(seed: int, sizes: list[int], n_tokens: float) -> Iterator[dict]:
    """Recall examples of the mixed sizes (pairs), `n_tokens` in all."""
    index = 0
    while n_tokens > 0:
        n_pairs = sizes[index % len(sizes)]
        yield {
            "text": recall_text(recall_example(seed, index, n_pairs)),
            "meta": {"source": f"recall-{n_pairs}"},
        }
        n_tokens -= 4 * n_pairs + 1
        index += 1


def train_tokenizer(texts: list[str], vocabulary_size: int):
    """A byte-level BPE tokenizer with end-of-text as token 0 and the recall tokens next."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT, *recall_tokens()],
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
