"""Thoughts apart from answers, however the text is cut."""

import pytest

from infir2.engines.server.thoughts import Thoughts

CASES = (
    ("", "<think>\nWhy\nnot?\n</think>\n\nYes.\n", ("Why\nnot?", "Yes.\n")),
    ("", "\n<think>Why</think>Yes", ("Why", "Yes")),
    ("", "Yes, <think> is a word.", ("", "Yes, <think> is a word.")),
    ("", "  <thin ice", ("", "  <thin ice")),
    ("", "<think>\ncut off\n", ("cut off", "")),
    ("", "<think>\n\n</think>\n\nYes", ("", "Yes")),
    ("", "<think>a </thin b\n\nc</think>\n", ("a </thin b\n\nc", "")),
    ("", "", ("", "")),
    ("", "<thi", ("", "<thi")),
    ("<think>\n", "Why\n</think>\n\nYes</think>", ("Why", "Yes</think>")),
    ("<think>\n", "\n\nWhy", ("Why", "")),
    ("<think>\nBecause", "\nof</think>Yes", ("\nof", "Yes")),
    ("<think>\nBecause\n</think>\n\nIt", " is", ("", " is")),
    ("It", "<think> is", ("", "<think> is")),
)


@pytest.mark.parametrize(("before", "text", "expected"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_any_cut_gives_the_same(
    before: str, text: str, expected: tuple[str, str], size: int
) -> None:
    thoughts = Thoughts(before)
    pieces = [thoughts.add(text[i : i + size]) for i in range(0, len(text), size)]
    pieces.append(thoughts.finish())
    assert ("".join(thought for thought, _ in pieces), "".join(a for _, a in pieces)) == expected
