"""The stream: complete, the same at any number of ranks and workers, and resumed to the token."""

import copy
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data import TrainingLoader, merge_states, open_corpus, slots_of_rank
from data.encoding import Encoder
from data.feeds import TextFeed
from data.health import Health
from tests.data.corpora import compress, make_corpus, rows, take, write_jsonl

MAX_LEN, N_SLOTS = 96, 4


def loader(corpus, tokenizer, rank=0, world_size=1, **settings):
    settings = {"max_len": MAX_LEN, "n_slots": N_SLOTS, "seed": 3, **settings}
    slots = slots_of_rank(settings["n_slots"], rank, world_size)
    return TrainingLoader(corpus, tokenizer, slots=slots, **settings)


def global_steps(corpus, tokenizer, n_steps, world_size=1, **settings):
    """Rows of `n_steps` steps, all ranks in order."""
    ranks = [loader(corpus, tokenizer, rank, world_size, **settings) for rank in range(world_size)]
    batches = [take(rank, n_steps * rank.batches_per_step) for rank in ranks]
    share = [rank.batches_per_step for rank in ranks]
    return [
        rows([batch for own, n in zip(batches, share) for batch in own[step * n : (step + 1) * n]])
        for step in range(n_steps)
    ]


@pytest.fixture(scope="module")
def reference(corpus, tokenizer):
    """Three epochs' worth of steps from one rank without workers."""
    return global_steps(corpus, tokenizer, 60)


def slot_streams(steps):
    streams = {}
    for slot, ids in (row for step in steps for row in step):
        streams.setdefault(slot, []).extend(ids)
    return streams


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, {"num_workers": 3}),
        (2, {}),
        (4, {"num_workers": 1}),
        (1, {"micro_batch_size": 4}),
        (2, {"micro_batch_size": 2, "num_workers": 2}),
    ],
)
def test_global_batch_is_the_same_for_any_ranks_workers_and_accumulation(
    corpus, tokenizer, reference, world_size, settings
):
    assert global_steps(corpus, tokenizer, 20, world_size, **settings) == reference[:20]


def test_every_document_of_an_epoch_is_read_exactly_once(corpus, tokenizer, texts):
    steps = global_steps(corpus, tokenizer, 60, world_size=2, num_workers=2)
    seen = []
    for stream in slot_streams(steps).values():
        documents = tokenizer.decode(stream).split("<|endoftext|>")[:-1]
        first_repeat = next(i for i, text in enumerate(documents) if text in documents[:i])
        seen += documents[:first_repeat]
    assert sorted(seen) == sorted(texts)


def test_slot_streams_are_contiguous_documents_in_the_order_of_the_epoch(corpus, tokenizer, reference):
    """Carrying a recurrent state needs it: nothing lies between two sequences of a slot, nothing is lost."""
    names = [file.name for file in open_corpus(corpus).files]
    order = sorted(names, key=lambda name: hashlib.sha256(f"3:0:{name}".encode()).digest())
    lines = [
        json.loads(line)["text"]
        for name in order
        for line in (corpus / f"{name}.jsonl").read_text().splitlines()
    ]
    for slot, stream in slot_streams(reference).items():
        expected = "".join(text + "<|endoftext|>" for text in lines[slot::N_SLOTS] if text)
        assert tokenizer.decode(stream).startswith(expected)


def test_epochs_and_seeds_shuffle_the_files(corpus, tokenizer, reference):
    other = global_steps(corpus, tokenizer, 2, seed=4)
    assert other != reference[:2]
    streams = slot_streams(reference)
    assert any(
        stream[:500] not in (stream[i : i + 500] for i in range(1, 3000)) for stream in streams.values()
    )


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_corpus_gives_the_same_stream(corpus, tokenizer, reference, tmp_path, kind):
    assert global_steps(compress(corpus, tmp_path, kind), tokenizer, 30) == reference[:30]


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst"])
def test_resume_at_random_positions_goes_on_to_the_token(corpus, tokenizer, reference, tmp_path, kind):
    source = corpus if kind == "jsonl" else compress(corpus, tmp_path, kind)
    for stop in random.Random(kind).sample(range(1, 200), 5):
        first = loader(source, tokenizer, num_workers=2 if stop % 2 else 0)
        take(first, stop)  # in the middle of a step, too
        second = loader(source, tokenizer)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        flat = [row for step in reference for row in step]
        assert rows(take(second, 12)) == flat[stop : stop + 12]
        assert second.state_dict()["positions"].keys() == first.state_dict()["positions"].keys()


def test_iterating_again_goes_on(corpus, tokenizer, reference):
    one = loader(corpus, tokenizer)
    assert [rows(take(one, N_SLOTS)), rows(take(one, N_SLOTS))] == reference[:2]


def test_resume_on_another_number_of_ranks(corpus, tokenizer, reference):
    ranks = [loader(corpus, tokenizer, rank, 4) for rank in range(4)]
    for rank in ranks:
        take(rank, 7)
    state = merge_states([rank.state_dict() for rank in ranks])
    pair = [loader(corpus, tokenizer, rank, 2, micro_batch_size=2) for rank in range(2)]
    for rank in pair:
        rank.load_state_dict(state)
    assert [row for rank in pair for row in rows(take(rank, 1))] == reference[7]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"seed": 9}, {}, "seed 9, this run 3"),
        ({}, {"n_slots": 8, "max_len": 16}, "n_slots 4, this run 8"),
        ({"corpus": "x"}, {}, "has corpus"),
        ({"tokenizer": "x"}, {}, "has tokenizer"),
        ({"positions": {}}, {}, "lacks slots 0, 1, 2, 3"),
    ],
)
def test_state_of_another_run_is_refused(corpus, tokenizer, change, settings, message):
    state = {**loader(corpus, tokenizer).state_dict(), **change}
    with pytest.raises(ValueError, match=message):
        loader(corpus, tokenizer, **settings).load_state_dict(state)


def test_state_in_the_middle_of_a_step_needs_the_same_split(corpus, tokenizer):
    first = loader(corpus, tokenizer)
    take(first, 5)
    with pytest.raises(ValueError, match="middle of a step"):
        loader(corpus, tokenizer, micro_batch_size=2).load_state_dict(first.state_dict())


def test_document_that_changed_under_a_position_is_noticed(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x" * 100, "y" * 100])
    first = loader(tmp_path, tokenizer, n_slots=1, max_len=90)
    take(first, 1)
    write_jsonl(tmp_path / "a.jsonl", ["x" * 20, "y" * 300])
    second = loader(tmp_path, tokenizer, n_slots=1, max_len=90)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="line 1 of a, which now holds other text"):
        take(second, 1)


def test_reset_at_documents_bounds_every_document_and_row(corpus, tokenizer, reference):
    batch = take(loader(corpus, tokenizer, micro_batch_size=4, reset_at_documents=True), 1)[0]
    flat = torch.tensor([ids for _, ids in reference[0]]).reshape(1, -1)
    assert torch.equal(batch["input_ids"], flat)
    assert batch["cu_seqlens"].dtype == torch.int32
    after_end = (torch.nonzero(flat[0] == tokenizer.eos_token_id).flatten() + 1).tolist()
    borders = sorted({*after_end, *range(0, flat.numel() + 1, MAX_LEN)})
    assert batch["cu_seqlens"].tolist() == borders
    first = torch.zeros_like(flat, dtype=torch.bool)
    first[0, borders[:-1]] = True
    assert torch.equal(batch["labels"], flat.masked_fill(first, -100))


def test_without_reset_labels_are_the_tokens(corpus, tokenizer):
    batch = take(loader(corpus, tokenizer, micro_batch_size=2), 1)[0]
    assert batch["input_ids"].shape == (2, MAX_LEN)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert "cu_seqlens" not in batch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_len": 0}, "max_len is 0"),
        ({"micro_batch_size": 3}, "do not divide into micro-batches of 3"),
        ({"n_slots": 6, "world_size": 4}, "do not divide among 4 ranks"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(corpus, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        loader(corpus, tokenizer, **settings)


def test_one_short_document_cannot_fill_a_step(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["ten tokens"])
    with pytest.raises(
        ValueError, match=r"holds 11 tokens in 1 documents, one step needs 384 \(4 sequences of 96\)"
    ):
        loader(tmp_path, tokenizer)


def test_too_small_for_what_is_broken_says_so(tokenizer, tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(b"this is no compressed data")
    with pytest.raises(ValueError, match=r"too small.*1 broken line.*a:1: does not decompress"):
        TrainingLoader(tmp_path, tokenizer, max_len=64, n_slots=1)


def test_slot_without_a_document_is_an_error_not_a_hang(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x" * 1000, "", "y" * 1000, "z"])
    with pytest.raises(ValueError, match="slot 1 of 4 found no document"):
        loader(tmp_path, tokenizer)
    # the same found while reading: files may change after the check
    starts = dict.fromkeys(range(4))
    feed = TextFeed(
        open_corpus(tmp_path), Encoder(tokenizer), seed=0, n_slots=4, starts=starts, health=Health()
    )
    with pytest.raises(ValueError, match="slot 1 of 4 found no document"):
        feed.next(1)


def test_tokenizer_without_end_of_text_is_refused(corpus, tokenizer):
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        loader(corpus, without)


def test_slots_that_drift_apart_read_on_their_own_with_the_same_documents(corpus, tokenizer):
    def documents(max_queued_bytes):
        feed = TextFeed(
            open_corpus(corpus),
            Encoder(tokenizer),
            seed=0,
            n_slots=3,
            starts=dict.fromkeys(range(3)),
            health=Health(),
            max_queued_bytes=max_queued_bytes,
        )
        order = [0] * 150 + [1] * 80 + [2] * 150 + [1] * 20
        return [feed.next(slot).tokens.tolist() for slot in order]

    assert documents(max_queued_bytes=2000) == documents(max_queued_bytes=1 << 30)


def test_error_in_a_worker_reaches_the_parent_as_one_line(tokenizer, tmp_path):
    make_corpus(tmp_path)
    with open(tmp_path / "chunk1" / "part_0.jsonl", "a") as file:
        file.writelines("broken\n" for _ in range(30))
    with pytest.raises(ValueError, match="lines read are broken") as caught:
        take(loader(tmp_path, tokenizer, num_workers=2, on_broken_line=lambda report: None), 100)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_vanishes_is_one_line_too(tokenizer, tmp_path, num_workers):
    make_corpus(tmp_path)
    batches = loader(tmp_path, tokenizer, num_workers=num_workers)
    (tmp_path / "chunk1" / "part_0.jsonl").unlink()
    with pytest.raises(ValueError, match=r"No such file.*part_0\.jsonl") as caught:
        take(batches, 100)
    assert "Traceback" not in str(caught.value)


def worker_processes(script: str, corpus: Path, tokenizer, tmp_path) -> tuple[subprocess.Popen, list[int]]:
    """A process that reads for ever with two workers, and the workers' ids."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(corpus), str(tmp_path / "tokenizer")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    return process, pids


READ_FOR_EVER = """
import multiprocessing, sys, time
from data import TrainingLoader
for i, batch in enumerate(TrainingLoader(sys.argv[1], sys.argv[2], max_len=96, n_slots=4, num_workers=2)):
    if i == 9:  # both workers are at work
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(0.01)
"""


def test_death_of_a_worker_is_an_error(corpus, tokenizer, tmp_path):
    process, workers = worker_processes(READ_FOR_EVER, corpus, tokenizer, tmp_path)
    os.kill(workers[0], signal.SIGTERM)  # a scheduler's signal to all: the worker leaves that to the trainer
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "DataLoader worker" in errors


def test_a_pipe_that_closes_before_torch_hears_of_a_death_names_the_worker(corpus, tokenizer, monkeypatch):
    def closed(lifeline):
        raise ConnectionResetError(104, "Connection reset by peer")
        yield

    batches = loader(corpus, tokenizer, num_workers=2)
    monkeypatch.setattr(batches, "_start", closed)
    monkeypatch.setattr("data.loader.time.sleep", lambda seconds: None)  # torch's handler does not come
    with pytest.raises(RuntimeError, match="DataLoader worker ended"):
        next(iter(batches))


def test_killed_parent_leaves_no_workers(corpus, tokenizer, tmp_path):
    process, workers = worker_processes(READ_FOR_EVER, corpus, tokenizer, tmp_path)
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 15
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "orphaned workers"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_an_error_of_the_trainer_ends_the_process_with_its_workers(corpus, tokenizer, tmp_path):
    """A kept traceback keeps the iterator, so the workers still run when the interpreter exits."""
    script = READ_FOR_EVER.replace("time.sleep(0.01)", "sys.kept = sys._getframe(); i > 9 and sys.exit(7)")
    process, _ = worker_processes(script, corpus, tokenizer, tmp_path)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 7
    assert not errors
