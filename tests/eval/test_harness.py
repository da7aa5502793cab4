"""lm-eval's requests answered by a session equal those answered by lm-eval's own model class."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval import harness
from eval.model import EvalModel

PAIRS = [
    ("Question: what is wet?\nAnswer:", " water"),
    ("Question: what is wet?\nAnswer: ", "sand and stones"),
    ("The cup fell off the desk as the", " cup was wet."),
    ("", "no context"),
]


def requests(*arguments: tuple) -> list[Any]:
    return [
        SimpleNamespace(args=pair, doc={}, doc_id=i, idx=0, request_type="x")
        for i, pair in enumerate(arguments)
    ]


def test_answers_equal_those_of_lm_evals_own_model(llama: Any, tokenizer: Any, session: Callable) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    reference = huggingface.HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=1, device="cpu")
    own = harness.adapter(session(EvalModel(llama, tokenizer, piece=16)), "t", lambda request: ())
    for (found, greedy), (expected, expected_greedy) in zip(
        own.loglikelihood(requests(*PAIRS)), reference.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    ):
        assert found == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy
    text = "A text of its own that is scored from the first token to the last. " * 3
    rolling = requests((text,))
    assert own.loglikelihood_rolling(rolling)[0] == pytest.approx(
        reference.loglikelihood_rolling(rolling, disable_tqdm=True)[0], rel=1e-4
    )
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    asked = [(context, dict(options)) for context, _ in PAIRS[:3]]
    assert own.generate_until(requests(*asked)) == reference.generate_until(
        requests(*[(context, dict(options)) for context, _ in PAIRS[:3]]), disable_tqdm=True
    )


def test_options_that_all_tie_are_no_answer() -> None:
    sample = {"metrics": ["acc"], "acc": 1.0, "doc_id": 0, "resps": [[(-5.0, False)], [(-5.0, False)]]}
    assert harness._record("t", sample)["score"] == 0.0
    sample["resps"] = [[(-5.0, False)], [(-6.0, False)]]
    assert harness._record("t", sample)["score"] == 1.0


def test_an_unknown_lm_eval_task_is_named() -> None:
    with pytest.raises(ValueError, match="has no task 'piqqa'"):
        harness._load("piqqa", "piqa", None)


def test_an_unknown_lm_eval_task_stops_the_command_before_a_model_is_loaded(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from eval.run import main

    # all of lm-eval's YAML files take a while to read; a folder of them will do
    monkeypatch.setattr(harness, "_manager", lambda home, real=harness._manager: real(home or "piqa"))
    words = ["model=scripted:oracle", "tasks=lm_eval:piqqa", f"output={tmp_path / 'out'}"]
    assert main(words) == 2
    assert "has no task 'piqqa'; did you mean piqa?" in capsys.readouterr().err


def test_an_empty_option_is_an_error(tokenizer: Any, session: Callable, llama: Any) -> None:
    own = harness.adapter(session(EvalModel(llama, tokenizer)), "t", lambda request: ())
    with pytest.raises(ValueError, match="t 0/0: an option is empty"):
        own.loglikelihood(requests(("a", "")))


def test_sampled_answers_are_refused(tokenizer: Any, session: Callable, llama: Any) -> None:
    own = harness.adapter(session(EvalModel(llama, tokenizer)), "t", lambda request: ())
    with pytest.raises(ValueError, match="samples its answers"):
        own.generate_until(requests(("a", {"do_sample": True})))
