"""What a run says of its start."""

import re
import time

from training.progress import Console, StartClock


def test_the_first_step_names_what_its_time_went_into_and_is_said_once(capsys):
    clock = StartClock(time.perf_counter() - 12.0)
    console = Console(True, 10)
    console.first_step(clock)
    console.first_step(clock)
    console.close()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("first step")]
    assert said == ["first step done 12.0 s after the start (imports 12.0, first step 0.0)"]


def test_the_parts_add_up():
    clock = StartClock(time.perf_counter())
    for part in ("checks", "model"):
        time.sleep(0.06)
        clock.done(part)
    whole, *parts = (float(number) for number in re.findall(r"\d+\.\d", str(clock)))
    assert abs(whole - sum(parts)) < 0.11  # each is rounded
    assert whole > 0
