"""Commands to copy and recipes without a machine's paths, samples and groups with bounds."""

import html
import json
import re
import shlex
from pathlib import Path

import pytest
from report_runs import describe, rl_rows, sample, train_rows, write

from infir2.report import groups, samples, write_report
from infir2.report.appendix import verdict_of
from infir2.report.commands import Paths, command_lines
from infir2.report.read import read_run, read_runs

LONG = [
    f"--data.sources.{index}.path=/srv/me/project/data/part-{index}.jsonl" for index in range(40)
]


def with_command(run_dir: Path, command: list[str], **environment: object) -> Path:
    write(describe(run_dir, "sft"), train_rows(3, 2.0, 1.0, 0))
    path = run_dir / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"command": command} | environment))
    return run_dir


def lines_of(*run_dirs: Path) -> list[str]:
    runs = read_runs(run_dirs)
    return command_lines(runs, Paths(runs))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["cpt", "/opt/venv/infir2/demo/recipes/cpt.toml", "--run.dir=/srv/me/p/runs/a"],
            "infir2 cpt recipes/demo/cpt.toml --run.dir=a",
        ),
        (
            [
                "sft",
                "/src/recipes/real/sft.toml",
                "--run.dir=/w/me/p/runs/a",
                "--x.y=/w/me/p/d.jsonl",
            ],
            "infir2 sft recipes/real/sft.toml --run.dir=runs/a --x.y=d.jsonl",
        ),
        (
            ["sft", "/home/me/p/recipes/my.toml", "--run.dir=/home/me/p/runs/a"],
            "infir2 sft recipes/my.toml --run.dir=runs/a",
        ),
        (
            ["sft", "/home/me/p/recipes/q/my.toml", "--run.dir=/home/me/p/recipes/runs/a"],
            "infir2 sft q/my.toml --run.dir=runs/a",
        ),
        (
            ["sft", "x.toml", "--run.dir=/home/me/runs/a", "--model.path=/data/models/Qwen"],
            "infir2 sft x.toml --run.dir=runs/a --model.path=models/Qwen",
        ),
        (
            ["rl", "x.toml", "--run.dir=runs/a", "--rl.reward=http://host:80/score", "--a.b=1/2"],
            "infir2 rl x.toml --run.dir=runs/a --rl.reward=http://host:80/score --a.b=1/2",
        ),
        (["sft", "a b.toml", "--x.y=it's"], "infir2 sft 'a b.toml' '--x.y=it'\"'\"'s'"),
    ],
)
def test_commands_have_no_path_of_the_machine(tmp_path: Path, words: list[str], line: str) -> None:
    assert lines_of(with_command(tmp_path / "a", ["/usr/bin/infir2", *words])) == [line]


def test_commands_are_whole(tmp_path: Path) -> None:
    command = ["infir2", "sft", "x.toml", "--run.dir=/srv/me/project/runs/a", *LONG]
    page = write_report([with_command(tmp_path / "a", command)], tmp_path / "page.html").read_text()
    (text,) = re.findall('(?s)<pre class="command">(.*?)</pre>', page)
    words = shlex.split(html.unescape(re.sub("</?span>", "", text)))
    assert words[4:] == [word.replace("/srv/me/project/", "") for word in LONG]
    assert words[3] == "--run.dir=runs/a"


def test_runs_of_several_processes_name_their_launcher(tmp_path: Path) -> None:
    command, gpus = ["x", "sft", "x.toml"], {"device": "NVIDIA H200", "processes_per_node": 8}
    one = with_command(tmp_path / "a", command, processes=8, **gpus)
    two = with_command(tmp_path / "b", command, processes=16, **gpus)
    assert lines_of(one, two) == [
        "infir2 launch torchrun --gpus-per-node 8 -- sft x.toml",
        "infir2 launch torchrun --nodes 2 --endpoint HOST:29400 --gpus-per-node 8 -- sft x.toml",
    ]


def test_runs_on_cpus_are_launched_on_cpus(tmp_path: Path) -> None:
    command, cpu = ["x", "sft", "x.toml"], {"device": "cpu", "processes_per_node": 2}
    two = with_command(tmp_path / "a", command, processes=2, **cpu)
    one = with_command(tmp_path / "b", command, processes=1, **cpu)
    gpu = with_command(tmp_path / "c", command, processes=2, **cpu | {"device": "NVIDIA H200"})
    assert lines_of(two, one, gpu) == [
        "infir2 launch torchrun --gpus-per-node 2 --cpu -- sft x.toml",
        "infir2 sft x.toml",
        "infir2 launch torchrun --gpus-per-node 2 -- sft x.toml",
    ]


def test_every_recipe_of_the_checkout_is_named_as_in_it() -> None:
    recipes = Path(__file__).resolve().parents[2] / "recipes"
    found = [str(path.relative_to(recipes.parent)) for path in recipes.rglob("*.toml")]
    assert found
    assert [Paths([]).portable(f"/a/b/{path}") for path in found] == found


def test_recipes_have_no_path_of_the_machine(tmp_path: Path) -> None:
    run_dir = with_command(tmp_path / "a", ["x", "sft", "x.toml"])
    text = 'a = 1  # file:/opt/venv/infir2/demo/recipes/base.toml\nb = "/home/me/models/Qwen"\n'
    (run_dir / "recipe.toml").write_text(f"[run]\n{text}")
    page = write_report([run_dir], tmp_path / "page.html").read_text()
    assert "# file:recipes/demo/base.toml" in page
    assert "b = &quot;models/Qwen&quot;" in page
    assert "/home/me" not in page


def test_samples_show_prompt_response_and_verdict_with_a_filter(tmp_path: Path) -> None:
    run_dir = describe(tmp_path / "rl", "rl")
    write(run_dir, rl_rows(9, 0.1, 0.5, 0))
    rows = [
        sample(1, 1.0, verdict="ok"),
        sample(2, 0.0, verdict="wrong answer", response="<b>no</b>"),
        sample(2, 0.0, extracted="71"),
    ]
    write(run_dir, rows, "samples.jsonl")
    page = write_report([run_dir], tmp_path / "page.html").read_text()
    section = page[page.index('id="sample-responses"') :]
    assert '<option value="wrong answer">wrong answer</option>' in section
    assert '<option value="2">step 2</option>' in section
    assert section.count('<details class="sample" data-step="2" data-verdict="wrong') == 2
    assert "<dt>Answer found</dt><dd><pre>71</pre></dd>" in section
    assert "&lt;b&gt;no&lt;/b&gt;" in section
    assert "3 of 3 recorded samples." in section
    assert [verdict_of(row) for row in rows] == ["right", "wrong answer", "wrong"]


def test_a_large_file_of_samples_is_read_in_part_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "FIRST_BYTES", 10_000)
    monkeypatch.setattr(samples, "LAST_BYTES", 20_000)
    write(tmp_path / "eval", [])
    rows = [
        sample(
            0,
            float(index % 2),
            problem=f"p{index}",
            sample=0,
            prompt=f"{index}",
            response="x" * 900,
        )
        for index in range(200)
    ]
    write(tmp_path / "eval", rows, "samples.jsonl")
    run = read_run(tmp_path / "eval")
    assert [row["prompt"] for row in run.samples][:2] == ["0", "1"]
    assert run.samples[-1]["prompt"] == "199"
    assert 20 < len(run.samples) < 40
    assert run.num_samples == len(run.scores) == 200, "the scores of all are kept"
    (note,) = (note for note in run.notes if "samples.jsonl" in note)
    assert re.fullmatch(r"samples.jsonl is large: 1\d\d samples in its middle are left out", note)


def group(text: str) -> dict[str, object]:
    response = {"reason": "ok", "reward": 1.0, "parts": {}, "pieces": [text], "differences": [0.0]}
    response |= {"num_tokens": 1, "truncated": False, "versions": 1}
    prompt = {"messages": [{"content": "q"}], "answer": "1"}
    return {"trained": True, "prompt": prompt, "responses": [response]}


def test_groups_are_those_of_the_newest_steps_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "rl", rl_rows(9, 0.1, 0.5, 0))
    for step in range(1, 31):
        write(tmp_path / "rl" / "kept_rollouts", [group(f"of {step}.")] * 2, f"shown-{step}.jsonl")
    run = read_run(tmp_path / "rl")
    text = groups.groups_html(run)
    assert "Groups of the newest 12 of 30 steps that were kept." in text
    assert "of 30." in text
    assert "of 19." in text
    assert "of 18." not in text
    assert "left out" not in text
    text = groups.groups_html(run, 3_000)
    assert len(text) < 6_000
    assert re.search(r"To bound the page \d\d groups of them left out\.", text)
    monkeypatch.setattr(groups, "MAX_FILE_BYTES", 1 << 10)
    write(tmp_path / "rl" / "kept_rollouts", [group("x" * 300)] * 9, "shown-30.jsonl")
    text = groups.groups_html(run)
    assert "Of 1 file above 0 MiB the first part." in text
    assert text.count("x" * 300) == 1


def test_names_with_quotes_stay_text_everywhere(tmp_path: Path) -> None:
    """Also where the script reads them: in the attributes of paths and of the body."""
    names = ['it\'s "a" <b>', "</script><script>x"]
    for index, name in enumerate(names):
        write(
            describe(tmp_path / name.replace("/", "∕"), "sft", "m"), train_rows(60, 2.0, 1.0, index)
        )
    page = write_report([tmp_path], tmp_path / "page.html").read_text()
    assert page.count("<script>") == 1
    assert "<b>" not in page.replace("<b>", "", page.count('<div class="tile"><b>'))
    clocks = json.loads(html.unescape(re.findall(r'data-clocks="([^"]+)"', page)[0]))
    drawn = {html.unescape(name) for name in re.findall(r'data-run="([^"]+)"', page)}
    assert drawn == clocks.keys() == {name.replace("/", "∕") for name in names}
