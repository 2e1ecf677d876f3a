"""The top of the page: what was trained and with which result, in a sentence and a few numbers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from infir2.report.loop_change import loop_change
from infir2.report.overlay import stages
from infir2.report.precision import Difference, across_pairs, differences
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
    scored = [row for row in rows if math.isfinite(row.evaluation.avg_at_k)]
    precision = {run.fp8 for run in leaders}
    suffix = " in FP8" if precision == {True} else " in BF16" if precision == {False} else ""
    results = _results(leaders, scored, pairs)
    title = chain + suffix + (f": {'; '.join(results)}" if results else "")
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for value, text in _tiles(leaders, scored, bool(pairs))
    )
    title = title.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return f"<h1>{escape(title)}</h1>" + (f'<div class="tiles">{tiles}</div>' if tiles else "")


def _results(
    leaders: Sequence[Run], scored: Sequence[StageRow], pairs: Mapping[str, Run]
) -> list[str]:
    """Sentences: accuracy before and after, and the loss of FP8 against BF16."""
    results = []
    if len(scored) > 1:
        first, last = (
            f"{percent(row.evaluation.avg_at_k)} after {row.stage}"
            for row in (scored[0], scored[-1])
        )
        change = change_between(scored[0], scored[-1])
        results.append(f"accuracy {first}, {last}, {change.text} points")
    elif len(leaders) == 1 and (loop := loop_change(leaders[0])):
        results.append(loop.text)
    for group in stages(leaders):
        results += _precision_results(
            [(run, pairs[run.name]) for run in group if run.name in pairs]
        )
    return results


def _precision_results(pairs: Sequence[tuple[Run, Run]]) -> list[str]:
    """Of the FP8 runs of one stage: together if there are several, as of several seeds."""
    if found := across_pairs(pairs):
        return [f"over {len(pairs)} pairs: {_texts(found)}"]
    each = ((run.name, differences(run, twin)) for run, twin in pairs)
    return [f"{name}: {_texts(found)}" for name, found in each if found]


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
