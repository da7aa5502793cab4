"""The recall study at a micro size: from a configuration to the page, stopped and killed on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data.quickstart
from benchmarks.recall_study import pool, report
from benchmarks.recall_study.__main__ import main
from benchmarks.recall_study.arms import expand, main_arms, parse_arm, sweep_arms
from benchmarks.recall_study.corpus import _prompt, load_corpus, sizes_at
from benchmarks.recall_study.jobs import open_jobs
from benchmarks.recall_study.measure import mean_recall
from benchmarks.recall_study.runs import Bench, Job, base_file, build_base, run_job
from benchmarks.recall_study.settings import REPOSITORY, from_dict, read_settings, to_dict
from benchmarks.recall_study.store import Store, key_of, read_records
from models import build_model

MICRO = {
    "families": ["gla"],
    "arms": {"gla": ["LPT", "extend"], "mamba2": ["LPT", "mamba4:published"]},
    "layers": [],
    "sweep": [2],
    "sweep_best": 1,
    "curriculum_steps": 0,
    "own": {},
    "seeds": [0, 1],
    "first_seeds": 1,
    "sequence_length": 40,
    "rows": 4,
    "recall_rows": 3,
    "train_pairs": [2, 4],
    "eval_pairs": [2, 4],
    "eval_rows": 4,
    "text_eval_rows": 4,
    "recall_pool_rows": 32,
    "text_vocabulary": 400,
    "base_steps": 10,
    "base_min_steps": 4,
    "base_decay_steps": 5,
    "base_eval_every": 5,
    "plateau_window": 1,
    "post_steps": 20,
    "post_eval_every": 10,
    "post_early_evals": [5],
    "warmup_steps": 2,
    "cost_steps": 2,
}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2}
MODELS = {
    "gla": {"model_type": "statex_gla", **SIZES, "num_heads": 2, "intermediate_size": 16},
    "mamba2": {"model_type": "statex_mamba2", **SIZES, "num_heads": 2, "head_dim": 16, "state_size": 4},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the micro corpus, made from a few files of the library."""
    folder = tmp_path_factory.mktemp("study")
    few = [
        (name, path) for name, path in data.quickstart.source_files() if name.startswith(("json/", "email/"))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.quickstart, "source_files", lambda: few)
        patch.setattr(data.quickstart, "is_validation", lambda name: name.endswith("r.py"))
        load_corpus(micro(), folder, "cpu")
    return folder


def micro(**changes):
    values = json.loads((REPOSITORY / "configs/study/cpu.json").read_text())
    return from_dict(values | MICRO | {"name": "micro", "models": MODELS} | changes)


@pytest.fixture
def command(work, tmp_path):
    """Arguments of the micro study with a results file of its own."""
    config = tmp_path / "micro.json"
    config.write_text(json.dumps(to_dict(micro())))
    (tmp_path / "results").mkdir()
    return [f"config={config}", f"results={tmp_path}/results/micro.jsonl", f"work={tmp_path}/work"]


@pytest.fixture
def cached(work, tmp_path):
    """A work folder of one test that finds the corpus made."""
    (tmp_path / "work").mkdir()
    for file in work.glob("corpus-*.pt"):
        (tmp_path / "work" / file.name).hardlink_to(file)
    return tmp_path / "work"


@pytest.fixture
def signals():
    """A shard listens to signals; tests leave them as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def bench_of(settings, folder: Path, stopped=lambda: False) -> Bench:
    return pool.make_bench(settings, folder, stopped)


# ------------------------------------------------------------------------------------------------ end to end


@pytest.mark.usefixtures("signals")
def test_the_whole_study_and_nothing_twice(command, cached, tmp_path):
    assert main(command) == 0
    file = tmp_path / "results/micro.jsonl"
    keys = [key_of(record) for record in read_records(file)]
    arms = [key[2:] for key in keys if key[0] == "arm"]
    assert len(keys) == len(set(keys))
    assert sorted(arms) == sorted((s, a) for s in (0, 1) for a in ("LPT", "extend", "extend/prop2"))
    assert {key[3] for key in keys if key[0] == "cost"} == {"LPT", "extend", "extend/prop2"}

    before = file.read_bytes()
    assert main(command) == 0
    assert file.read_bytes() == before

    arm = next(r for r in read_records(file) if r.get("arm") == "extend" and r["kind"] == "arm")
    assert [point["step"] for point in arm["curve"]] == [0, 5, 10, 20]
    assert set(arm["curve"][0]["recall"]) == {"2", "4"}

    page = tmp_path / "docs/results.md"
    build = [f"results={tmp_path}/results", f"page={page}", f"figures={tmp_path}/docs/results"]
    assert report.main(build) == 0
    page.write_text(page.read_text().replace(report.BEGIN, report.BEGIN + "\nWhat a person saw."))
    assert report.main(build) == 0
    text = page.read_text()
    assert text.count("What a person saw.") == 1
    assert "has not been run yet" in text  # on a GPU
    assert "| `extend` | drop_prop=2 |" in text
    gain = {seed: _end_of(file, seed, "extend") - _end_of(file, seed, "LPT") for seed in (0, 1)}
    assert f"| `extend` | {gain[0]:+.3f} | {gain[1]:+.3f} | - |" in text  # no base has learned the task
    for link in ("along", "pairs", "gain"):
        assert list((tmp_path / "docs/results").glob(f"micro-*-gla-{link}.png"))


def _end_of(file: Path, seed: int, arm: str) -> float:
    records = (r for r in read_records(file) if r["kind"] == "arm")
    return mean_recall(next(r for r in records if (r["seed"], r["arm"]) == (seed, arm))["curve"][-1])


@pytest.mark.usefixtures("signals")
def test_a_killed_shard_loses_nothing_finished(command, cached, tmp_path):
    file = tmp_path / "results/micro.jsonl"
    shard = [sys.executable, "-m", "benchmarks.recall_study", *command, "workers=2"]
    process = subprocess.Popen(shard, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(record["kind"] == "base" for record in read_records(file)):
        assert process.poll() is None, "the shard ended by itself"
        time.sleep(0.02)
    process.kill()
    process.wait()
    with open(file, "ab") as out:
        out.write(b'{"kind": "arm", "fam')  # what a kill may leave
    finished = file.read_bytes().rpartition(b"\n")[0]

    assert main([*command, "cost_steps=0"]) == 0
    assert file.read_bytes().startswith(finished + b"\n")
    keys = [key_of(record) for record in read_records(file)]
    assert len(keys) == len(set(keys))
    assert sum(key[0] == "arm" for key in keys) == 6


@pytest.mark.usefixtures("signals")
def test_a_study_goes_on_elsewhere_from_its_records_and_weights(command, cached, tmp_path):
    """What has to come along: the raw file, and of the work folder all but the corpus."""
    command = [*command, "cost_steps=0", "sweep_best=0", "seeds=0"]
    settings = read_settings(tmp_path / "micro.json")
    assert main([*command, "arms.gla=LPT"]) == 0
    here = bench_of(settings, cached)
    looks = iter([False, True])
    assert run_job(Job("arm", "gla", 0, "extend"), replace(here, stopped=lambda: next(looks))) is None

    (tmp_path / "elsewhere").mkdir()
    for file in cached.glob("corpus-*"):  # another machine makes the same one
        (tmp_path / "elsewhere" / file.name).hardlink_to(file)
    shutil.copytree(here.work, tmp_path / "elsewhere" / here.work.name)
    shutil.rmtree(cached)
    assert main([*command, f"work={tmp_path}/elsewhere"]) == 0
    keys = [key_of(record) for record in read_records(tmp_path / "results/micro.jsonl")]
    assert [key[0] for key in keys] == ["settings", "base", "arm", "arm"]  # no second base
    assert not list((tmp_path / "elsewhere" / here.work.name).glob("partial-*"))  # it went on from there


@pytest.mark.usefixtures("signals")
def test_time_up_is_status_3_and_leaves_runs_to_do(command, cached):
    assert main([*command, "shard_seconds=1", "grace_seconds=1"]) == 3


@pytest.mark.usefixtures("signals")
def test_a_signal_ends_a_shard_early():
    clock = pool.Clock(seconds=1000, grace=10)
    clock.listen()
    assert not clock.stopped()
    os.kill(os.getpid(), signal.SIGTERM)
    assert clock.stopped()
    assert not clock.over()


@pytest.mark.parametrize("kind", ["base", "arm"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(kind, cached, tmp_path):
    settings, looks = micro(), iter([False, False, True])
    (tmp_path / "other").mkdir()
    for file in cached.glob("corpus-*"):
        (tmp_path / "other" / file.name).hardlink_to(file)
    whole, parts = bench_of(settings, cached), bench_of(settings, tmp_path / "other")
    job = Job(kind, "gla", 0, "extend" if kind == "arm" else "")
    if kind == "arm":
        for bench in (whole, parts):
            run_job(Job("base", "gla", 0), bench)
    expected = run_job(job, whole)
    stopping = bench_of(settings, tmp_path / "other", lambda: next(looks))
    assert run_job(job, stopping) is None
    assert run_job(job, parts)["curve"] == expected["curve"]


def test_a_failing_run_does_not_stop_the_others(cached):
    bench = bench_of(micro(), cached)
    status, text = pool.attempt(Job("arm", "gla", 0, "no_such_mode"), bench)
    assert status == "failed"
    assert "Traceback" in text


# ----------------------------------------------------------------------------------- settings, records, jobs


def test_the_fingerprint_names_what_changes_numbers():
    assert (
        micro().fingerprint == micro(seeds=[3], workers=4, shard_seconds=9, families=["mamba2"]).fingerprint
    )
    changed = [micro(post_steps=21), micro(base_lr=1e-4), micro(train_pairs=[2])]
    assert len({s.fingerprint for s in (micro(), *changed)}) == 4


def test_settings_that_came_later_keep_older_fingerprints():
    """The fingerprint of committed records is the one that their settings, without the later keys, have."""
    records = read_records(REPOSITORY / "benchmarks/recall_study/results/cpu.jsonl")
    assert from_dict(records[0]["settings"]).fingerprint == records[0]["fingerprint"]
    plain = {"first_gate_width": 1.0, "embedding_width": 1.0, "keys_per_pair": 0}
    default = micro(curriculum_steps=0, own={}, layers=[], **plain)
    changed = [
        *(micro(first_gate_width=4), micro(embedding_width=4), micro(curriculum_steps=1), micro(layers=[1])),
        *(micro(own={"gla": {"base_lr": 1e-4}}), micro(keys_per_pair=2)),
    ]
    assert len({s.fingerprint for s in (micro(), default, *changed)}) == 7


def test_a_family_may_have_a_few_settings_of_its_own():
    settings = micro(own={"gla": {"base_lr": 0.5, "first_gate_width": 8}})
    assert (settings.of("gla").base_lr, settings.of("gla").first_gate_width) == (0.5, 8.0)
    assert settings.of("mamba2") == micro()
    assert from_dict(to_dict(settings)) == settings
    for own, message in (
        ({"gla": {"rows": 2}}, "own.gla.rows"),
        ({"gla": {"base_lr": "high"}}, "base_lr"),
        ({"gla": {"base_lr": -1.0}}, "base_lr"),
        ({"rwkv": {"base_lr": 1.0}}, "own.rwkv"),
    ):
        with pytest.raises(ValueError, match=message):
            micro(own=own)


def test_records_of_another_fingerprint_or_corpus_are_not_mixed_in(tmp_path):
    file = tmp_path / "r.jsonl"
    run = {"kind": "arm", "family": "gla", "seed": 0, "arm": "LPT", "corpus": "a"}
    Store(file, "one", {}).append(run)
    assert Store(file, "two", {}).newest("arm", "gla", 0, "LPT") is None
    assert Store(file, "one", {}).newest("arm", "gla", 0, "LPT")["corpus"] == "a"
    with pytest.raises(ValueError, match="results=FILE"):
        Store(file, "one", {}).check_corpus("b")


def test_an_arm_waits_for_its_base_and_a_lost_base_is_made_again(tmp_path):
    settings = micro(seeds=[0], cost_steps=0)
    store = Store(tmp_path / "r.jsonl", settings.fingerprint, {})
    base = Job("base", "gla", 0)
    assert open_jobs(settings, store, tmp_path) == [base]
    store.append({"kind": "base", "family": "gla", "seed": 0, "arm": ""})
    assert open_jobs(settings, store, tmp_path) == [base]  # recorded, but its weights are gone
    base_file(base, tmp_path).touch()
    arms = [Job("arm", "gla", 0, name) for name in ("LPT", "extend")]
    assert open_jobs(settings, store, tmp_path) == arms
    for arm in arms:
        store.append({"kind": "arm", "family": "gla", "seed": 0, "arm": arm.arm})
    base_file(base, tmp_path).unlink()
    assert open_jobs(settings, store, tmp_path) == []  # nothing needs the base any more


def test_further_seeds_wait_for_the_first(tmp_path):
    settings = micro(seeds=[0, 1], first_seeds=1, cost_steps=0, sweep_best=0)
    store = Store(tmp_path / "r.jsonl", settings.fingerprint, {})
    first, second = (Job("base", "gla", seed) for seed in (0, 1))
    assert open_jobs(settings, store, tmp_path) == [first]
    for kind, arm in (("base", ""), ("arm", "LPT")):
        store.append({"kind": kind, "family": "gla", "seed": 0, "arm": arm})
    assert second not in open_jobs(settings, store, tmp_path)
    failed = {Job("arm", "gla", 0, "extend")}
    assert open_jobs(settings, store, tmp_path, failed) == [second]


@pytest.mark.parametrize(
    "argument",
    [
        *("sedes=1", "workers=many", "train_pairs=500", "nonsense", "config=/no"),
        *("arms.gla=LPT,extent", "arms.gla=extend/layer2", "arms.gla=mamba4"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(argument, command, capsys):
    assert main([*command, argument]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# -------------------------------------------------------------------------------------------- arms and data


@pytest.mark.parametrize("name", ["gpu", "cpu"])
@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_every_arm_can_be_built_at_sizes_that_kernels_take(name, family):
    settings = read_settings(f"configs/study/{name}.json")
    arms = main_arms(settings, family)
    arms += sweep_arms(settings, [arm.name for arm in arms if arm.mode and not arm.where])
    assert len({arm.name for arm in arms}) == len(arms)
    for arm in arms:
        assert parse_arm(arm.name) == arm
        model = build_model(settings.models[family] | {"vocab_size": 64}, device="meta")
        before = sum(block.token_mixer.state_elements() for block in model.blocks)
        expand(model, arm, settings, seed=0)
        after = sum(block.token_mixer.state_elements() for block in model.blocks)
        assert (after > before) == (arm.mode is not None)
        assert name == "cpu" or all(
            map(fits_kernels, map(model.config.layer_shape, range(len(model.blocks))))
        )


def fits_kernels(shape) -> bool:
    """Powers of two from 16 on; the widest state of a head that this repository's kernels take is 512."""
    names = ("head_k_dim", "head_v_dim") if hasattr(shape, "head_k_dim") else ("state_size",)
    sizes = [getattr(shape, names[0]) * shape.state_map, *(getattr(shape, n) for n in names)]
    return all(16 <= size <= 512 and size & (size - 1) == 0 for size in sizes)


def test_both_families_run_with_published_resets(cached):
    settings = micro(families=["mamba2"])
    bench = bench_of(settings, cached)
    run_job(Job("base", "mamba2", 0), bench)
    record = run_job(Job("arm", "mamba2", 0, "mamba4:published"), bench)
    assert record["steps"] == 20
    assert not record["diverged"]


def test_all_arms_of_a_seed_read_the_same_tokens(cached):
    settings = micro()
    corpus = load_corpus(settings, cached, "cpu")
    first = corpus.batch(settings, 0, "post", 1)
    assert all(torch.equal(a, b) for a, b in zip(first, corpus.batch(settings, 0, "post", 1)))
    for other in ((1, "post", 1), (0, "base", 1), (0, "post", 2)):
        assert not torch.equal(first[0], corpus.batch(settings, *other)[0])


def test_a_curriculum_begins_with_the_fewest_pairs(cached):
    settings = micro(curriculum_steps=8)
    assert [sizes_at(settings, step) for step in (0, 7, 8, 100)] == [1, 1, 2, 2]
    corpus = load_corpus(settings, cached, "cpu")
    short = {tuple(row) for row in corpus.pool[::2].tolist()}  # row r is of size r % 2
    rows = settings.recall_rows
    assert {
        tuple(row) for s in range(8) for row in corpus.batch(settings, 0, "base", s)[0][:rows].tolist()
    } <= short
    for phase, step in (("base", 8), ("post", 1)):  # as without a curriculum
        both = [corpus.batch(s, 0, phase, step)[0] for s in (settings, micro())]
        assert torch.equal(*both)
    with pytest.raises(ValueError, match="must rise"):
        micro(curriculum_steps=8, train_pairs=[4, 2])


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_only_the_first_forget_gate_of_gla_is_widened(family, cached):
    bench, job = bench_of(micro(), cached), Job("base", family, 0)
    wider = build_base(job, bench_of(micro(first_gate_width=4.0), cached)).state_dict()
    for name, tensor in build_base(job, bench).state_dict().items():
        factor = 4.0 if "layers.0.attn.gk_proj" in name else 1.0
        assert torch.equal(wider[name], factor * tensor)


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_embeddings_may_begin_wider(family, cached):
    bench, job = bench_of(micro(), cached), Job("base", family, 0)
    plain, wider = (
        build_base(job, replace(bench, settings=micro(embedding_width=w))).get_input_embeddings().weight
        for w in (1.0, 3.0)
    )
    assert torch.equal(wider, 3.0 * plain)


def test_arms_expand_the_layers_that_the_settings_name():
    """An arm with a drop_prop or a layer of its own follows that; a family may have its own layers."""
    settings = micro(own={"gla": {"layers": [1]}}, sweep=[1, 2]).of("gla")
    assert settings.layers == (1,)
    assert [arm.name for arm in sweep_arms(settings, ["extend"])] == ["extend/prop1", "extend/prop2"]
    wanted_layers = {"extend": [1], "extend/prop1": [0, 1], "extend/prop2": [0], "extend/layer0": [0]}
    for name, wanted in wanted_layers.items():
        model = build_model(MODELS["gla"] | {"vocab_size": 50}, seed=0)
        before = [layer["head_k_dim"] for layer in model.config.layers]
        expand(model, parse_arm(name), settings, seed=0)
        after = [layer["head_k_dim"] for layer in model.config.layers]
        assert [i for i in range(2) if after[i] != before[i]] == wanted
    assert not sweep_arms(micro(drop_prop=2, sweep=[2]), ["extend"])


@pytest.mark.parametrize(
    "name", ["extend/", "extend/prop", "extend/layerx", "extend/2", "mamba4:published/1"]
)
def test_arms_that_cannot_be_read_are_refused(name):
    with pytest.raises(ValueError, match="MODE/propN or MODE/layerN"):
        parse_arm(name)


def test_a_row_of_recall_is_one_example_that_fills_it(cached):
    """So that no earlier pairs are in the state, and no answer can be found by ruling out those before."""
    settings = micro()
    corpus = load_corpus(settings, cached, "cpu")
    for row, labels in enumerate(corpus.pool_labels.tolist()):
        pairs = settings.train_pairs[row % 2]
        asked = [t for t, label in enumerate(labels) if label != -100]
        assert asked == list(range(2 * pairs + 2, 2 * pairs + 2 + 2 * len(asked), 2))
        assert len(asked) == (settings.sequence_length - 1 - 2 * pairs) // 2 > pairs
    for test in corpus.tests:
        assert test.answers.shape == (4, min(settings.eval_queries, (39 - 2 * test.pairs) // 2))


@pytest.mark.parametrize(("keys_per_pair", "most"), [(0, (24, 24)), (3, (6, 12)), (9, (18, 24))])
def test_small_examples_may_have_few_keys(keys_per_pair, most):
    settings = micro(keys_per_pair=keys_per_pair)
    assert settings.n_keys == 24
    for pairs, allowed in zip(settings.train_pairs, most):
        prompts = (_prompt(settings, 100, 0, 1, i, pairs, 1)[0] for i in range(200))
        keys = {key - 100 for ids in prompts for key in ids[1 : 1 + 2 * pairs : 2]}
        assert keys == set(range(allowed))


def test_labels_of_recall_are_the_answers(cached):
    """Read without the generator: the last value that followed a key is what the label asks for."""
    corpus = load_corpus(micro(), cached, "cpu")
    for tokens, labels in zip(corpus.pool.tolist(), corpus.pool_labels.tolist()):
        asked = [t for t, label in enumerate(labels) if label != -100]
        assert len(asked) >= 4
        for t in asked:
            earlier = max(i for i in range(t - 1) if tokens[i] == tokens[t - 1])
            assert labels[t] == tokens[t] == tokens[earlier + 1]
