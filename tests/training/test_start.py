"""What trains: the same weights whatever happens beside them, and a shape that is known before they are."""

import subprocess
import sys

import pytest
import torch

from training.config import REPOSITORY, ConfigError, parse_arguments
from training.start import start_model, start_model_beside, start_shape


@pytest.mark.parametrize("model_name", ["gla-tiny", "mamba2-tiny"])
def test_the_shape_and_the_weights_made_in_a_thread_are_those_of_the_model(model_name, tmp_path):
    scratch = parse_arguments(["init_from=scratch", f"model_name={model_name}", "seed=3", "drop_prop=2"])
    start_model(parse_arguments(["init_from=scratch", f"model_name={model_name}"]), None).save_pretrained(
        tmp_path / "weights"
    )
    pretrained = parse_arguments(
        [f"model_name={model_name}", f"ckpt_path={tmp_path / 'weights'}", "layers=1"]
    )
    start_model(scratch, None).save_pretrained(tmp_path / "ckpt_1")
    for config, checkpoint in ((scratch, None), (pretrained, None), (scratch, tmp_path / "ckpt_1")):
        expected = start_model(config, checkpoint)
        coming = start_model_beside(config, checkpoint)
        shape = start_shape(config, checkpoint)
        torch.randn(10)  # the process's own generator, which the weights do not follow
        state = coming.result().state_dict()
        assert shape.config.layers == expected.config.layers
        assert {name: tensor.shape for name, tensor in shape.state_dict().items()} == {
            name: tensor.shape for name, tensor in expected.state_dict().items()
        }
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


def test_weights_that_cannot_be_read_are_told_to_whoever_waits_for_them(tmp_path):
    config = parse_arguments(["model_name=gla-tiny", f"ckpt_path={tmp_path / 'none'}"])
    with pytest.raises(ConfigError, match="is no folder"):
        start_model_beside(config, None).result()


@pytest.mark.parametrize(
    ("breaks", "status", "answer"),
    [
        ("", 2, "error: tokenizer: "),
        (
            "training.session.open_run = training.validate.check_files = lambda *_: None",
            2,
            "error: tokenizer: ",
        ),
        ("training.validate.check_files = lambda _: 1 / 0", 1, "ZeroDivisionError"),
        (
            "training.validate.check_files = lambda _: signal.raise_signal(signal.SIGINT)",
            1,
            "KeyboardInterrupt",
        ),
    ],
)
def test_a_start_that_fails_does_not_wait_for_the_weights(breaks, status, answer, tmp_path):
    program = f"""
import runpy, signal, time
import training.session, training.start, training.validate
training.start.start_model = lambda *_: time.sleep(600)
{breaks}
runpy.run_path("train.py", run_name="__main__")
"""
    arguments = ["launch=cpu", "model_name=gla-tiny", "init_from=scratch", f"output_dir={tmp_path}"]
    arguments += ["train_config=tiny", f"data_path={tmp_path}", f"tokenizer={tmp_path / 'none'}"]
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == status, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(answer)
