"""Recipe files of strangers: one sentence within a moment, whatever they contain."""

import os
import time
from pathlib import Path

import pytest

from infir2.config.load import load
from infir2.config.schema import TrainRecipe
from infir2.errors import ConfigError

GOOD = """
[run]
dir = "run"
[model]
path = "model"
[[data.sources]]
path = "rows.jsonl"
[data]
batch_samples = 1
[schedule]
learning_rate = 1.0
total_steps = 5
"""
REFUSED = {
    "6,000 digits": ("[run]\nseed = " + "9" * 6000, "an integer has more than 64 bits"),
    "6,000 hexadecimal digits": ("[run]\nseed = 0x" + "F" * 6000, "more than 64 bits"),
    "65 bits": (f"[schedule]\ntotal_steps = {1 << 63}", "more than 64 bits"),
    "deep arrays": ("[data]\nsources = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "deep tables": ("[data]\nx = " + "{a = " * 20 + "1" + "}" * 20, "nested more than 16 deep"),
    "a dotted key": ("a." * 100_000 + "b = 1", "more than 16 parts"),
    "a dotted table": ("[" + "a . " * 100_000 + "b]", "more than 16 parts"),
    "a quoted dotted key": ("x = {" + '"a".' * 50_000 + "b = 1}", "more than 16 parts"),
    "a NUL in a text": ('[run]\ndir = "a\\u0000b"', "NUL character"),
    "a NUL in a key": ('"a\\u0000b" = 1', "NUL character"),
    "a NUL in extends": ('extends = "a\\u0000b"', "NUL character"),
    "a long value": ("[run]\nseed = '" + "x" * 900_000 + "'", "must be an integer"),
    "a long key": ("k" * 900_000 + " = 1", "is not a section"),
    "a long file": ("#" * (1 << 20) + "\n", "larger than the 1,048,576 bytes"),
    "an index": ("[data.sources." + "9" * 5000 + "]\npath = 'x'", "is a list of tables"),
    "a long name": ("extends = '" + "n" * 300 + "'", "File name too long"),
    "a list of bases": ("extends = ['a.toml']", "the name of one file"),
    "itself": ("extends = 'x.toml'", "form a circle"),
    "UTF-16": ("\ufeff[run]".encode("utf-16").decode("latin-1"), "not valid TOML"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_recipe_is_refused_in_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, sentence = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(content, encoding="latin-1")
    begin = time.process_time()
    with pytest.raises(ConfigError, match=sentence) as raised:
        load(TrainRecipe, ["x.toml"], verb="sft")
    assert time.process_time() - begin < 2
    assert len(str(raised.value)) < 1000
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("option", ["--run.seed=" + "9" * 6000, "--data.sources=" + "[" * 9000])
def test_a_hostile_option_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=r"must be an integer|is a list of tables"):
        load(TrainRecipe, [], [option], verb="sft")


def test_only_regular_files_are_recipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "fifo", tmp_path / "loop", tmp_path, Path("/dev/zero")):
        (tmp_path / "x.toml").write_text(f"extends = '{path}'")
        for recipe in (path, tmp_path / "x.toml"):
            with pytest.raises(ConfigError, match=r"the recipe cannot be read|this is a directory"):
                load(TrainRecipe, [recipe], verb="sft")


def test_files_extend_each_other_up_to_a_depth(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.toml").write_text(f"extends = '{number + 1}.toml'")
    (tmp_path / "20.toml").write_text("\ufeff" + GOOD, encoding="utf-8")
    assert load(TrainRecipe, [tmp_path / "5.toml"], verb="sft").recipe.run.dir == "run"
    with pytest.raises(ConfigError, match="more than 16 files"):
        load(TrainRecipe, [tmp_path / "0.toml"], verb="sft")
