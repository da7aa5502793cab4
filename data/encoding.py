"""Text to tokens in batches, on several threads, end-of-text after each document."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PROBE = "The  state\tof a recurrent\nlayer: def f(x_1=0.5):\n    return {x: '¿Qué?'}  # 狀態 🙂 <|end|>\r\n"


def load_tokenizer(folder: str | Path):
    """A transformers tokenizer from a local folder. Raises ValueError when there is none."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer folder {folder} does not exist: give a folder with tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no tokenizer that transformers can read: {error}") from None


def end_of_text(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token (eos_token), which separates documents: set "
            '"eos_token" in its tokenizer_config.json'
        )
    return tokenizer.eos_token_id


def tokenizer_fingerprint(tokenizer) -> str:
    """Same vocabulary, same end-of-text, same splitting of a probe: the same fingerprint.

    Files written by another version of the tokenizers library differ in bytes, so what it does is hashed, not
    how it is stored.
    """
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(repr([end_of_text(tokenizer), Encoder(tokenizer).encode([PROBE])[0].tolist()]).encode())
    return digest.hexdigest()[:16]


class Encoder:
    """Encodes batches of documents on `threads` threads (the library releases the interpreter lock)."""

    def __init__(self, tokenizer, threads: int = 1) -> None:
        # the library's own threads do not survive a fork, which the loader's workers are; ours start after it
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.end_of_text = end_of_text(tokenizer)
        self.threads = threads
        self._tokenizer = tokenizer
        self._fast = _without_truncation(tokenizer.backend_tokenizer) if tokenizer.is_fast else None
        self._pool: ThreadPoolExecutor | None = None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array a document: its tokens and end-of-text, or nothing at all for an empty document."""
        if self.threads == 1 or len(texts) < 2:
            return self._encode(texts)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads)
        parts = list(self._pool.map(self._encode, [texts[i :: self.threads] for i in range(self.threads)]))
        return [parts[i % self.threads][i // self.threads] for i in range(len(texts))]

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not texts:
            return []
        if self._fast is not None:
            ids = [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            ids = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array([*row, self.end_of_text] if row else [], dtype=np.int32) for row in ids]


def _without_truncation(backend):
    """Some tokenizer.json files carry the truncation or padding of whoever saved them."""
    if backend.truncation is None and backend.padding is None:
        return backend
    backend = copy.deepcopy(backend)
    backend.no_truncation()
    backend.no_padding()
    return backend
