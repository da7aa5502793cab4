"""The command: bad input ends with status 2 before a model is loaded; an interrupted run goes on."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from eval.model import EvalModel
from eval.registry import select
from eval.run import main
from eval.scripted import Oracle
from eval.store import Store, locked

FAST = ["plots=false", "limit=2", "lengths=512"]
TOKENIZER = shutil.ignore_patterns("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt")


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("tasks=paskey", "did you mean passkey"),
        ("tasks=recal", "did you mean recall"),
        ("taks=mqar", "did you mean tasks?"),
        ("lengths=12", "below 64"),
        ("lengths=4Q", "no whole number"),
        ("lengths=1000000000000", "GB of memory"),
        ("distances=1000000M", "GB of memory"),
        ("shots=1000000000000", "GB of memory"),
        ("depths=1.5", "between 0"),
        ("limit=0", "at least 1"),
        ("pairs=0", "below 1"),
        ("seed=-1", "not be negative"),
        ("model=nowhere", "is no folder"),
        ("model=scripted:parrot", "oracle, silent, rambling"),
        ("corpus=nowhere", "does not exist"),
        ("device=abacus", "cannot be used"),
        ("device=meta", "shapes alone"),
        ("dtype=int8", "expected bfloat16"),
        ("tokenizer=nowhere", "the tokenizer in nowhere cannot be opened"),
    ],
)
def test_bad_input_is_refused_in_one_line(argument: str, message: str, tmp_path: Path, capsys: Any) -> None:
    given = {"model": "model=scripted:oracle", "tasks": "tasks=mqar,ppl"}
    given[argument.split("=")[0]] = argument
    assert main([*given.values(), f"output={tmp_path / 'out'}"]) == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights_is_refused(tmp_path: Path, tiny_folders: Any, capsys: Any) -> None:
    (tmp_path / "config.json").write_bytes((tiny_folders["gla"] / "config.json").read_bytes())
    assert main([f"model={tmp_path}", "tasks=mqar", f"output={tmp_path / 'out'}"]) == 2
    assert "has no weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[1]", "config.json is no JSON object"),
        ("config.json", "{", "config.json is no JSON object"),
        ("tokenizer.json", "{", "cannot be opened"),
    ],
)
def test_a_damaged_folder_is_named_before_anything_is_written(
    tmp_path: Path, tiny_folders: Any, capsys: Any, name: str, content: str, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folders["gla"], folder)
    (folder / name).write_text(content)
    assert main([f"model={folder}", "tasks=mqar", f"output={tmp_path / 'out'}"]) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert str(folder) in told
    assert message in told
    assert not (tmp_path / "out").exists()


def test_weights_of_transformers_that_are_cut_short_are_one_line(
    tmp_path: Path, llama: Any, tokenizer: Any, capsys: Any
) -> None:
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    with open(tmp_path / "llama" / "model.safetensors", "r+b") as weights:
        weights.truncate(5000)
    assert main([f"model={tmp_path / 'llama'}", "tasks=mqar", f"output={tmp_path / 'out'}"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: llama: the weights of ")


def test_one_model_named_twice_is_refused(tmp_path: Path, tiny_folders: Any, capsys: Any) -> None:
    folder = tiny_folders["gla"]
    models = f"model={folder},{folder.parent / '..' / folder.parent.name / folder.name}"
    assert main([models, "tasks=mqar", f"output={tmp_path / 'out'}"]) == 2
    assert "these are the same model" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: Any, monkeypatch: Any, place: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("eval.opening.open_model", lambda *_: pytest.fail("loaded"))
    assert main(["model=scripted:oracle", "tasks=mqar", f"output={tmp_path / place}"]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_a_damaged_record_of_the_model_is_named(tmp_path: Path, capsys: Any) -> None:
    command = ["model=scripted:oracle", "tasks=mqar", f"output={tmp_path}", *FAST]
    (tmp_path / "scripted_oracle").mkdir()
    (tmp_path / "scripted_oracle" / "model.json").write_text("{")
    assert main(command) == 0  # there was nothing that could be another model's
    (tmp_path / "scripted_oracle" / "model.json").write_text("{")
    assert main(command) == 2
    assert "model.json is damaged" in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_fails_its_task_alone(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("goal")

    monkeypatch.setattr("eval.tasks.mqar.make_item", broken)
    command = ["model=scripted:oracle", "tasks=mqar,passkey", f"output={tmp_path}", *FAST]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "failed mqar: KeyError: 'goal'" in told
    (model,) = json.loads((tmp_path / "results.json").read_text())["models"]
    assert list(model["tasks"]) == ["passkey"]


def test_a_model_that_diverged_has_no_score(
    tmp_path: Path, tiny_folders: Any, data: Path, corpus: Path, capsys: Any
) -> None:
    from models import load_pretrained

    model = load_pretrained(tiny_folders["gla"])
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    for file in tiny_folders["gla"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    command = [f"model={tmp_path / 'model'}", f"data={data}", f"corpus={corpus}", *FAST, "pairs=4"]
    assert main([*command, "tasks=passkey,piqa,mqar,ppl", f"output={tmp_path / 'out'}"]) == 1
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    assert not found["tasks"]
    assert len(found["failed"]) == 4
    assert all("not numbers (NaN)" in reason for reason in found["failed"].values())


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_ends_a_run_that_can_go_on(tmp_path: Path, sent: signal.Signals, status: int) -> None:
    import subprocess

    command = [sys.executable, "-m", "eval", "model=scripted:oracle", "tasks=passkey", "lengths=4K"]
    command += ["limit=3000", "plots=false", f"output={tmp_path}"]
    file = tmp_path / "scripted_oracle" / "answers" / "passkey.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while run.poll() is None and not (file.exists() and file.stat().st_size):
            time.sleep(0.05)
        run.send_signal(sent)
        _, told = run.communicate(timeout=600)
    finally:
        run.kill()
    assert run.returncode == status
    assert ("the same command goes on" in told) == (sent != signal.SIGKILL)
    assert "Traceback" not in told
    lines = file.read_text().splitlines()
    assert 0 < len(lines) < 3000
    assert all(json.loads(line)["score"] == 1.0 for line in lines)


def test_the_tokenizer_of_another_model_is_refused(
    tmp_path: Path, tokenizer: Any, tiny_folders: Any, capsys: Any
) -> None:
    import copy

    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"word{i}" for i in range(50)])
    larger.save_pretrained(tmp_path / "tokenizer")
    bare = shutil.copytree(tiny_folders["gla"], tmp_path / "bare", ignore=TOKENIZER)
    command = [f"model={bare}", f"tokenizer={tmp_path / 'tokenizer'}", "tasks=mqar"]
    assert main([*command, f"output={tmp_path / 'out'}"]) == 1
    assert "307 tokens and the model knows 257" in capsys.readouterr().err


def test_a_tokenizer_is_given_to_models_without_one_alone(
    tmp_path: Path, tokenizer: Any, tiny_folders: Any, capsys: Any
) -> None:
    tokenizer.save_pretrained(tmp_path / "words")
    (tmp_path / "words" / "special_tokens_map.json").write_text("{}")  # other bytes than the model's own
    bare = shutil.copytree(tiny_folders["mamba2"], tmp_path / "bare", ignore=TOKENIZER)
    gla = str(tiny_folders["gla"])
    command = [f"tokenizer={tmp_path / 'words'}", "tasks=mqar", "pairs=2", *FAST]
    assert main([f"model={gla},{bare}", *command, f"output={tmp_path / 'both'}"]) == 0
    assert main([f"model={gla}", *command[1:], f"output={tmp_path / 'own'}"]) == 0
    (own,) = results_of(tmp_path / "own")["models"]
    with_own, without = results_of(tmp_path / "both")["models"]
    assert with_own["identity"] == own["identity"]
    assert without["identity"]["tokenizer"] != own["identity"]["tokenizer"]
    assert main([f"model={gla}", *command, f"output={tmp_path / 'unused'}"]) == 2
    assert "each model has its own in its folder" in capsys.readouterr().err


def test_a_model_of_the_hub_is_fetched_or_refused(
    tmp_path: Path, tiny_folders: Any, monkeypatch: Any, capsys: Any
) -> None:
    command = ["model=owner/name", "tasks=mqar", "pairs=2", f"output={tmp_path}", *FAST]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tiny_folders["gla"]))
    assert main(command) == 0
    assert (tmp_path / "name" / "answers" / "mqar.jsonl").exists()

    def offline(name: str, **options: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert main(command) == 2
    assert "the Hub does not give it (no route)" in capsys.readouterr().err


def test_without_data_a_family_says_so_and_the_others_go_on(tmp_path: Path, capsys: Any) -> None:
    common = ["model=scripted:oracle", f"output={tmp_path / 'out'}", f"data={tmp_path}", *FAST]
    assert main([*common, "tasks=recall,passkey,ppl"]) == 0
    told = capsys.readouterr().err
    assert "based-fda: python huggingface/download.py --only eval" in told
    assert "corpus=DIR" in told
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["models"][0]["tasks"]) == ["passkey"]
    assert set(results["skipped"]) == {"swde", "fda", "squad", "triviaqa", "drop", "nq", "ppl"}
    assert main([*common, "tasks=recall"]) == 2


def test_rows_without_a_field_fail_their_task_alone(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "data" / "based-fda"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text('{"text": "a", "key": "b"}\n')
    command = ["model=scripted:oracle", f"data={tmp_path / 'data'}", f"output={tmp_path / 'out'}", *FAST]
    assert main([*command, "tasks=fda,passkey"]) == 1
    assert "row 0: no field value (it has text, key)" in capsys.readouterr().err
    (model,) = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    assert model["tasks"]["passkey"]["score"] == 1.0
    assert "no field value" in model["failed"]["fda"]
    assert "no field value" in (tmp_path / "out" / "report.md").read_text()


def test_an_interrupted_run_goes_on_and_repeats_nothing(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    command = ["model=scripted:oracle", "tasks=mqar", "limit=5", "plots=false", f"output={tmp_path}"]
    asked: list[str] = []
    answer = Oracle.answer

    def stops(self: Oracle, items: Any) -> Any:
        if len(asked) >= 8:
            raise KeyboardInterrupt
        asked.extend(item.key for item in items)
        return answer(self, items)

    monkeypatch.setattr(Oracle, "max_rows", 4)
    monkeypatch.setattr(Oracle, "answer", stops)
    assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    file = tmp_path / "scripted_oracle" / "answers" / "mqar.jsonl"
    assert len(file.read_text().splitlines()) == 8
    with open(file, "a") as handle:
        handle.write('{"fingerprint": "torn')  # what a kill in the middle of a write leaves

    def goes_on(self: Oracle, items: Any) -> Any:
        asked.extend(item.key for item in items)
        return answer(self, items)

    monkeypatch.setattr(Oracle, "answer", goes_on)
    assert main(command) == 0
    assert len(asked) == len(set(asked)) == 5 * 3 * 2
    (model,) = json.loads((tmp_path / "results.json").read_text())["models"]
    assert model["tasks"]["mqar"]["n"] == 30
    again = len(asked)
    assert main(command) == 0
    assert len(asked) == again


def test_the_output_of_another_model_is_refused(tmp_path: Path, tiny_folders: Any, capsys: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folders["gla"], folder)
    command = [
        f"model={folder}",
        "tasks=mqar",
        "limit=1",
        "pairs=4",
        "plots=false",
        f"output={tmp_path / 'o'}",
    ]
    assert main(command) == 0
    moved = folder.rename(tmp_path / "elsewhere")
    moved.rename(folder)
    assert main(command) == 0
    shutil.rmtree(folder)
    shutil.copytree(tiny_folders["mamba2"], folder)
    kept = (tmp_path / "o" / "results.json").read_bytes()
    assert main(command) == 2
    assert "holds the answers of another model" in capsys.readouterr().err
    assert (tmp_path / "o" / "results.json").read_bytes() == kept


def test_a_report_is_not_written_over_by_one_of_other_models(
    tmp_path: Path, tiny_folders: Any, monkeypatch: Any, capsys: Any
) -> None:
    first = shutil.copytree(tiny_folders["gla"], tmp_path / "a" / "ckpt")
    second = shutil.copytree(tiny_folders["mamba2"], tmp_path / "b" / "ckpt")
    rest = ["tasks=mqar", "pairs=2", f"output={tmp_path / 'out'}", *FAST]
    assert main([f"model={first}", *rest]) == 0
    kept = (tmp_path / "out" / "results.json").read_bytes()
    assert main([f"model={second}", *rest]) == 2
    assert f"model={first},{second}" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").read_bytes() == kept
    asked: list[str] = []
    answer = EvalModel.answer
    monkeypatch.setattr(
        EvalModel, "answer", lambda self, items: asked.extend(i.key for i in items) or answer(self, items)
    )
    assert main([f"model={first},{second}", *rest]) == 0
    # the first keeps its label, and what it has answered
    assert [model["label"] for model in results_of(tmp_path / "out")["models"]] == ["ckpt", "b_ckpt"]
    assert len(asked) == results_of(tmp_path / "out")["models"][1]["tasks"]["mqar"]["n"]


def test_scripted_models_are_told_apart(tmp_path: Path, capsys: Any) -> None:
    command = ["tasks=mqar", f"output={tmp_path}", *FAST]
    assert main(["model=scripted:oracle,scripted:silent", *command]) == 0
    assert main(["model=scripted:oracle", *command]) == 2
    assert "holds the evaluation of scripted:silent" in capsys.readouterr().err


def test_what_nobody_foresaw_while_a_model_is_opened_ends_that_model_alone(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from eval import opening

    open_model = opening.open_model

    def broken(source: Any, *rest: Any) -> Any:
        if source.scripted == "silent":
            raise KeyError("odd")
        return open_model(source, *rest)

    monkeypatch.setattr(opening, "open_model", broken)
    command = ["model=scripted:silent,scripted:oracle", "tasks=mqar", f"output={tmp_path}", *FAST]
    assert main(command) == 1
    assert "error: scripted_silent: KeyError: 'odd'" in capsys.readouterr().err
    assert [model["label"] for model in results_of(tmp_path)["models"]] == ["scripted_oracle"]


def test_answers_that_a_model_of_transformers_gave_when_asked_in_another_way_are_not_reused(
    tmp_path: Path, llama: Any, tokenizer: Any, monkeypatch: Any, capsys: Any
) -> None:
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    command = [f"model={tmp_path / 'llama'}", "tasks=mqar", "pairs=2", f"output={tmp_path / 'out'}", *FAST]
    assert main(command) == 0
    monkeypatch.setattr("eval.opening.FOREIGN_FORMAT", 3)
    assert main(command) == 2
    assert "different: asked" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_left_out_and_may_be_repaired(
    tmp_path: Path, tiny_folders: Any, capsys: Any
) -> None:
    damaged = shutil.copytree(tiny_folders["gla"], tmp_path / "damaged")
    with open(damaged / "model.safetensors", "r+b") as weights:
        weights.truncate(5000)
    command = [f"model={damaged},scripted:oracle", "tasks=mqar", f"output={tmp_path / 'out'}", *FAST]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "error: damaged: " in told.err
    assert "100.0 [100.0, 100.0]" in told.out
    results = results_of(tmp_path / "out")
    assert [model["label"] for model in results["models"]] == ["scripted_oracle"]
    assert list(results["not_finished"]) == ["damaged"]
    assert "- damaged: " in (tmp_path / "out" / "report.md").read_text()
    shutil.copy(tiny_folders["gla"] / "model.safetensors", damaged)
    assert main(command) == 0
    assert len(results_of(tmp_path / "out")["models"]) == 2


def test_an_interruption_before_the_first_model_is_one(
    tmp_path: Path, tiny_folders: Any, monkeypatch: Any, capsys: Any
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.opening.identify", interrupted)
    assert main([f"model={tiny_folders['gla']}", "tasks=mqar", f"output={tmp_path}", *FAST]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_second_evaluation_into_the_same_folder_waits(tmp_path: Path, capsys: Any) -> None:
    command = ["model=scripted:oracle", "tasks=mqar", f"output={tmp_path}", *FAST]
    with locked(tmp_path):
        assert main(command) == 2
    assert "another evaluation is writing" in capsys.readouterr().err
    assert main(command) == 0


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: Any) -> None:
    identity = {"path": "x", "weights": "none"}
    with Store(tmp_path, identity) as store:
        store.add("mqar", [{"fingerprint": "first"}])

        def torn(_: str) -> int:
            with open(tmp_path / "answers" / "mqar.jsonl", "a") as handle:
                handle.write('{"finger')  # as much as fitted
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as context:
            context.setattr(store._handle, "write", torn, raising=False)
            with pytest.raises(OSError, match="No space left"):
                store.add("mqar", [{"fingerprint": "second"}])
        store.add("mqar", [{"fingerprint": "third"}])
        assert list(store.finished("mqar")) == ["first", "third"]


def test_two_models_are_shown_side_by_side(tmp_path: Path, tiny_folders: Any, capsys: Any) -> None:
    models = f"model={tiny_folders['gla']},scripted:oracle"
    tasks = ["tasks=passkey,mqar,ppl", "lengths=512,1024", "limit=2", "pairs=2,4", "depths=0,1"]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"Line {i}. " * 50}) + "\n" for i in range(9)))
    assert main([models, *tasks, f"corpus={corpus}", f"output={tmp_path / 'out'}"]) == 0
    shown = capsys.readouterr().out
    assert "tiny_gla" in shown
    assert "scripted_oracle" in shown
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    first, second = results["models"]
    assert second["tasks"]["passkey"]["score"] == second["tasks"]["mqar"]["score"] == 1.0
    assert first["state_elements"] > 0
    assert [row["perplexity"] for row in second["tasks"]["ppl"]["by_position"]] == [1.0] * 5
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## ppl: perplexity by position" in report
    assert "| 256 to 511 " in report
    plots = {file.name for file in (tmp_path / "out" / "plots").iterdir()}
    assert plots >= {"passkey_by_length.png", "passkey_depth.png", "mqar_by_pairs.png", "ppl_by_position.png"}
    assert "## passkey by length" in report
    assert "plots/passkey_depth.png" in report
    (tmp_path / "out" / "plots" / "mine.png").touch()
    assert main([models, "tasks=mqar", *tasks[1:], f"output={tmp_path / 'out'}"]) == 0
    assert not (tmp_path / "out" / "plots" / "passkey_depth.png").exists()
    assert (tmp_path / "out" / "plots" / "mine.png").exists()


def test_a_length_beyond_the_window_of_a_transformer_is_refused_before_it_is_loaded(
    tmp_path: Path, llama: Any, tokenizer: Any, capsys: Any, monkeypatch: Any
) -> None:
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    monkeypatch.setattr("eval.opening.open_model", lambda *_: pytest.fail("loaded"))
    command = [f"model={tmp_path / 'llama'}", "tasks=passkey", f"output={tmp_path / 'out'}"]
    assert main([*command, "lengths=1K,2K", "allow_long=true"]) == 2
    assert "lengths=2048: " in (told := capsys.readouterr().err)
    assert "allows 1024 tokens" in told


@pytest.mark.parametrize("limit", [2, 30])
@pytest.mark.parametrize("task", ["passkey", "mqar", "icl_topics", "icl_sst2", "fda", "squad_twice", "nq"])
def test_progress_knows_its_end(task: str, limit: int, settings: Any, tokenizer: Any) -> None:
    ((family, _),) = select([task])
    chosen = settings(limit=limit, lengths="512,1024", shots="2,3", pairs="2", distances="0")
    assert family.count(task, chosen) == len(list(family.build(task, chosen, tokenizer)))


def test_progress_ends_where_a_corpus_does(
    settings: Any, tokenizer: Any, session: Any, monkeypatch: Any
) -> None:
    bars = []
    monkeypatch.setattr("eval.session.tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    ((family, _),) = select(["ppl"])
    chosen = settings(lengths="512", limit=30)
    answering = session(Oracle(tokenizer))
    records = answering.ask("ppl", lambda: family.questions("ppl", chosen, tokenizer))
    assert family.count("ppl", chosen) == 30
    assert [bar.total for bar in bars] == [len(records)] == [7]


def test_a_prompt_beyond_the_tokenizers_length_fails_and_nothing_is_cut(
    tmp_path: Path, tiny_folders: Any, tokenizer: Any, capsys: Any
) -> None:
    folder = tmp_path / "short"
    shutil.copytree(tiny_folders["gla"], folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 600}))
    command = [f"model={folder}", "tasks=passkey", "limit=1", "plots=false", f"output={tmp_path / 'o'}"]
    assert main([*command, "lengths=512,1024"]) == 2
    assert "lengths=1024: " in (told := capsys.readouterr().err)
    assert "allows 600" in told
    assert not (tmp_path / "o").exists()
    assert main(command) == 1  # its own lengths, of which 1K is the first
    assert "allows 600" in capsys.readouterr().err
    assert main([*command, "lengths=512"]) == 0
    assert main([*command, "lengths=512,1024", "allow_long=true"]) == 0
