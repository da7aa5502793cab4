"""lm-eval's requests answered by a session equal those answered by lm-eval's own model class."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from eval import harness, harness_loading, harness_requests
from eval.model import EvalModel
from eval.tasks import commonsense

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
    name, home, folder = commonsense.TASKS[task]
    source = settings().data / folder
    reference = huggingface.HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=1, device="cpu")
    tasks = {"tasks": {name: harness_loading.load_task(name, home, source)}, "groups": {}, "group_map": {}}
    samples = evaluator.evaluate(reference, tasks, limit=limit, bootstrap_iters=0)["samples"][name]
    totals: list[int] = []
    monkeypatch.setattr("eval.session.tqdm", lambda total, **_: totals.append(total) or tqdm(disable=True))
    answering = session(EvalModel(llama, tokenizer))
    records = answering.ask(task, lambda: harness.questions(name, task, home, source, limit, tokenizer))
    assert totals == [sum(len(sample["arguments"]) for sample in samples)]
    assert [record["key"] for record in records] == [str(sample["doc_id"]) for sample in samples]
    for record, sample in zip(records, samples, strict=True):
        assert record["metrics"] == {metric: sample[metric] for metric in sample["metrics"]}


def test_rows_of_an_earlier_state_of_a_folder_are_not_used(
    tmp_path: Path, settings: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = tmp_path / "caches"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", caches)
    name, home, folder = commonsense.TASKS["winogrande"]
    shutil.copytree(settings().data / folder, tmp_path / folder)
    first = harness._documents(harness_loading.load_task(name, home, tmp_path / folder), None)
    file = tmp_path / folder / "validation.jsonl"
    file.write_text(file.read_text().replace("The cup", "A cup"))
    second = harness._documents(harness_loading.load_task(name, home, tmp_path / folder), None)
    assert {row["sentence"][:5] for row in first} == {"The c"}
    assert {row["sentence"][:5] for row in second} == {"A cup"}
    assert len(list(caches.glob("local-*"))) == 1  # nor kept


def test_tasks_loaded_at_once_leave_lm_eval_as_it_was(settings: Callable) -> None:
    from lm_eval.api.task import ConfigurableTask

    before = ConfigurableTask.fewshot_docs
    with ThreadPoolExecutor(5) as pool:
        sources = [
            (name, home, settings().data / folder) for name, home, folder in commonsense.TASKS.values()
        ]
        loaded = list(pool.map(lambda source: harness_loading.load_task(*source), sources))
    assert [task.config.task for task in loaded] == [name for name, _, _ in sources]
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
        harness_loading.load_task("piqqa", "piqa", None)


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
