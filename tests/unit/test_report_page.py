"""The page and the stage table, from synthetic runs."""

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import rich
from report_runs import MODEL, demo_recipe, describe, evaluation, rl_rows, sample, train_rows, write

from infir2.report import render_stage_table, stage_table, write_report
from infir2.report.appendix import pick_samples
from infir2.report.precision import differences, half_interval, twins
from infir2.report.read import read_run, read_runs
from infir2.report.runs import parameter_count

VOID = {"meta", "path", "circle", "input"}


class Page(HTMLParser):
    """Checks that tags nest; keeps tags, addresses and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = dict(attributes)
        self.ids |= {str(values["id"])} if "id" in values else set()
        self.targets += [str(values[name]) for name in ("href", "src") if name in values]
        assert not any(name.startswith("on") for name in values), f"event attribute in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3", "h4"):
            self.headings.append(data.strip())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_recipe(tmp_path_factory.mktemp("runs") / "demo")


def page_of(runs: list[Path], out: Path) -> tuple[str, Page]:
    assert write_report(runs, out) == out
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_of_a_recipe(recipe: Path, tmp_path: Path) -> None:
    text, page = page_of([recipe], tmp_path / "deep" / "report.html")
    for heading in (
        "What improved",
        "FP8 against BF16",
        "Runs",
        "Sample responses",
        "Configuration",
        "Environment",
        "How to reproduce",
    ):
        assert heading in page.headings
    for heading in (
        "Reward",
        "Accuracy",
        "Entropy",
        "Rollout against trainer",
        "Groups",
        "Evaluation in the loop",
        "Learning rate",
        "Throughput",
    ):
        assert heading in page.headings
    assert (
        "cpt → sft1 → sft2 → rl1 → rl2 in FP8: accuracy 3.1 % after cpt, 78.2 % after rl2" in text
    )
    assert "infir2 rl recipes/demo/rl2.toml --run.dir=" in text
    assert "non_finite" in text
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_the_page_loads_nothing(recipe: Path, tmp_path: Path) -> None:
    text, page = page_of([recipe], tmp_path / "report.html")
    assert all(target.startswith("#") and target[1:] in page.ids for target in page.targets)
    assert not re.findall(r"url\(|@import|https?:", text)
    assert page.tags["link"] == page.tags["img"] == page.tags["meta"] - 4 == 0
    assert "data-reload" not in text.split("<main>")[0], "a page that is not followed"
    assert page.tags["script"] == 1


def test_the_script_parses(recipe: Path, tmp_path: Path) -> None:
    """A page whose script has an error would show no values and no controls, and say nothing."""
    node = shutil.which("node")
    if not node:
        pytest.skip("node is not installed")
    text, _ = page_of([recipe], tmp_path / "report.html")
    (script,) = re.findall("(?s)<script>(.*)</script>", text)
    (tmp_path / "page.js").write_text(script)
    subprocess.run([node, "--check", tmp_path / "page.js"], check=True)


def test_text_of_models_cannot_become_markup(tmp_path: Path) -> None:
    attack = "</pre><script>alert(1)</script>\"'><img src=x onerror=alert(1)>\ud800"
    run_dir = describe(tmp_path / "run", "rl")
    event = {"kind": "event", "step": 1, "event": attack, "detail": attack}
    rows = [
        *rl_rows(12, 0.1, 0.5, 0),
        event,
        evaluation(12, 0.5) | {"by_difficulty": {attack: 0.5}},
    ]
    with (run_dir / "recipe.toml").open("a") as file:
        file.write("# </pre><script>\n")
    write(run_dir, rows)
    write(run_dir, [sample(1, 1.0, prompt=attack, response=attack, answer=attack)], "samples.jsonl")
    _, page = page_of([run_dir], tmp_path / "report.html")
    assert page.tags["script"] == 1
    assert page.tags["img"] == 0


def test_long_runs_stay_under_the_size_limit(tmp_path: Path) -> None:
    for index in range(5):
        write(describe(tmp_path / f"rl{index}", "rl"), rl_rows(1_500, 0.2, 0.7, index))
    write(
        tmp_path / "rl0",
        [sample(step, 1.0, response="x" * 100_000) for step in range(20)],
        "samples.jsonl",
    )
    out = write_report([tmp_path], tmp_path / "report.html")
    assert out.stat().st_size < 1_500_000


def test_missing_pieces_are_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path / "bare", [{"kind": "train", "step": 1, "loss": 2.0}])
    text, page = page_of([tmp_path / "bare"], tmp_path / "report.html")
    assert (
        "Nothing recorded for: What improved, FP8 against BF16, Sample responses, Configuration, "
        "Environment, How to reproduce."
    ) in text
    assert "bare: no recipe.toml." in text
    assert "Loss" in page.headings
    assert "Throughput" not in page.headings


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"kind": "train", "step": 5, "loss": None, "reward": None}],
        [{"kind": "evaluation", "step": 1}],
    ],
)
def test_a_run_with_hardly_anything_has_a_page(
    tmp_path: Path, rows: list[dict[str, object]]
) -> None:
    write(tmp_path / "run", rows)
    page_of([tmp_path / "run"], tmp_path / "report.html")
    rich.print(render_stage_table(stage_table([tmp_path / "run"])))


def test_twins_are_found_by_recipe_and_by_name(tmp_path: Path) -> None:
    for name, fp8, rate in (
        ("a", True, 1e-3),
        ("b", False, 1e-3),
        ("c", True, 2e-3),
        ("c-bf16", False, 3e-3),
        ("d", False, 9e-3),
    ):
        write(describe(tmp_path / name, "cpt", fp8=fp8, rate=rate), train_rows(4, 3.0, 2.0, 0))
    assert {name: run.name for name, run in twins(read_runs([tmp_path])).items()} == {
        "a": "b",
        "c": "c-bf16",
    }


def write_losses(run_dir: Path, train: list[float], validation: dict[int, float | None]) -> Path:
    rows = [
        {"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(train, start=1)
    ]
    rows += [
        {"kind": "validation", "step": step, "validation_loss": loss}
        for step, loss in validation.items()
    ]
    write(run_dir, rows)
    return run_dir


def test_differences_tell_validation_and_training_apart(tmp_path: Path) -> None:
    a, b = (
        read_run(write_losses(tmp_path / "a", [2.0] * 30, {10: 3.0, 20: 2.02, 30: None})),
        read_run(write_losses(tmp_path / "b", [2.5] * 30, {10: 3.0, 20: 2.0, 30: 1.9})),
    )
    validation, training = differences(a, b)
    assert (validation.name, validation.step, validation.text) == (
        "validation loss",
        20,
        "1.00 % above BF16",
    )
    assert (training.name, training.step, training.num_steps) == ("training loss", 30, 20)
    assert training.text == "20.00 ± 0.00 % below BF16"
    (training,) = differences(a, read_run(write_losses(tmp_path / "c", [2.5] * 5, {})))
    assert training.text == "20.00 % below BF16", "five steps have no interval"


def test_the_interval_of_a_training_loss_covers_its_mean(tmp_path: Path) -> None:
    """In about 95 of 100 draws, of independent steps and of ones that resemble their neighbors."""
    generator = np.random.default_rng(0)
    for weights in ([1.0], [0.25] * 4):
        draws = [np.convolve(generator.normal(size=163), weights, "valid") for _ in range(400)]
        covered = [abs(draw.mean()) <= half_interval(draw) for draw in draws]
        assert 0.90 <= np.mean(covered) <= 0.99


def test_several_seeds_have_an_interval_of_their_own(tmp_path: Path) -> None:
    """The pairs are those of a seed, and the mean of their differences has Student's interval."""
    relative = (0.01, 0.02, 0.04)
    for seed, each in enumerate(relative):
        for name, fp8, loss in ((f"s{seed}", True, 2.0 * (1 + each)), (f"t{seed}", False, 2.0)):
            run_dir = describe(tmp_path / name, "cpt", fp8=fp8)
            recipe = run_dir / "recipe.toml"
            recipe.write_text(recipe.read_text().replace("seed = 1236", f"seed = {9 - seed}"))
            write_losses(run_dir, [loss] * 30, {30: loss})
    runs = read_runs([tmp_path])
    assert {name: twin.name for name, twin in twins(runs).items()} == {
        "s0": "t0",
        "s1": "t1",
        "s2": "t2",
    }
    text, _ = page_of([tmp_path], tmp_path / "report.html")
    half = 4.303 * np.std(relative, ddof=1) / np.sqrt(3)
    (title,) = re.findall("<h1>(.*?)</h1>", text)
    title = title.replace("\N{NO-BREAK SPACE}", " ")
    assert f"over 3 pairs: training loss 2.33 ± {100 * half:.2f} % above BF16" in title
    assert f"<b>2.33 ± {100 * half:.2f} % above BF16</b> (95 % interval over the pairs)" in text


@pytest.mark.parametrize("pair", ["fp8", "bf16"])
def test_pairs_of_unlike_recipes_are_not_pooled(tmp_path: Path, pair: str) -> None:
    """A small and a large model in one folder are no seeds of one comparison."""
    for size, above in (("a", 0.01), ("b", 0.06)):
        for fp8 in (True, False):
            run_dir = describe(tmp_path / (size if fp8 else f"{size}-bf16"), "cpt", fp8=fp8)
            if size == "b" and fp8 is (pair == "fp8"):
                with (run_dir / "recipe.toml").open("a") as file:
                    file.write("weight_decay = 0.3\n")
            loss = 2.0 * (1 + above * fp8)
            write_losses(run_dir, [loss] * 30, {30: loss})
    text, _ = page_of([tmp_path], tmp_path / "report.html")
    (title,) = re.findall("<h1>(.*?)</h1>", text)
    title = title.replace("\N{NO-BREAK SPACE}", " ")
    assert "pairs" not in title
    assert "interval over the pairs" not in text
    assert "a: training loss 1.00 ± 0.00 % above BF16" in title
    assert "b: training loss 6.00 ± 0.00 % above BF16" in title


def test_the_headline_has_intervals(recipe: Path, tmp_path: Path) -> None:
    text, _ = page_of([recipe], tmp_path / "report.html")
    (title,) = re.findall("<h1>(.*?)</h1>", text)
    title = title.replace("\N{NO-BREAK SPACE}", " ")
    assert "78.2 % after rl2, +75.1 ± 4.2 points" in title
    assert re.search(r"cpt: training loss 0\.\d\d ± 0\.\d\d % above BF16, validation loss", title)


def evaluated(root: Path, name: str, rewards: list[list[float]], temperature: float = 1.0) -> None:
    """An evaluation of as many problems, with its samples."""
    score = float(np.mean(rewards))
    write(root / f"eval-{name}", [evaluation(0, score, half=0.2, problems=len(rewards))])
    rows = [
        sample(0, reward, problem=f"{name}/{index}", sample=k, prompt=f"question {index}")
        for index, own in enumerate(rewards)
        for k, reward in enumerate(own)
    ]
    write(root / f"eval-{name}", rows, "samples.jsonl")
    (root / f"eval-{name}" / "recipe.toml").write_text(
        f'[model]\npath = "{root / name}"\n[evaluate]\ntemperature = {temperature}\n'
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_change_is_paired_where_the_questions_are_the_same(
    tmp_path: Path, temperature: float
) -> None:
    before = [[float(index % 2), float(index % 3 > 0)] for index in range(60)]
    after = [[1.0, max(own)] for own in before]
    write(describe(tmp_path / "sft", "sft"), train_rows(3, 2.0, 1.0, 0))
    write(describe(tmp_path / "rl", "rl", base=str(tmp_path / "sft")), train_rows(3, 2.0, 1.0, 0))
    evaluated(tmp_path, "sft", before)
    evaluated(tmp_path, "rl", after, temperature)
    change = stage_table([tmp_path])[1].change
    difference = float(np.mean(after) - np.mean(before))
    assert change.value == pytest.approx(difference)
    if temperature == 1.0:
        assert change.num_paired == 60
        assert change.low < difference < change.high
        assert change.interval < 0.15
    else:
        assert change.num_paired == 0, "other settings: the answers are not of the same questions"
        assert change.interval == pytest.approx(np.hypot(0.2, 0.2), abs=0.1)


def test_accuracy_in_fp8_and_bf16_is_paired(tmp_path: Path) -> None:
    """And the headline's before and after leaves the BF16 twin out."""
    scores = [[float(index % 3 > 0)] for index in range(60)]
    for name, fp8 in (("cpt", True), ("cpt-bf16", False)):
        write(describe(tmp_path / name, "cpt", fp8=fp8), train_rows(30, 3.0, 1.0, 0))
    write(describe(tmp_path / "sft", "sft", str(tmp_path / "cpt")), train_rows(3, 2.0, 1.0, 0))
    evaluated(tmp_path, "cpt", scores)
    evaluated(tmp_path, "cpt-bf16", [*scores[:-3], [1.0], [1.0], [1.0]])
    evaluated(tmp_path, "sft", [[1.0]] * 60)
    text, _ = page_of([tmp_path], tmp_path / "report.html")
    (title,) = re.findall("<h1>(.*?)</h1>", text)
    title = title.replace("\N{NO-BREAK SPACE}", " ")
    assert "accuracy 66.7 % after cpt, 100.0 % after sft, +33.3 ± " in title
    assert "accuracy −1.7 ± " in title
    assert re.search("Accuracy, FP8 − BF16: <b>−1.7 ± .* points</b> .*paired over 60 quest", text)


def test_two_seeds_are_not_before_and_after(tmp_path: Path) -> None:
    for name, reward in (("a", 0.0), ("b", 1.0)):
        write(describe(tmp_path / name, "sft", "models/m"), train_rows(3, 2.0, 1.0, 0))
        evaluated(tmp_path, name, [[reward]] * 20)
    text, _ = page_of([tmp_path], tmp_path / "report.html")
    assert "accuracy 0.0 % of a, 100.0 % of b, +100.0" in text


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_run_of_rl_alone_says_what_its_own_evaluations_say(tmp_path: Path, is_kept: bool) -> None:
    run_dir = describe(tmp_path / "rl", "rl")
    write(run_dir, rl_rows(30, 0.2, 0.6, 0))
    first, last = 10, 30
    scores = {row["step"]: row["avg_at_k"] for row in read_run(run_dir).evaluations.rows}
    for step in (first, last) if is_kept else ():
        solved = round(50 * scores[step])
        rows = [
            sample(step, float(n < solved), problem=f"p{n}", sample=0, prompt=f"question {n}")
            for n in range(50)
        ]
        write(run_dir / "evaluations", rows, f"step-{step}.jsonl")
    text, _ = page_of([run_dir], tmp_path / "report.html")
    (title,) = re.findall("<h1>(.*?)</h1>", text)
    assert re.search(r"accuracy \d+.\d % after step 10, \d+.\d % after step 30, \+\d+.\d", title)
    how = "paired over 50 questions" if is_kept else "as of independent questions"
    assert f"(95 % interval, {how})" in text


def test_stage_rows_compare_with_the_stage_they_started_from(recipe: Path) -> None:
    rows = stage_table([recipe])
    assert [(row.stage, row.compared_with) for row in rows] == [
        ("cpt", ""),
        ("sft1", "cpt"),
        ("sft2", "sft1"),
        ("rl1", "sft2"),
        ("rl2", "rl1"),
    ]
    assert rows[3].run.name == "eval-rl1", (
        "an evaluation of its own stands before the one in the loop"
    )
    assert rows[3].change.value == pytest.approx(0.225)
    assert rows[3].change.interval == pytest.approx(np.hypot(0.03, 0.03))
    assert rows[3].change.is_sure


def test_a_stage_without_evaluation_is_stepped_over_and_a_base_model_counts(tmp_path: Path) -> None:
    write(describe(tmp_path / "sft", "sft", base="models/base"), train_rows(3, 2.0, 1.0, 0))
    write(
        describe(tmp_path / "rl", "rl", base=str(tmp_path / "sft")),
        [*train_rows(3, 2.0, 1.0, 0), evaluation(3, 0.31)],
    )
    write(tmp_path / "eval-base", [evaluation(1, 0.30)])
    rows = stage_table([tmp_path / name for name in ("sft", "rl", "eval-base")])
    assert [(row.stage, row.compared_with) for row in rows] == [("base", ""), ("rl", "base")]
    assert not rows[1].change.is_sure


def test_the_terminal_table_fits_eighty_columns(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rich.get_console().size = (80, 25)
    rich.print(render_stage_table(stage_table([recipe])))
    output = capsys.readouterr().out
    assert "+22.5 ± 4.2" in output
    assert "65.5 ± 3.0 %" in output
    assert "…" not in output


def test_picked_samples_come_from_first_and_last_steps_and_vary() -> None:
    rows = [
        sample(step, float(index == 3), prompt=f"q{index}")
        for step in range(1, 51)
        for index in range(4)
    ]
    picked = pick_samples(rows, 8)
    assert [row["step"] for row in picked[:2]] == [1, 1]
    assert {row["reward"] for row in picked[:2]} == {0.0, 1.0}
    assert min(row["step"] for row in picked[2:]) > 40
    assert {row["reward"] for row in picked[2:]} == {0.0, 1.0}
    assert pick_samples([], 8) == []


def test_parameter_counts_are_those_of_the_decoder() -> None:
    from infir2.model import Decoder, ModelConfig

    for kind in ("qwen2", "qwen3", "llama"):
        config = MODEL | {
            "model_type": kind,
            "architectures": [
                {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[kind] + "ForCausalLM"
            ],
        }
        config |= {
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 64,
            "tie_word_embeddings": kind != "llama",
        }
        model = Decoder(ModelConfig.from_hf(config))
        assert parameter_count(model.config.to_hf()) == sum(
            parameter.numel() for parameter in model.parameters()
        )
    assert parameter_count({"hidden_size": 8}) == 0
