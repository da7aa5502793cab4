"""Corpus files -> tokens -> packed sequences -> a loader whose whole position is one small dict."""

from data.corpus import Corpus, open_corpus
from data.encoding import load_tokenizer
from data.loader import TrainingLoader, merge_states, slots_of_rank
from data.registry import DATASETS, open_dataset
from data.validation import ValidationLoader

__all__ = [
    "DATASETS",
    "Corpus",
    "TrainingLoader",
    "ValidationLoader",
    "load_tokenizer",
    "merge_states",
    "open_corpus",
    "open_dataset",
    "slots_of_rank",
]
