"""`python -m models.expansion` and `python -m models.generate`, as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models import expand_state, load_pretrained
from models.expansion_command import main as expand
from models.generate import main as generate
from models.saving import save_published
from tests.models.tiny_models import tiny

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["<unk>", "<eos>", *(f"w{i}" for i in range(59))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders with tiny models of both families and a tokenizer of words."""
    word_level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level, unk_token="<unk>", eos_token="<eos>")
    made = {}
    for family in ("gla", "mamba2"):
        made[family] = tmp_path_factory.mktemp(family) / "model"
        tiny(family).save_pretrained(made[family])
        tokenizer.save_pretrained(made[family])
    return made


def test_expansion_command_saves_what_expand_state_makes(folders, tmp_path, capsys):
    out = tmp_path / "expanded"
    assert expand([f"in={folders['gla']}", f"out={out}", "--layers=0,3", "drop_mode=lora_4", "seed=5"]) == 0
    assert "2 layers expanded, 2 as they were" in capsys.readouterr().out
    expected = load_pretrained(folders["gla"])
    expand_state(expected, layers=[0, 3], drop_mode="lora_4", seed=5)
    saved = load_pretrained(out)
    assert saved.config.layers == expected.config.layers
    assert saved.state_dict().keys() == expected.state_dict().keys()
    assert all(
        torch.equal(tensor, expected.state_dict()[name]) for name, tensor in saved.state_dict().items()
    )
    assert AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"] == [3, 4]


def test_expansion_command_reads_the_published_layout(tmp_path, capsys):
    published = tmp_path / "published"
    save_published(tiny("mamba2"), published)
    assert expand([f"in={published}", f"out={tmp_path / 'out'}", "drop_prop=2"]) == 0
    assert load_pretrained(tmp_path / "out").config.layer_shape(2).drop_mode == "mamba4"
    assert "no tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["drop_prop=3"], "does not divide the 4 layers; use one of 1, 2, 4"),
        (["drop_prop=2", "drop_mode=mamba4"], "use one of gla, merge, qk_gla, lora_4, extend"),
        (["drop_prop=2", "reinit=fancy"], "use one of standard, published"),
        (["drop_prop=two"], "drop_prop='two' is not a whole number"),
        (["layers=0,x"], "layers='0,x' is not whole numbers with commas between"),
        (["drop_porp=2"], "unknown key 'drop_porp'; did you mean drop_prop?"),
        (["drop_prop=2", "drop_prop=4"], "drop_prop is given twice"),
        (["2"], "expected key=value, got '2'"),
        (["drop_prop=2", "seed=99999999999999999999"], "seed=99999999999999999999 must be a whole number"),
        ([], "give either drop_prop"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2_and_leaves_nothing(folders, tmp_path, capsys, words, message):
    out = tmp_path / "out"
    assert expand([f"in={folders['gla']}", f"out={out}", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_expansion_command_asks_for_what_is_missing(capsys):
    assert expand(["drop_prop=2"]) == 2
    assert "missing in=..., out=..." in capsys.readouterr().err


def test_expansion_command_refuses_a_folder_in_use(folders, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert expand([f"in={folders['gla']}", f"out={tmp_path}", "drop_prop=2"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_expansion_command_says_when_the_source_is_no_model(tmp_path, capsys):
    assert expand([f"in={tmp_path / 'nowhere'}", f"out={tmp_path / 'out'}", "drop_prop=2"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_commands_run_as_modules_without_warnings(folders, tmp_path):
    def run(module: str, *words: str, typed: str = "") -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-m", f"models.{module}", *words]
        return subprocess.run(command, input=typed, capture_output=True, text=True, cwd=ROOT, env=environment)

    out = tmp_path / "out"
    expanded = run("expansion", f"in={folders['mamba2']}", f"out={out}", "drop_prop=4", "drop_mode=extend")
    assert expanded.returncode == 0
    assert "Warning" not in expanded.stderr  # beside the progress of writing
    asked = (f"model={out}", "max_new_tokens=5", "device=cpu")
    after = run("generate", *asked, typed="w1 w2 w3")
    assert (after.returncode, after.stderr) == (0, "")
    assert after.stdout.startswith("w1 w2 w3")


def generated(capsys, folder: Path, *words: str) -> str:
    assert generate([f"model={folder}", "max_new_tokens=8", "device=cpu", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_generate_reads_a_prompt_in_pieces_of_any_size(folders, capsys, family):
    prompt = " ".join(f"w{i % 7}" for i in range(20))
    whole = generated(capsys, folders[family], f"prompt={prompt}")
    assert whole.startswith(prompt)
    assert len(whole.split()) > 20
    for piece in (1, 7, 19):
        assert generated(capsys, folders[family], f"prompt={prompt}", f"piece={piece}") == whole


def test_generate_takes_a_file_and_a_prompt_of_one_token(folders, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("w5")
    from_file = generated(capsys, folders["gla"], f"prompt_file={tmp_path / 'prompt.txt'}")
    assert from_file == generated(capsys, folders["gla"], "prompt=w5")


def test_generate_samples_by_its_seed(folders, capsys):
    words = ("prompt=w1 w2", "temperature=1", "top_p=0.95")
    first = generated(capsys, folders["gla"], *words, "seed=1")
    assert first == generated(capsys, folders["gla"], *words, "seed=1")
    assert first != generated(capsys, folders["gla"], *words, "seed=2")


def test_generate_runs_other_causal_models(folders, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    ).save_pretrained(tmp_path)
    words = ("prompt=w1 w2", f"tokenizer={folders['gla']}")
    assert generated(capsys, tmp_path, *words).startswith("w1 w2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=w1", "prompt_file=x"], "not both"),
        (["prompt=w1", "max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        (["prompt=w1", "top_p=1.5"], "top_p=1.5 must be above 0 and at most 1"),
        (["prompt=w1", "dtype=int12"], "dtype='int12' is no type of torch"),
        (["prompt_file=/nowhere/at/all"], "/nowhere/at/all"),
        (["prompt=", "device=cpu"], "the prompt is empty"),
        (["prompt=w1", "device=nonsense"], "device='nonsense' cannot be used here"),
        (["prompt=w1", "device=meta"], "device=meta holds shapes alone"),
        (["prompt=w1", "seed=-1"], "seed=-1 must be a whole number"),
        (["prompt=w1", "temperature=nan"], "temperature=nan must be 0 (greedy) or above"),
    ],
)
def test_generate_says_what_is_wrong(folders, capsys, words, message):
    assert generate([f"model={folders['gla']}", *words]) == 2
    assert message in capsys.readouterr().err


def test_generate_says_that_a_tokenizer_knows_more_tokens_than_the_model(folders, tmp_path, capsys):
    tiny("gla", vocab_size=3).save_pretrained(tmp_path)
    assert generate([f"model={tmp_path}", "prompt=w1 w9", f"tokenizer={folders['gla']}"]) == 2
    assert "token 11, but the model knows 3 tokens" in capsys.readouterr().err


def test_generate_names_the_file_that_it_cannot_read(folders, tmp_path, capsys):
    prompt, tokenizer = tmp_path / "prompt.txt", tmp_path / "tokenizer.json"
    prompt.write_bytes(b"\xff\xfe")
    tokenizer.write_text("{")
    assert generate([f"model={folders['gla']}", f"prompt_file={prompt}"]) == 2
    assert f"prompt_file={prompt} is no UTF-8 text" in capsys.readouterr().err
    assert generate([f"model={folders['gla']}", "prompt=w1", f"tokenizer={tmp_path}"]) == 2
    assert f"the tokenizer in {tmp_path} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[1]", "{"])
def test_generate_says_that_a_config_is_broken(folders, tmp_path, capsys, content):
    (tmp_path / "config.json").write_text(content)
    assert generate([f"model={tmp_path}", "prompt=w1", f"tokenizer={folders['gla']}"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_none_is_a_prompt_too(folders, capsys):
    assert generated(capsys, folders["gla"], "prompt=none").strip()


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(folders, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    assert expand([f"in={folders['gla']}", f"out={tmp_path / 'out'}", "drop_prop=2"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_generate_wants_a_model_folder_and_a_tokenizer(tmp_path, capsys):
    assert generate([f"model={tmp_path}", "prompt=x"]) == 2
    assert "it has no config.json" in capsys.readouterr().err
    tiny("gla").save_pretrained(tmp_path / "model")
    assert generate([f"model={tmp_path / 'model'}", "prompt=x"]) == 2
    assert "give tokenizer=FOLDER" in capsys.readouterr().err
