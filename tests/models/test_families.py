"""A third family is one file: the one that docs/families.md prints, put beside the others."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
USE = """
import torch
from transformers import AutoModelForCausalLM
from models import build_model, expand_state, load_pretrained, state_report
config = {"model_type": "statex_retnet", "hidden_size": 32, "num_heads": 2, "num_hidden_layers": 4}
config |= {"vocab_size": 61}
model = build_model(config).eval()
before = state_report(model).total_elements
expand_state(model, drop_prop=2, drop_mode="merge")
assert (before, state_report(model).total_elements) == (4 * 2 * 16**2, 2 * 2 * 16**2 + 2 * 32**2)
ids = torch.arange(20).view(2, 10)
logits = model(ids).logits
model.save_pretrained("saved")
for loaded in (AutoModelForCausalLM.from_pretrained("saved"), load_pretrained("saved")):
    assert torch.equal(loaded(ids).logits, logits)
assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 13)
model.set_recompute("full")
model.bfloat16()(ids, labels=ids).loss.backward()
"""


def test_the_family_of_the_docs_works_from_its_one_file(tmp_path):
    source = re.search(r"```python\n(.*?)```", (REPOSITORY / "docs/families.md").read_text(), re.DOTALL)[1]
    shutil.copytree(REPOSITORY / "models", tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "models" / "retnet.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
