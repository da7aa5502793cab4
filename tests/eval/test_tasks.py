"""Prompts to the letter, needles where they should be, lengths kept, data the same on every machine."""

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import ruler
from eval.datafiles import read_rows
from eval.items import encode
from eval.registry import select
from eval.settings import Settings
from eval.tasks import icl, mqar, niah, passkey, recall
from eval.text import encode_long, spread, with_needles

from .conftest import FACTS, recall_rows


def items_of(task: str, settings: Settings, tokenizer: Any) -> list[Any]:
    ((family, _),) = select([task])
    return list(family.build(task, settings, tokenizer))


# ----------------------------------------------------------------------------------------------------
# prompts, as they stood when they were checked by eye


def test_passkey_prompt() -> None:
    assert passkey.write(2, "12345", 0.5) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will "
        "quiz you about the important information there.\n"
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
        "The pass key is 12345. Remember it. 12345 is the pass key. "
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
        "What is the pass key? The pass key is"
    )


def test_niah_prompt() -> None:
    assert niah.Haystack("snapshot", 1.0, 1).write(1) == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz "
        "you about the number afterwards.\n"
        "The humble miller counted the tired boat near the forest on Sunday. "
        "One of the special magic numbers for quiet-mirror is: 7643749.\n"
        "What is the special magic number for quiet-mirror mentioned in the provided text? "
        "The special magic number for quiet-mirror mentioned in the provided text is"
    )


@pytest.mark.parametrize(
    ("task", "kind", "once", "twice"),
    [
        (
            "swde",
            "attribute",
            "Ada lives in Lima these days. Lives in:",
            "Information about Lives in. Ada lives in Lima these days.\n"
            "Ada lives in Lima these days. Lives in:",
        ),
        (
            "squad",
            "completion",
            "Ada lives in Lima these days. The city where Ada lives is",
            "Where is Ada? Ada lives in Lima these days.\n"
            "Ada lives in Lima these days. The city where Ada lives is",
        ),
        (
            "nq",
            "passage",
            "Ada lives in Lima these days. Ada lives in the city of",
            "Where does Ada live? Ada lives in Lima these days.\n"
            "Ada lives in Lima these days. Ada lives in the city of",
        ),
    ],
)
def test_recall_prompts(task: str, kind: str, once: str, twice: str) -> None:
    question = recall.SOURCES[task].read(recall_rows(kind)[0])
    assert recall.prompt(question, question.document, twice=False) == once
    assert recall.prompt(question, question.document, twice=True) == twice


def test_icl_prompt() -> None:
    assert icl.write([("It rained.", "blue")], "It snowed.") == (
        "Input: It rained.\nLabel: blue\n\nInput: It snowed.\nLabel:"
    )


# ----------------------------------------------------------------------------------------------------
# documents cut around the answer


@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 0.99])
def test_the_document_is_cut_around_the_first_answer(place: float, tokenizer: Any) -> None:
    words = [f"w{i}" for i in range(600)]
    at = round(place * (len(words) - 1))
    words[at] = "LIMA"
    words.append("lima")
    document = " ".join(words)
    cut = recall.cut_around(document, recall.find_answer(document, ("absent", "Lima")), tokenizer, 200)
    assert cut in document
    assert len(tokenizer(cut)["input_ids"]) == 200
    before = cut.index("LIMA")
    whole = document.index("LIMA")
    expected = min(max(whole + 2 - 100, 0), len(document) - 200)  # a byte a token
    assert whole - before == expected
    assert recall.cut_around("short", None, tokenizer, 200) == "short"
    assert recall.cut_around(document, None, tokenizer, 200) == document[:200]


@pytest.mark.parametrize(
    ("document", "answers", "found"),
    [
        ("In 1034 there were 10 of them.", ("10",), (19, 21)),  # no part of another number
        ("Some 7,791 people, 7.5 each, 7 in all.", ("7",), (29, 30)),
        ("Northern roads: no.", ("No",), (16, 18)),
        ("It was Lima. Oslo too.", ("Oslo", "Lima"), (13, 17)),  # the first listed, not the first to come
        ("It was Lima.", ("Oslo", "Lima"), (7, 11)),
        ("Postmodernism.", ("modern",), (4, 10)),  # a part of a word where it stands nowhere else
        ("a New \n York b", ("New York",), (2, 12)),
        ("\u0130\u0130\u0130 x Lima", ("lima",), (6, 10)),  # each of these letters is two in lower case
        ("東京は日本の首都。", ("日本",), (3, 5)),
        ("in C++ (1985)", ("c++",), (3, 6)),  # no pattern, a text
        ("nothing", ("Lima",), None),
    ],
)
def test_where_an_answer_stands(document: str, answers: tuple[str, ...], found: Any) -> None:
    assert recall.find_answer(document, answers) == found


def test_rows_that_ask_nothing_are_left_out_and_counted(
    settings: Callable[..., Settings], tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    rows = [
        {"context": context, "question": "It is", "orig_question": "What?", "answers": answers}
        for context, answers in (
            ("It is Lima.", ["Lima"]),
            ("[DOC] [TLE]", ["Lima"]),
            ("It is 2.", ["2", "two"]),
            ("It is here.", []),
            ("It is there.", [" "]),
            ("Nobody knows.", ["Oslo", ""]),
        )
    ]
    (tmp_path / "based_drop").mkdir()
    (tmp_path / "based_drop" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = items_of("drop", settings(data=tmp_path, lengths="512"), tokenizer)
    assert [item.key for item in items] == ["length=512/0", "length=512/5"]
    assert [item.group["answer_in_document"] for item in items] == [True, False]
    assert "drop at 512 tokens: 4 of 6 rows left out" in capsys.readouterr().err
    (first,) = items_of("drop", settings(data=tmp_path, lengths="512", limit=1), tokenizer)
    assert first.key == "length=512/0"


def test_a_statement_that_breaks_off_at_a_full_stop_keeps_it() -> None:
    row = {
        "context": "He met Dr. Ada.",
        "text": "He met Dr. Ada. He met Dr.",
        "question": "Who?",
        "value": "Ada",
    }
    assert recall.completion(row).cue == "He met Dr."


def test_recall_keeps_the_answer_at_every_length(settings: Callable[..., Settings], tokenizer: Any) -> None:
    for item in items_of("fda", settings(lengths="512,1024,2048"), tokenizer):
        text = tokenizer.decode(item.tokens)
        assert f"lives in {item.answers[0]}" in text
        assert text.endswith("Lives in:")
        extra = len("Lives in:") + 2  # a full stop and a space
        assert len(item.tokens) <= item.group["length"] - 50 + extra
    assert [city for _, city in FACTS] == [
        item.answers[0] for item in items_of("fda", settings(lengths="512"), tokenizer)
    ]


# ----------------------------------------------------------------------------------------------------
# needles and lengths


def test_depths_are_covered_evenly() -> None:
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert set(Counter(spread(depths, 50)).values()) == {10}
    assert spread(depths, 2) == [0.0, 1.0]
    assert spread(depths, 3) == [0.0, 0.5, 1.0]
    assert with_needles(["a", "b", "c", "d"], [(0.5, "X"), (0.0, "Y"), (1.0, "Z")]) == "Y a b X c d Z"


@pytest.mark.parametrize("task", ["passkey", "niah_text", "niah_text_multikey"])
def test_needles_lie_at_their_depth_in_prompts_of_the_length(
    task: str, settings: Callable[..., Settings], tokenizer: Any
) -> None:
    found = []
    for item in items_of(task, settings(limit=5, lengths="4096,16384"), tokenizer):
        item.check()
        length = item.group["length"]
        assert 0.94 * length < item.size <= length
        text = tokenizer.decode(item.tokens)
        body = text[text.index("\n") + 1 : text.rindex("\n")]
        assert body.index(item.answers[0]) / len(body) == pytest.approx(item.group["depth"], abs=0.06)
        found.append(item.group["depth"])
    assert found == [0.0, 0.25, 0.5, 0.75, 1.0] * 2


def test_a_length_without_room_for_the_question_is_an_error(
    settings: Callable[..., Settings], tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match="too short"):
        items_of("niah_text", settings(lengths="256"), tokenizer)


@pytest.mark.parametrize("kind", ["bytes", "words", "prefix", "whole"])
def test_long_texts_are_tokenised_by_sentence_as_they_are_at_once(
    kind: str, tokenizer: Any, word_tokenizer: Any, monkeypatch: Any
) -> None:
    known = {"bytes": tokenizer, "whole": word_tokenizer}.get(kind) or bpe(kind)
    monkeypatch.setattr("eval.text.LONG", 200)
    for text in (passkey.write(50, "12345", 0.5), niah.Haystack("seed", 0.3, 4).write(60)):
        assert np.array_equal(encode_long(known, text, {}), encode(known, text))


def bpe(kind: str) -> Any:
    """Tokenizers of the two usual makes, trained on the spot: the space belongs to the word behind it, and
    is written with it ("words", as GPT-NeoX's) or put in front of a whole text too ("prefix", as Llama's)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "words":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    text = [passkey.write(3, "1234567890", 0.5), niah.Haystack("seed", 0.5, 4).write(99)]
    special = ["<unk>", "<s>"]
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    if kind == "prefix":
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def test_a_million_tokens_are_written_within_seconds(
    settings: Callable[..., Settings], tokenizer: Any
) -> None:
    (item,) = items_of("passkey", settings(lengths="1000000", limit=1), tokenizer)
    assert 999_800 < item.size <= 1_000_000


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2"])
def test_ruler_at_64k_stays_within_its_length_with_the_beginning_of_the_answer(
    task: str, settings: Callable[..., Settings], word_tokenizer: Any, tokenizer: Any
) -> None:
    for length in (4096, 65536):
        for item in items_of(task, settings(lengths=length, limit=2), tokenizer):
            item.check()  # raises where a model with that window would have cut
            assert item.size <= length
            text = tokenizer.decode(item.tokens)
            assert text.endswith("mentioned in the provided text is")
            assert item.answers[0] in text
    again = [item.tokens for item in items_of(task, settings(lengths=4096, limit=2), tokenizer)]
    state = random.getstate()
    same = [item.tokens for item in items_of(task, settings(lengths=4096, limit=2), tokenizer)]
    assert all(np.array_equal(a, b) for a, b in zip(again, same))
    assert random.getstate() == state


def test_ruler_documents_that_are_missing_or_short_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"only 1 of 2 samples fit .* choose longer lengths="):
        ruler._check("niah_single_1", 65536, 2, [{"length": 65000}])
    with pytest.raises(ValueError, match="makes 9000 tokens, 65536 were asked for"):
        ruler._check("niah_single_2", 65536, 1, [{"length": 9000}])


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_a_length_without_room_for_a_ruler_sample_is_an_error_in_our_words(
    task: str, settings: Callable[..., Settings], tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=r"only 0 of 2 samples fit .* choose longer lengths=") as error:
        items_of(task, settings(lengths="256", limit=2), tokenizer)
    assert "max_seq_length" not in str(error.value)


def test_ruler_answers_score_as_in_lm_eval() -> None:
    from eval.items import Item, as_tokens
    from eval.scoring import contains_all

    ruler._generator()
    from lm_eval.tasks.ruler.common_utils import string_match_all

    for answer in ("12 and 34", "34", "", "no Number"):
        for expected in (("12", "34"), ("34",), ("NUMBER",)):
            item = Item("t", "k", "generate", as_tokens([1]), answers=expected)
            assert contains_all(answer, item) == string_match_all([answer], [list(expected)])


# ----------------------------------------------------------------------------------------------------
# associative recall, classification, reproducibility


def test_mqar_asks_each_key_once_at_its_distance(word_tokenizer: Any) -> None:
    known = mqar.alphabet(word_tokenizer)
    assert not set(known.keys) & set(known.values)
    item = mqar.make_item("mqar", known, pairs=8, distance=10, index=3, seed=0)
    tokens = item.tokens.tolist()
    pairs = dict(zip(tokens[1:17:2], tokens[2:17:2]))
    assert len(pairs) == 8
    assert len(tokens) == 1 + 16 + 10 + 16
    for position, answer in zip(item.positions, item.answers):
        assert position >= 27
        assert pairs[tokens[position]] == answer == tokens[position + 1]
    assert not set(tokens[17:27]) & (set(known.keys) | set(known.values))


def test_mqar_uses_the_recall_tokens_of_a_tokenizer_that_has_them(word_tokenizer: Any) -> None:
    import copy

    from data.recall import recall_tokens

    trained = copy.deepcopy(word_tokenizer)
    trained.add_special_tokens({"extra_special_tokens": recall_tokens()})
    known = mqar.alphabet(trained)
    assert trained.convert_ids_to_tokens(known.keys[:1] + known.values[:1]) == ["<|key_0|>", "<|val_0|>"]


def test_too_many_pairs_for_a_vocabulary_are_an_error(
    settings: Callable[..., Settings], word_tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match="pairs=5000: this tokenizer has keys for"):
        items_of("mqar", settings(pairs="5000"), word_tokenizer)


def test_topics_can_only_be_told_from_the_examples() -> None:
    draws = [icl.topic_examples(12, random.Random(f"{i}")) for i in range(40)]
    for examples in draws:
        assert set(Counter(label for _, label in examples).values()) == {3}
    assert len({tuple(sorted({label for _, label in examples})) for examples in draws}) > 5


def test_shown_examples_are_even_over_labels_and_none_comes_twice() -> None:
    groups = {label: [(f"{label}{i}", label) for i in range(size)] for label, size in (("a", 2), ("b", 50))}
    for seed in range(30):
        shown = icl.balanced(groups, 8, random.Random(f"{seed}"))
        assert len(set(shown)) == 8
        assert Counter(label for _, label in shown) == {"a": 2, "b": 6}
    firsts = Counter(icl.distinct(10, 3, random.Random(f"{seed}"))[0] for seed in range(2000))
    # 200 expected of each; five standard deviations of a binomial are 67
    assert all(abs(firsts[i] - 200) < 67 for i in range(10))
    assert sorted(icl.distinct(10, 10, random.Random("all"))) == list(range(10))
    with pytest.raises(ValueError, match="only 52 examples"):
        icl.balanced(groups, 60, random.Random("x"))


def test_a_long_label_may_be_written_to_its_end(
    settings: Callable[..., Settings], tokenizer: Any, tmp_path: Path
) -> None:
    label = "balance_not_updated_after_cheque_or_cash_deposit"  # of banking77; a byte a token here
    (tmp_path / "banking77").mkdir()
    for split in ("train", "test"):
        (tmp_path / "banking77" / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": "Why?", "label_text": name}) + "\n" for name in (label, "b"))
        )
    for item in items_of("icl_banking77", settings(data=tmp_path, shots="2"), tokenizer):
        assert item.max_new_tokens > len(label) + 1
    (tmp_path / "banking77" / "test.jsonl").write_text('{"text": "Why?", "label_text": " "}\n')
    with pytest.raises(ValueError, match="row 0 of test has an empty label"):
        items_of("icl_banking77", settings(data=tmp_path, shots="2"), tokenizer)


GENERATED = ("passkey", "niah_text", "niah_text_multikey", "mqar", "icl_topics")


@pytest.mark.parametrize("task", GENERATED)
def test_items_are_a_function_of_the_seed(
    task: str, settings: Callable[..., Settings], tokenizer: Any
) -> None:
    def names(seed: int) -> list[str]:
        chosen = settings(seed=seed, limit=2, lengths="1024", pairs="4", shots="4")
        return [item.fingerprint("m") for item in items_of(task, chosen, tokenizer)]

    assert names(0) == names(0)
    assert not set(names(0)) & set(names(1))
    assert names(0)[0] == KNOWN[task], "prompts changed: answers kept from earlier runs no longer count"


KNOWN = {
    "passkey": "ef9d2284f3d0daaf0c72a649d9fe99f7",
    "niah_text": "4484a8c1bd6486334e93e799da74ac71",
    "niah_text_multikey": "d980ca63458ee30d6c6a501aef9b49f3",
    "mqar": "7f513b6ca740e25e17d24d07f40de5fa",
    "icl_topics": "d8fc751977029a432c341ae0af8a41d1",
}


def test_rows_are_read_from_the_split_of_the_hub_layout(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        table = pyarrow.table({"text": [split]})
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert list(read_rows(tmp_path, "validation", ("text",))) == [{"text": "validation"}]
    with pytest.raises(ValueError, match="no file of the split 'test'"):
        list(read_rows(tmp_path, "test", ("text",)))
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_rows(tmp_path, "train", ("text",)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("validation.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:30], "cannot be read"),
        ("validation.jsonl.gz", b"no gzip", "cannot be read"),
        ("validation.jsonl", b"\xff\xfe\x00", "cannot be read"),
        ("validation.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 is no JSON"),
        ("validation.csv", b"key\na,one too many\n", "no field text"),
        ("validation.jsonl", b'{"text": 7}\n', "field text is not a text but '7'"),
        ("validation.jsonl", b'{"text": ["a", "b"]}\n', "field text is not a text"),
    ],
)
def test_damaged_data_is_an_error_that_names_the_file(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} .*{re.escape(message)}"):
        list(read_rows(tmp_path, "validation", ("text",)))


@pytest.mark.parametrize("answers", ["Lima", {"text": ["Lima"]}, [3]])
def test_answers_in_another_layout_are_refused(tmp_path: Path, answers: Any) -> None:
    # a text where a list belongs, read letter by letter: nearly every continuation contains an "a"
    (tmp_path / "validation.jsonl").write_text(json.dumps({"answers": answers}) + "\n")
    with pytest.raises(ValueError, match="row 0: field answers is not a list of texts"):
        list(read_rows(tmp_path, "validation", ("answers",), ("answers",)))


def test_data_below_a_hidden_folder_is_found(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "based-fda"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text('{"text": "a"}\n')
    (folder / ".cache").mkdir()  # the Hub's own marks in a downloaded folder
    (folder / ".cache" / "validation.jsonl").write_text("{")
    assert list(read_rows(folder, "validation", ("text",))) == [{"text": "a"}]
