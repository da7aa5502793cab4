"""docs/results.md: the question, the set-up, and whatever runs there are. Nothing is typed by hand but
what stands between the two marks, which survives every rebuild."""

import textwrap
from collections.abc import Iterable

from .arms import CONTROL, other_props
from .settings import Settings
from .store import Record
from .summary import SATURATED, FamilyResult, family_results, recommended, settings_of, verdicts
from .tables import along_table, base_table, cost_table, end_table, number, pairs_table, seeds_table

BEGIN, END = "<!-- written by hand, kept by the report -->", "<!-- end of what is written by hand -->"
COMMAND = "python -m benchmarks.recall_study.report"
FAMILY_NAMES = {"gla": "GLA", "mamba2": "Mamba2"}
ENOUGH_SEEDS = 3


def page(groups: list[list[Record]], pictures: dict[tuple[str, str], list[str]], kept: str) -> str:
    """The whole page.

    Args:
        groups: records by fingerprint.
        pictures: (fingerprint, family) -> paths relative to docs.
        kept: the hand-written part, without its marks.
    """
    parts = [_question(), _existing(groups), f"{BEGIN}\n{kept.strip()}\n{END}"]
    for records in groups:
        results = family_results(records)
        if results:
            parts.append(_group(records, results, pictures))
    parts.append(_rebuild())
    return "\n\n".join(parts) + "\n"


def prose(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 118, break_on_hyphens=False, break_long_words=False)


def _question() -> str:
    return "\n\n".join(
        [
            "# Does a larger state help, and which initialisation?",
            prose("""StateX enlarges the recurrent state of some layers of a pretrained model and trains
            on. Three questions for whoever has to choose `drop_mode` and `drop_prop`: does the larger
            state recall more than the same further training without it (LPT); which way of filling the
            new layer gets there, and how soon; and is it paid for in text loss, speed or memory? The
            published ablation has one run a cell. Here small models answer with several seeds, in a
            study to be run again by anyone: `bash scripts/recall_study.sh` on a GPU,
            `bash scripts/recall_study.sh config=configs/study/cpu.json` on a CPU."""),
            f"This page is made from the raw records by `{COMMAND}`.",
        ]
    )


def _existing(groups: list[list[Record]]) -> str:
    lines = ["## Which runs there are", ""]
    for records in groups:
        for result in family_results(records):
            lines.append(_existing_line(records, result))
    if len(lines) == 2:
        lines.append("None yet: no figure stands on this page.")
    if not any(r["device"] != "CPU" for records in groups for r in records if r["kind"] == "arm"):
        lines += [
            "",
            "**The study on a GPU (`configs/study/gpu.json`) has not been run yet.** " + _caution(groups),
        ]
    return "\n".join(lines)


def _caution(groups: list[list[Record]]) -> str:
    if not any(r["kind"] == "arm" for records in groups for r in records):
        return "Its tables and figures will stand here."
    return (
        "What follows ran on a CPU: small models with small states, enough seeds to compare arms with each"
        " other, and nothing that says how large an effect is at 1.3B parameters."
    )


def _existing_line(records: list[Record], result: FamilyResult) -> str:
    runs = [run for arm in result.arms.values() for run in arm.values()]
    seeds = sorted({run["seed"] for run in runs})
    devices = ", ".join(sorted({run["device"] for run in runs}))
    dates = sorted({run["date"] for run in runs})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"- {FAMILY_NAMES.get(result.family, result.family)}, `configs/study/{result.settings.name}.json` "
        f"(fingerprint {records[0]['fingerprint']}): {len(result.bases)} bases, {len(runs)} arms, "
        f"seeds {', '.join(map(str, seeds))}; {devices}, {when}"
    )


def _group(records: list[Record], results: list[FamilyResult], pictures: dict) -> str:
    settings, fingerprint = settings_of(records), records[0]["fingerprint"]
    parts = [f"## `configs/study/{settings.name}.json`", _set_up(settings, results)]
    for result in results:
        parts.append(_family(result, pictures.get((fingerprint, result.family), [])))
    return "\n\n".join(parts)


def _set_up(s: Settings, results: list[FamilyResult]) -> str:
    lines = [
        *(_model_line(result) for result in results),
        f"""Data: rows of {s.sequence_length} tokens, {s.rows} a step: {s.recall_rows} of associative recall
        ({_list(s.train_pairs)} pairs of {s.n_keys} keys and {s.n_values} values), the others of text
        (this Python's library, BPE of {s.text_vocabulary} words).{_few_keys(s)}""",
        "Loss: every token of the text; of recall the answers, as keys and values before them are random.",
        f"""Base: AdamW at {s.base_lr}, constant until the mean recall of {s.plateau_window}
        measurements, one every {s.base_eval_every} steps, is less than {s.plateau_gain} above that of
        the {s.plateau_window} before (at most {s.base_steps} steps), then {s.base_decay_steps} steps of
        linear decay.""",
        *_own_lines(s),
        f"""Arms: from the same base, {s.post_steps} steps of {s.tokens_per_step:,}
        tokens, the same batches in the same order, {s.warmup_steps} steps of warm-up to {s.post_lr},
        cosine to 0. LPT expands nothing.""",
        f"""Expanded: {_expanded(s)}, unless a table says otherwise. {_sweep(results)}""",
        f"""Recall: one example a row from a fresh state, its keys asked for with replacement up to the row's
        end. Tests: {_list(s.eval_pairs)} pairs, {s.eval_rows} rows of each, up to {s.eval_queries} questions
        a row; share of answers that are the most likely token. A model that guesses one of the values it has
        read is right once in as many times as there are pairs. Mean recall averages over these sizes.""",
        """Text loss: held-out files, the same rows for every arm. A seed draws the base's weights, the
        expansion's fresh numbers and the order of the data.""",
        """Mean ± half of a 95 % interval over seeds (Student's t); differences to LPT are paired by
        seed, and bold where the interval leaves out 0. No correction for the number of arms.""",
    ]
    return "\n".join(f"{i}. {' '.join(line.split())}" for i, line in enumerate(lines, start=1))


def _few_keys(s: Settings) -> str:
    if not s.keys_per_pair:
        return ""
    return f""" An example's keys are drawn from the first {s.keys_per_pair} times as many as it has pairs:
        with few keys a model learns the task sooner."""


def _expanded(s: Settings) -> str:
    which = {_selected(s.of(family)): [] for family in s.families}
    for family in s.families:
        which[_selected(s.of(family))].append(FAMILY_NAMES.get(family, family))
    if len(which) == 1:
        return next(iter(which))
    return "; ".join(f"{' and '.join(names)} {layers}" for layers, names in which.items())


def _selected(s: Settings) -> str:
    if s.layers:
        return f"layer {_list(s.layers)} (`layers={','.join(map(str, s.layers))}`)"
    return f"every layer i with i % drop_prop == 0, `drop_prop={s.drop_prop}`"


def _own_lines(s: Settings) -> list[str]:
    """What differs from the lines above: by family, a wider first gate, a curriculum."""
    lines = []
    for family in s.families:
        mine, name = s.of(family), FAMILY_NAMES.get(family, family)
        if mine.curriculum_steps:
            lines.append(f"""{name}'s base begins with examples of {s.train_pairs[0]} pairs; further sizes
            join one after the other over {mine.curriculum_steps} steps.""")
        if mine.first_gate_width != 1 and family == "gla":
            lines.append(f"""{name}'s base begins with forget gates of the first layer that are drawn
            {mine.first_gate_width:g} times as wide, both matrices. GLA divides a gate's logit by 16 and has
            no short convolution here: a first layer with narrow gates can hardly tell the token before
            from all others. What an arm draws afresh is drawn
            as its drop_mode says.""")
        if mine.embedding_width != 1:
            lines.append(f"""{name}'s base begins with embeddings that are drawn
            {mine.embedding_width:g} times as wide: beside them the first layer's output is small, and a token
            stays recognisable behind it.""")
        rates = [
            f"{key} {getattr(mine, key)}"
            for key in ("base_lr", "post_lr", "weight_decay", "base_steps", "base_min_steps")
            if getattr(mine, key) != getattr(s, key)
        ]
        if rates:
            lines.append(f"{name} has its own {', '.join(rates)}.")
    return lines


def _sweep(results: list[FamilyResult]) -> str:
    """Which arms the sweep of drop_prop followed."""
    swept = []
    for r in results:
        name, props = FAMILY_NAMES.get(r.family, r.family), _list(other_props(r.settings))
        if r.best:
            swept.append(f"{name} {' and '.join(r.best)} with drop_prop {props}")
    if not swept:
        return "The sweep of drop_prop has not begun."
    return f"""The arms with the best mean recall over the first seeds also ran with other layers
        ({"; ".join(swept)})."""


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _model_line(result: FamilyResult) -> str:
    model = result.settings.models[result.family]
    base = next(iter(result.bases.values()), None)
    shown = f", {base['parameters']:,} parameters, state {base['state_elements']:,} elements" if base else ""
    name = FAMILY_NAMES.get(result.family, result.family)
    return f"{name}: {model['num_hidden_layers']} layers, hidden size {model['hidden_size']}{shown}."


def _family(result: FamilyResult, pictures: list[str]) -> str:
    name = FAMILY_NAMES.get(result.family, result.family)
    parts = [
        f"### {name}",
        *_warnings(result),
        _reading(result),
        "At the end of post-training:",
        end_table(result),
    ]
    if pictures:
        parts += [f"![{name}: {_caption(path)}]({path})" for path in pictures]
    parts += ["Recall by number of pairs, at the end:", pairs_table(result)]
    parts += [
        prose("""Gain in mean recall over LPT, seed by seed. What limits a base that never learned the task
        need not be its state; the last column leaves such seeds out, by the bar that the configuration had
        set for a plateau (`plateau_learned`)."""),
        seeds_table(result),
    ]
    parts += ["Mean recall along post-training:", along_table(result)]
    parts += [
        prose("""Text loss and cost. Steps are given seed by seed: the first measured one from which the
        held-out loss stays within 1 % of the base's. Speed and memory of a training step, measured alone
        on the device; models this small are bound by launching kernels, for 1.3B see
        `benchmarks/throughput.py`."""),
        cost_table(result),
        "The bases:",
        base_table(result),
    ]
    return "\n\n".join(parts)


def _caption(path: str) -> str:
    kinds = {
        "along": "recall and text loss along post-training",
        "pairs": "recall by pairs",
        "gain": "gain over LPT",
    }
    return next((text for kind, text in kinds.items() if path.endswith(f"-{kind}.png")), path)


def _warnings(result: FamilyResult) -> list[str]:
    found = []
    late = [seed for seed, run in result.bases.items() if not run["plateau"]["reached"]]
    if late:
        found.append(f"""**Not on the plateau:** the bases of seeds {_list(tuple(late))} still learned
            when their steps were up, or never learned the task; their arms compare learning speed too,
            not only capacity.""")
    if _saturated(result):
        found.append("""**Not limited by the state:** the base answers nearly every question at every
            size, which leaves nothing for a larger state to show.""")
    if result.mixed_bases():
        found.append("""**Different bases:** arms of one seed began from different weights, as a base was
            lost and made again; pairing by seed is weaker there.""")
    return [prose(text) for text in found]


def _saturated(result: FamilyResult) -> bool:
    ends = [min(run["curve"][-1]["recall"].values()) for run in result.bases.values()]
    return bool(ends) and min(ends) >= SATURATED


def _reading(result: FamilyResult) -> str:
    """What the intervals say, by rule."""
    control = result.arms.get(CONTROL, {})
    if len(control) < ENOUGH_SEEDS:
        return f"{len(control)} seed(s) of LPT: too few for a conclusion."
    found = verdicts(result)
    names = {
        key: ", ".join(f"`{arm}` ({number(result.gain(arm), sign=True)})" for arm in arms)
        for key, arms in found.items()
    }
    lines = [
        f"- Recall above LPT: {names['above'] or 'no arm'}.",
        f"- Recall below LPT: {names['below'] or 'no arm'}.",
        f"- Not told apart from LPT: {names['open'] or 'no arm'}.",
    ]
    paid = [arm for arm in result.arms if arm != CONTROL and (c := result.text_cost(arm)) and c.sign > 0]
    lines.append(f"- Text loss above LPT's: {', '.join(f'`{arm}`' for arm in paid) or 'no arm'}.")
    best = recommended(result)
    rule = "gains most in recall over LPT, with no text loss shown to be worse"
    lines.append(f"- What {rule}: {f'`{best}`' if best else 'no arm'}.")
    return "\n".join(lines)


def _rebuild() -> str:
    return f"""## Run it again

```bash
bash scripts/recall_study.sh                    # one GPU; 9 minutes, and again until it ends with status 0
bash scripts/recall_study.sh config=configs/study/cpu.json results=output/cpu.jsonl    # on a CPU, a few hours
{COMMAND}      # this page and its figures
```

Runs that the raw file holds are not run again: `results=` names a file of your own.

Raw records: `benchmarks/recall_study/results/`, an object a finished run, with all its measurements."""
