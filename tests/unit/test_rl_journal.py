"""The journal of finished groups: what it reads is what was written, or it is sampled again."""

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from infir2.config.resume import is_safe
from infir2.config.schema import RlSection
from infir2.data import Prompt
from infir2.engines.types import Completion
from infir2.errors import CheckpointError
from infir2.parallel.ranks import Ranks
from infir2.rl.dynamic_sampling import GroupGenerator
from infir2.rl.groups import Response
from infir2.rl.journal import OF_TRAINING, Journal
from infir2.rl.prompts import DrawnPrompt


def response(number: int) -> Response:
    logprobs = np.array([-0.1 * number, -1.25], dtype=np.float32)
    completion = Completion(f"p/{number}", [1, number], logprobs, "stop", 0)
    reason, reward = "wrong" if number % 2 else "ok", float(number % 2)
    return Response(completion, f"ä {number}\n", reason, reward, {"math": reward})


def journal_of(run_dir: Path) -> Journal:
    return Journal(run_dir, Ranks(), lambda: None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A journal of step 1 with two groups of two responses each."""
    journal = journal_of(tmp_path)
    journal.open(1, 1, 0)
    journal.begin(1)
    journal.add("first", [response(1), response(2)])
    journal.add("second", [response(3), response(4)])
    return tmp_path / "rollouts" / "step-1-0.jsonl"


def groups_in(file: Path) -> dict[str, list[Response]]:
    journal = journal_of(file.parents[1])
    journal.open(1, 1, 0)
    journal.begin(1)
    groups = {key: journal.get(key) for key in ("first", "second")}
    assert set(journal._groups) <= set(groups)
    return {key: group for key, group in groups.items() if group is not None}


def same(a: list[Response], b: list[Response]) -> bool:
    return repr(a) == repr(b)


def test_a_flip_of_any_bit_gives_the_same_group_or_none(file: Path) -> None:
    good, expected = file.read_bytes(), groups_in(file)
    assert set(expected) == {"first", "second"}
    draw, num_found, num_expected = random.Random(7), 0, 0
    for position in range(0, len(good), 4):
        flipped = bytearray(good)
        flipped[position] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        found = groups_in(file)
        assert all(same(group, expected[key]) for key, group in found.items()), position
        num_found += len(found)
        num_expected += good[position] != ord("\n")  # without it two lines are one
    assert num_found >= num_expected, "a damaged line costs its own group only"


def changed_reward(line: str) -> str:
    return line.replace('"reward": 1.0', '"reward": 1000000000.0')


DAMAGES: dict[str, Callable[[str], str]] = {
    "a changed reward": changed_reward,
    "a line of another version": lambda line: json.dumps({"key": "first", "responses": []}),
    "no object": lambda line: "7",
    "deep JSON": lambda line: "[" * 100_000,
    "an empty line": lambda line: "",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_left_out_and_counted(
    file: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = file.read_text().splitlines()
    assert DAMAGES[damage](first) != first
    file.write_text(f"{DAMAGES[damage](first)}\n{second}\n")
    assert list(groups_in(file)) == ["second"]
    assert "1 damaged lines; their groups are sampled again" in capsys.readouterr().err


def test_a_torn_line_is_what_a_kill_leaves_and_needs_no_word(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(file.read_bytes()[:-10])
    assert list(groups_in(file)) == ["first"]
    assert not capsys.readouterr().err


def test_only_the_journals_own_files_are_read_and_removed(file: Path, tmp_path: Path) -> None:
    for name in ("step-x-0.jsonl", "step-1.jsonl", "step-0-0.jsonl.bak", "notes-1-0.jsonl"):
        (file.parent / name).write_text("mine")
    (file.parent / "step-0-0.jsonl").touch()
    assert set(groups_in(file)) == {"first", "second"}
    assert sorted(path.name for path in file.parent.iterdir()) == sorted(
        [file.name, "step-x-0.jsonl", "step-1.jsonl", "step-0-0.jsonl.bak", "notes-1-0.jsonl"]
    )


def test_what_a_kept_checkpoint_carried_stays_as_long_as_it(tmp_path: Path) -> None:
    journal = journal_of(tmp_path)
    for step in (2, 3, 4):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    journal.open(2, 2, saved_step=1)
    for step in (2, 3, 4, 5):
        journal.write_carried(step, {})
    journal.open(5, 5, saved_step=4)
    names = ["carried-3.jsonl", "carried-4.jsonl", "carried-5.jsonl"]
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == names
    (tmp_path / "checkpoints" / "step-2").rmdir()
    journal.open(5, 5, saved_step=4)
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == names[1:]


def test_a_link_or_a_directory_in_its_place_is_named(file: Path, tmp_path: Path) -> None:
    file.rename(tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"step-1-0.jsonl: it is a symbolic link"):
        groups_in(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match=r"step-1-0.jsonl: it is a directory"):
        groups_in(file)
    file.rmdir()
    file.parent.rmdir()
    (tmp_path / "elsewhere").mkdir()
    file.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="rollouts: it is a symbolic link, not a directory"):
        groups_in(file)


def test_a_journal_of_a_moved_run_removes_nothing(file: Path, tmp_path: Path) -> None:
    def moved() -> None:
        raise CheckpointError("moved")

    journal = Journal(tmp_path, Ranks(), moved)
    with pytest.raises(CheckpointError, match="moved"):
        journal.open(2, 2, saved_step=1)
    assert file.exists()


def key_of(rl: RlSection) -> str:
    generator = GroupGenerator(None, None, rl, 0, None, Ranks())  # type: ignore[arg-type]
    drawn = DrawnPrompt("0/p", Prompt("p", [], "5", None, "rl.jsonl:1"), [1, 2])
    return generator.journal_key(generator.start(drawn), "digest")


def test_a_key_that_a_resumed_run_may_change_loses_no_group() -> None:
    """Nor does any other that only training reads; whatever else changes is sampled again."""
    fields, before = RlSection.model_fields, key_of(RlSection())
    assert {name for name in fields if is_safe(f"rl.{name}")} <= OF_TRAINING
    for name in fields:
        changed = RlSection().model_copy(update={name: 123})
        with warnings.catch_warnings(action="ignore"):  # a number in the place of a text
            assert (key_of(changed) == before) == (name in OF_TRAINING), name
