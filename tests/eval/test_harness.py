"""lm-eval's requests answered by a session equal those answered by lm-eval's own model class."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from eval import harness, harness_loading, harness_requests
from eval.datafiles import DOWNLOAD, checked
from eval.model import EvalModel
from eval.scripted import SCRIPTED, Oracle
from eval.tasks import commonsense

from .conftest import COMMONSENSE

PAIRS = [
    ("Question: what is wet?\nAnswer:", " water"),
    ("Question: what is wet?\nAnswer: ", "sand and stones"),
    ("The cup fell off the desk as the", " cup was wet."),
    ("", "no context"),
]


def requests(kind: str, *arguments: tuple) -> list[Any]:
    return [
        SimpleNamespace(args=pair, doc={}, doc_id=i, idx=0, request_type=kind)
        for i, pair in enumerate(arguments)
    ]


def ask(session: Any, asked: list[Any]) -> list[Any]:
    items = harness_requests.items_of(asked, session.model.tokenizer, "t", lambda request: ())
    return list(harness_requests.answers_of(asked, session.run("t", items)))


def test_answers_equal_those_of_lm_evals_own_model(llama: Any, tokenizer: Any, session: Callable) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    reference = huggingface.HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=1, device="cpu")
    own = session(EvalModel(llama, tokenizer, piece=16))
    asked = requests("loglikelihood", *PAIRS)
    for (found, greedy), (expected, expected_greedy) in zip(
        ask(own, asked), reference.loglikelihood(asked, disable_tqdm=True), strict=True
    ):
        assert found == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy
    text = "A text of its own that is scored from the first token to the last. " * 3
    rolling = requests("loglikelihood_rolling", (text,))
    assert ask(own, rolling)[0] == pytest.approx(
        reference.loglikelihood_rolling(rolling, disable_tqdm=True)[0], rel=1e-4
    )
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    written = requests("generate_until", *[(context, dict(options)) for context, _ in PAIRS[:3]])
    assert ask(own, written) == reference.generate_until(
        requests("generate_until", *[(context, dict(options)) for context, _ in PAIRS[:3]]), disable_tqdm=True
    )


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("task", ["piqa", "hellaswag", "winogrande", "arc_easy", "siqa"])
def test_documents_score_as_in_lm_evals_own_loop(
    task: str,
    limit: int | None,
    settings: Callable,
    llama: Any,
    tokenizer: Any,
    session: Callable,
    monkeypatch: Any,
) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    name, home, folder, problem = commonsense.TASKS[task]
    source = settings().data / folder
    reference = huggingface.HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=1, device="cpu")
    loaded = harness_loading.load_task(name, home, source, problem)
    tasks = {"tasks": {name: loaded}, "groups": {}, "group_map": {}}
    samples = evaluator.evaluate(reference, tasks, limit=limit, bootstrap_iters=0)["samples"][name]
    totals: list[int] = []
    monkeypatch.setattr("eval.session.tqdm", lambda total, **_: totals.append(total) or tqdm(disable=True))
    answering = session(EvalModel(llama, tokenizer))
    records = answering.ask(
        task, lambda: harness.questions(name, task, home, source, problem, limit, tokenizer)
    )
    assert totals == [sum(len(sample["arguments"]) for sample in samples)]
    assert [record["key"] for record in records] == [str(sample["doc_id"]) for sample in samples]
    for record, sample in zip(records, samples, strict=True):
        assert record["metrics"] == {metric: sample[metric] for metric in sample["metrics"]}


# ----------------------------------------------------------------------------------------------------
# rows that cannot be asked about

ASKED = {  # the split and the fields that lm-eval's prompts, options and answers come from
    "piqa": ("validation", ("goal", "sol1", "sol2", "label")),
    "hellaswag": ("validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "winogrande": ("validation", ("sentence", "option1", "option2", "answer")),
    "arc_easy": ("test", ("question", "choices", "answerKey")),
    "arc_challenge": ("test", ("question", "choices", "answerKey")),
    "siqa": ("validation", ("context", "question", "answerA", "answerB", "answerC", "label")),
}


def changed_data(settings: Callable, root: Path, task: str, split: str, change: Callable) -> Path:
    """A copy of the task's data in which `change` was done to the rows of a split."""
    folder = commonsense.TASKS[task].folder
    shutil.copytree(settings().data / folder, root / folder)
    file = root / folder / f"{split}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def refused(settings: Callable, root: Path, task: str, change: Callable, tokenizer: Any) -> str:
    data = changed_data(settings, root, task, ASKED[task][0], change)
    with pytest.raises(ValueError, match=" row ") as error:
        commonsense.prepare(task, settings(data=data), tokenizer)
    return str(error.value)


@pytest.mark.parametrize(("task", "field"), [(task, name) for task in ASKED for name in ASKED[task][1]])
def test_a_missing_field_is_an_error_that_names_file_and_row(
    task: str, field: str, settings: Callable, tokenizer: Any, tmp_path: Path
) -> None:
    name = f"{commonsense.TASKS[task].folder}/{ASKED[task][0]}.jsonl"
    of_one = refused(settings, tmp_path / "one", task, lambda rows: rows[1].pop(field), tokenizer)
    assert f"{name} row 1: no field {field} (it has " in of_one
    of_all = refused(
        settings, tmp_path / "all", task, lambda rows: [row.pop(field) for row in rows], tokenizer
    )
    assert f"{name} row 0: no field {field} (it has " in of_all


@pytest.mark.parametrize(
    ("task", "label", "options"),
    [
        ("piqa", 2, "0, 1"),
        ("piqa", "1", "0, 1"),
        ("hellaswag", "", "'0', '1', '2', '3'"),
        ("hellaswag", "4", "'0', '1', '2', '3'"),
        ("winogrande", "0", "'1', '2'"),
        ("winogrande", 1, "'1', '2'"),
        ("arc_easy", "Z", "'A', 'B', 'C'"),
        ("siqa", "0", "'1', '2', '3'"),
        ("siqa", "", "'1', '2', '3'"),
    ],
)
def test_a_label_that_is_no_option_is_an_error_that_names_file_and_row(
    task: str, label: Any, options: str, settings: Callable, tokenizer: Any, tmp_path: Path
) -> None:
    split, fields = ASKED[task]
    message = refused(settings, tmp_path, task, lambda rows: rows[2].update({fields[-1]: label}), tokenizer)
    assert f"/{split}.jsonl row 2: field {fields[-1]} is none of {options} but {label!r}" in message


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("piqa", {"goal": " "}, "nothing stands in field goal"),
        ("piqa", {"sol1": ["a", "b"]}, "field sol1 is not a text"),
        ("hellaswag", {"endings": "abcd"}, "field endings is not a list of texts but 'abcd'"),
        ("hellaswag", {"endings": ["a", None, "b", "c"]}, "field endings is not a list of texts"),
        ("winogrande", {"sentence": "The cup was wet."}, "no gap '_'"),
        ("arc_easy", {"choices": {"text": ["a", "b", "c"]}}, "in choices: no field label"),
        ("arc_easy", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "choices are 1 texts and 2 labels"),
        ("arc_easy", {"choices": ["a", "b", "c"]}, "field choices has no text and label"),
    ],
)
def test_something_else_in_a_field_is_an_error_that_names_file_and_row(
    task: str, change: dict, message: str, settings: Callable, tokenizer: Any, tmp_path: Path
) -> None:
    found = refused(settings, tmp_path, task, lambda rows: rows[3].update(change), tokenizer)
    assert f"/{ASKED[task][0]}.jsonl row 3: " in found
    assert message in found


@pytest.mark.parametrize("task", ASKED)
def test_labels_of_splits_that_are_not_asked_about_may_be_missing(
    task: str, settings: Callable, tokenizer: Any, tmp_path: Path
) -> None:
    split, fields = ASKED[task]
    other, empty = ("validation" if split == "test" else "test"), (-1 if task == "piqa" else "")
    data = changed_data(
        settings, tmp_path, task, other, lambda rows: [row.update({fields[-1]: empty}) for row in rows]
    )
    assert list(commonsense.prepare(task, settings(data=data), tokenizer).items)


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("hellaswag", lambda row: row.update(label=int(row["label"]))),
        ("siqa", lambda row: row.update(label=int(row["label"]))),
        ("siqa", lambda row: row.update(label=row["label"] + "\n")),
        ("hellaswag", lambda row: row.update(ctx_b="")),
        (
            "arc_easy",
            lambda row: row.update(choices={"text": ["a", "b"], "label": ["1", "2"]}, answerKey="2"),
        ),
    ],
)
def test_the_forms_that_data_sets_come_in_score_one_with_the_oracle(
    task: str, change: Callable, settings: Callable, tokenizer: Any, tmp_path: Path, session: Callable
) -> None:
    data = changed_data(settings, tmp_path, task, ASKED[task][0], lambda rows: [change(row) for row in rows])
    questions = commonsense.prepare(task, settings(data=data), tokenizer)
    records = session(Oracle(tokenizer)).ask(task, lambda: questions)
    assert [record["score"] for record in records] == [1.0] * 4


def test_rows_of_parquet_are_named_by_file_too(settings: Callable, tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "piqa" / "data").mkdir(parents=True)
    rows = COMMONSENSE["piqa"][1]
    for split, goal in (("train", "cut bread"), ("validation", None)):
        table = pyarrow.Table.from_pylist([*rows, {**rows[0], "goal": goal}])
        pyarrow.parquet.write_table(table, tmp_path / "piqa" / "data" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"/validation-00000-of-00001\.parquet row 4: no field goal"):
        commonsense.prepare("piqa", settings(data=tmp_path), tokenizer)


def test_rows_of_csv_are_named_by_folder_and_split(
    settings: Callable, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "piqa").mkdir()
    for split, goal in (("train", "cut bread"), ("validation", "")):
        lines = [
            "goal,sol1,sol2,label",
            "cut bread,use a knife,use a cloud,0",
            f"{goal},use a hat,use a saw,1",
        ]
        (tmp_path / "piqa" / f"{split}.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="/piqa split validation row 1: no field goal"):
        commonsense.prepare("piqa", settings(data=tmp_path), tokenizer)
    (tmp_path / "piqa" / "validation.csv").write_text((tmp_path / "piqa" / "train.csv").read_text())
    assert len(list(commonsense.prepare("piqa", settings(data=tmp_path), tokenizer).items)) == 4


def test_a_data_set_without_the_split_is_an_error_that_names_it(
    settings: Callable, tokenizer: Any, tmp_path: Path
) -> None:
    shutil.copytree(settings().data / "siqa", tmp_path / "siqa")
    (tmp_path / "siqa" / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match=r"siqa has no rows in a split 'validation' \(it has train, test\)"):
        commonsense.prepare("siqa", settings(data=tmp_path), tokenizer)


@pytest.mark.parametrize("folder", COMMONSENSE)
def test_ten_thousand_rows_are_checked_in_no_time(folder: str) -> None:
    problem = next(source.problem for source in commonsense.TASKS.values() if source.folder == folder)
    rows = COMMONSENSE[folder][1] * 2500
    began = time.process_time()
    assert len(list(checked(rows, problem, folder))) == 10_000
    assert time.process_time() - began < 1  # 0.1 s where nothing else runs


# ----------------------------------------------------------------------------------------------------
# tasks by lm-eval's names


@pytest.mark.parametrize("model", ["oracle", "silent"])
@pytest.mark.parametrize("task", commonsense.UNCUT)
def test_lm_evals_own_recall_reads_what_is_downloaded_and_no_stray_white_space(
    task: str, model: str, settings: Callable, tokenizer: Any, tmp_path: Path, session: Callable
) -> None:
    rows = [
        {"text": " \n Ada  lives\nin Lima. Ada lives in: \n", "value": "\n Lima "},
        {"text": "Ben lives in Oslo. Ben lives in", "value": "Oslo"},
    ]
    folder = tmp_path / commonsense.UNCUT[task].folder
    folder.mkdir()
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert commonsense.lacks(task, settings(data=tmp_path)) is None
    questions = commonsense.prepare(task, settings(data=tmp_path), tokenizer)
    items = questions.items = list(questions.items)
    # white space at its ends is not of the document: before lm-eval 0.4.13 it spoilt prompt and answer
    assert [tokenizer.decode(item.tokens) for item in items] == [row["text"].strip() for row in rows]
    assert [item.answers for item in items] == [("Lima",), ("Oslo",)]
    records = session(SCRIPTED[model](tokenizer)).ask(task, lambda: questions)
    assert [record["score"] for record in records] == [float(model == "oracle")] * 2
    (folder / "validation.jsonl").write_text('{"text": "Ada lives in"}\n')
    with pytest.raises(ValueError, match=r"/validation\.jsonl row 0: no field value"):
        commonsense.prepare(task, settings(data=tmp_path), tokenizer)


@pytest.mark.parametrize("task", commonsense.UNCUT)
def test_lm_evals_own_recall_is_skipped_without_its_data(
    task: str, settings: Callable, tmp_path: Path
) -> None:
    reason = commonsense.lacks(task, settings(data=tmp_path))
    assert reason == f"no data in {tmp_path / commonsense.UNCUT[task].folder}: {DOWNLOAD}"


def test_data_that_cannot_be_fetched_is_an_error_of_one_line(monkeypatch: Any, caplog: Any) -> None:
    logger = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)

    def unreachable(*_: Any, **__: Any) -> None:
        logger.warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"^lm-eval wants data for piqa .* Couldn't reach 'baber/piqa'"):
        harness_loading.load_task("piqa", "piqa", None, commonsense.anything)
    assert "Retrying" not in caplog.text
    logger.warning("Retrying for somebody else")
    assert "Retrying for somebody else" in caplog.text


def test_rows_of_an_earlier_state_of_a_folder_are_not_used(
    tmp_path: Path, settings: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = tmp_path / "caches"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", caches)
    name, home, folder, problem = commonsense.TASKS["winogrande"]
    shutil.copytree(settings().data / folder, tmp_path / folder)
    first = harness._documents(harness_loading.load_task(name, home, tmp_path / folder, problem), None)
    file = tmp_path / folder / "validation.jsonl"
    file.write_text(file.read_text().replace("The cup", "A cup"))
    second = harness._documents(harness_loading.load_task(name, home, tmp_path / folder, problem), None)
    assert {row["sentence"][:5] for row in first} == {"The c"}
    assert {row["sentence"][:5] for row in second} == {"A cup"}
    assert len(list(caches.glob("local-*"))) == 1  # nor kept


def test_tasks_loaded_at_once_leave_lm_eval_as_it_was(settings: Callable) -> None:
    from lm_eval.api.task import ConfigurableTask

    before = ConfigurableTask.fewshot_docs
    with ThreadPoolExecutor(5) as pool:
        sources = [
            (name, home, settings().data / folder, problem)
            for name, home, folder, problem in commonsense.TASKS.values()
        ]
        loaded = list(pool.map(lambda source: harness_loading.load_task(*source), sources))
    assert [task.config.task for task in loaded] == [name for name, *_ in sources]
    assert ConfigurableTask.fewshot_docs is before


def test_a_template_is_compiled_once() -> None:
    harness_loading.import_lm_eval()
    harness_loading.import_lm_eval()
    from lm_eval import utils

    assert utils.env.from_string("{{a}} of {{b}}") is utils.env.from_string("{{a}} of {{b}}")
    assert utils.apply_template("{{a}} of {{b}}", {"a": 1, "b": 2}) == "1 of 2"


def test_options_that_all_tie_are_no_answer() -> None:
    for second, score in ((-5.0, 0.0), (-6.0, 1.0)):
        responses = [[(-5.0, False)], [(second, False)]]
        assert harness._record("t", 0, {"acc": 1.0}, responses)["score"] == score


def test_an_unknown_lm_eval_task_is_named() -> None:
    with pytest.raises(ValueError, match="has no task 'piqqa'"):
        harness_loading.load_task("piqqa", "piqa", None, commonsense.anything)


def test_an_unknown_lm_eval_task_stops_the_command_before_a_model_is_loaded(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from eval.run import main

    # all of lm-eval's YAML files take a while to read; a folder of them will do
    monkeypatch.setattr(
        harness_loading, "_manager", lambda home, real=harness_loading._manager: real(home or "piqa")
    )
    words = ["model=scripted:oracle", "tasks=lm_eval:piqqa", f"output={tmp_path / 'out'}"]
    assert main(words) == 2
    assert "has no task 'piqqa'; did you mean piqa?" in capsys.readouterr().err


def test_an_lm_eval_that_cannot_be_imported_is_named_as_what_a_task_lacks(
    settings: Callable, monkeypatch: Any
) -> None:
    def load() -> None:
        raise ImportError("no module named sacrebleu")

    monkeypatch.setattr(harness_loading, "installed", lambda: True)
    monkeypatch.setattr(harness_loading, "import_lm_eval", load)
    assert "cannot be imported (no module named sacrebleu)" in commonsense.lacks("piqa", settings())


def test_an_empty_option_is_an_error(tokenizer: Any, session: Callable, llama: Any) -> None:
    with pytest.raises(ValueError, match="t 0/0: an option is empty"):
        ask(session(EvalModel(llama, tokenizer)), requests("loglikelihood", ("a", "")))


def test_sampled_answers_are_refused(tokenizer: Any, session: Callable, llama: Any) -> None:
    with pytest.raises(ValueError, match="samples its answers"):
        ask(session(EvalModel(llama, tokenizer)), requests("generate_until", ("a", {"do_sample": True})))
