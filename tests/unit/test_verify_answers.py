"""Extraction and the decisions that need no library."""

import time

import pytest

from infir2.verify.answers import (
    exponent_depth,
    extract_answer,
    plain_integer,
    quick_decision,
    reference_text,
    too_hard,
)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so \\boxed{42}.", "42"),
        ("<think>maybe \\boxed{1}</think> it is \\boxed{2}", "2"),
        ("thinking with the tag in the prompt \\boxed{1}</think>\\boxed{2}", "2"),
        ("<think>\\boxed{1}</think> no box here", None),
        ("<think> \\boxed{1} and never closed", None),
        ("</think> \\boxed{3} <think> again \\boxed{4}", None),
        ("a</think>\\boxed{1}</think>\\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} then \\boxed{\\frac{3}{4}}", "\\frac{3}{4}"),
        ("\\boxed{\\left\\{ x \\mid x>0 \\right.}", "\\left\\{ x \\mid x>0 \\right."),
        ("\\boxed{1} and cut \\boxed{\\frac{1}", None),
        ("\\boxed{{ {5} }}", "5"),
        ("\\boxed{{1}+{2}}", "{1}+{2}"),
        ("\\fbox{7}", "7"),
        ("\\boxed {8}", "8"),
        ("\\boxed{}", None),
        ("\\boxed{ }", None),
        ("the answer is 42", None),
        ("", None),
    ],
)
def test_extraction(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


def test_reference_may_be_boxed_or_plain() -> None:
    assert reference_text("thus \\boxed{\\frac12}") == "\\frac12"
    assert reference_text(" 18 ") == "18"


@pytest.mark.parametrize(
    ("text", "digits"),
    [
        ("42", "42"), ("+42", "42"), ("-0", "0"), ("007", "7"), ("-1,234,567", "-1234567"),
        ("10,\\!080", "10080"), ("1{,}234", "1234"), ("$5$", "5"), ("5.", "5"), ("1,23", None),
        ("1, 234", None), ("5.0", None), ("٣", None), ("1 000", None), ("", None),
        ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_plain_integers(text: str, digits: str | None) -> None:
    assert plain_integer(text) == digits


@pytest.mark.parametrize(
    ("reference", "answer", "decision"),
    [
        ("42", "42", True),
        ("42", "0042.", True),
        ("42", "43", False),
        ("-42", "42", False),
        ("\\dfrac{1}{2}", "\\frac{1}{2}", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})", True),
        ("\\text{Evelyn}", "Evelyn", True),
        ("(C)", "\\text{C}", True),
        ("3\\frac{1}{2}", "\\frac{31}{2}", None),
        ("3 1/2", "31/2", None),
        ("1,234", "1, 234", None),
        ("\\leftarrow", "\\rightarrow", None),
        ("0.5", "\\frac12", None),
        ("5", "5.0", None),
    ],
)
def test_quick_decision_never_guesses(reference: str, answer: str, decision: bool | None) -> None:
    assert quick_decision(reference, answer) is decision


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("5^5^5^5^5", 4), ("5^{5^{5^{5}}}", 3), ("5**5**5", 2), ("5 ^ 5 ^ 5", 2),
        ("(((2^2)^2)^2)^2", 1), ("x^2y^3z^4w^5v^6", 1), ("2^{10}3^{5}7^{2}11^{3}", 1),
        ("2^3\\cdot5^2\\cdot7^2\\cdot11^2\\cdot13^2", 1), ("10^10^10", 2), ("x", 0),
        ("e^{x^2+y^2}", 2), ("}}}^{", 1),
    ],
)  # fmt: skip
def test_exponent_depth(text: str, depth: int) -> None:
    assert exponent_depth(text) == depth


def test_hard_answers_are_refused_and_real_ones_are_not() -> None:
    assert "nested" in too_hard("5^5^5^5^5")
    assert "characters" in too_hard("1+" * 2000)
    assert "factorials" in too_hard("9!!!!!")
    assert too_hard("2^{2^{10}} + \\frac{x^2y^3}{5!}") == ""


def test_a_hostile_response_takes_linear_time() -> None:
    began = time.process_time()
    assert extract_answer("\\boxed{" * 60_000) is None
    assert len(extract_answer("\\boxed{" + "{" * 60_000 + "}" * 60_000 + "}") or "") > 100_000
    for text in (
        "^" * 60_000,
        "5^" * 60_000,
        "{" * 60_000 + "^",
        " " * 60_000 + "x",
        "1," * 60_000,
        "\\text{" * 30_000,
    ):
        extract_answer("\\boxed{" + text + "}")
        exponent_depth(text)
        quick_decision("1", text)
    assert time.process_time() - began < 10
