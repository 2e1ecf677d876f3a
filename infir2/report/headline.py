"""The top of the page: what was trained and with which result, in a sentence and a few numbers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from infir2.report.loop_change import loop_change
from infir2.report.overlay import stages
from infir2.report.precision import (
    Difference,
    accuracy_difference,
    across_pairs,
    differences,
)
from infir2.report.read import Run
from infir2.report.runs import parameter_count
from infir2.report.stages import StageRow, accuracy_text, change_between
from infir2.report.text import compact, counted, duration, percent


def chain(runs: Sequence[Run]) -> str:
    """The stages in order: 'cpt → sft1, sft2 → rl'."""
    names = [_names([run.name for run in group], ", ") for group in stages(runs)]
    return _names(names, " → ")


def _names(names: Sequence[str], separator: str) -> str:
    return separator.join(names if len(names) <= 7 else [*names[:3], "…", *names[-3:]])


def headline_html(
    leaders: Sequence[Run], chain: str, rows: Sequence[StageRow], pairs: Mapping[str, Run]
) -> str:
    """HTML: what was trained and with which result, in one sentence and a few numbers."""
    others = {twin.name for twin in pairs.values()}
    scored = [r for r in rows if math.isfinite(r.evaluation.avg_at_k) and r.stage not in others]
    precision = {run.fp8 for run in leaders}
    suffix = " in FP8" if precision == {True} else " in BF16" if precision == {False} else ""
    results = [*_improvement(leaders, scored), *_precision(leaders, rows, pairs)]
    title = chain + suffix + (f": {'; '.join(results)}" if results else "")
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for value, text in _tiles(leaders, scored, bool(pairs))
    )
    title = title.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return f"<h1>{escape(title)}</h1>" + (f'<div class="tiles">{tiles}</div>' if tiles else "")


def _improvement(leaders: Sequence[Run], scored: Sequence[StageRow]) -> Iterator[str]:
    """The accuracy of the first and of the last stage, or of an RL run's own evaluations."""
    if len(scored) > 1:
        word = "after" if _descends(scored) else "of"
        first, last = (
            f"{percent(row.evaluation.avg_at_k)} {word} {row.stage}"
            for row in (scored[0], scored[-1])
        )
        change = change_between(scored[0], scored[-1])
        yield f"accuracy {first}, {last}, {change.text} points"
    elif len(leaders) == 1 and (loop := loop_change(leaders[0])):
        yield loop.text


def _descends(rows: Sequence[StageRow]) -> bool:
    """Whether the last stage started from the first; two seeds did not start from each other."""
    before = {row.stage: row.compared_with for row in rows}
    name, seen = rows[-1].stage, set[str]()
    while name and name != rows[0].stage and name not in seen:
        seen.add(name)
        name = before.get(name, "")
    return name == rows[0].stage


def _precision(
    leaders: Sequence[Run], rows: Sequence[StageRow], pairs: Mapping[str, Run]
) -> Iterator[str]:
    """FP8 against BF16, runs of one stage together if there are several, as of several seeds."""
    for group in stages(leaders):
        own = [(run, pairs[run.name]) for run in group if run.name in pairs]
        if found := across_pairs(own):
            yield f"over {len(own)} pairs: {_texts(found)}"
            continue
        for run, twin in own:
            texts = [_texts(differences(run, twin))]
            if change := accuracy_difference(run, twin, rows):
                texts.append(f"accuracy {change.text} points against BF16")
            if any(texts):
                yield f"{run.name}: {', '.join(filter(None, texts))}"


def _texts(found: Sequence[Difference]) -> str:
    """The number with an interval over steps first, then that of one validation."""
    return ", ".join(f"{difference.name} {difference.text}" for difference in reversed(found))


def _tiles(
    leaders: Sequence[Run], scored: Sequence[StageRow], has_twins: bool
) -> Iterator[tuple[str, str]]:
    """(number, text) of each known total."""
    configs = [run.state.get("model_config") or {} for run in leaders]
    largest = max(configs, key=parameter_count, default={})
    if num_parameters := parameter_count(largest):
        yield compact(num_parameters), f"parameters, {largest.get('model_type', '')}"
    if leaders:
        num_steps = sum(run.num_steps for run in leaders)
        yield f"{num_steps:,}", f"optimizer steps in {counted(len(leaders), 'run')}"
    if tokens := sum(run.total("trained_tokens") for run in leaders):
        yield compact(tokens), "trained tokens"
    if seconds := sum(run.total("seconds") for run in leaders):
        without = ", without the BF16 comparison" if has_twins else ""
        yield duration(seconds), f"in training steps{without}"
    if scored:
        evaluation = scored[-1].evaluation
        yield accuracy_text(evaluation), f"avg@{evaluation.k} after {scored[-1].stage}"
