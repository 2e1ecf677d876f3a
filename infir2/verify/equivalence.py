"""Mathematical equality by the math-verify library. The only file that imports it; runs in worker processes only."""

import logging
import re
from typing import Any

_QUOTIENT = re.compile(r"\\[dt]?frac|\d\s*(?:/|\\div)\s*\d")


def prepare() -> None:
    """Import and warm the library: its first parse builds tables that take longer than most answers."""
    logging.getLogger("math_verify").setLevel(
        logging.ERROR
    )  # it warns that its own time limit is off; ours kills the process
    assert equivalent("\\frac{1}{2}", "0.5")


def equivalent(reference: str, answer: str) -> bool:
    """Whether two answers (LaTeX or plain, without `\\boxed`) are the same mathematical object.

    An integer reference wants a number: an arithmetic expression that is left unevaluated (`3+4` for 7) may repeat the
    question and is refused, as the DeepScaleR grader does.
    """
    from math_verify import parse, verify

    # Time limits of the library are off: it uses SIGALRM between bytecodes, which neither stops C code nor survives a broad except.
    gold, predicted = (
        parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer)
    )
    if not gold or not predicted or _repeats_the_question(gold[0], predicted[0], answer):
        return False
    return bool(verify(gold, predicted, timeout_seconds=None))


def _repeats_the_question(gold: Any, predicted: Any, answer: str) -> bool:
    from sympy import Basic, Eq, Expr, Integer, Mul, Number, NumberSymbol, UnevaluatedExpr

    if not isinstance(gold, Integer):
        return False
    if _QUOTIENT.search(answer):  # the parser has already divided it
        return True
    if isinstance(predicted, Eq):
        predicted = predicted.rhs
    if not isinstance(predicted, Expr) or isinstance(predicted, Number | NumberSymbol):
        return False
    percent = isinstance(predicted, Mul) and any(
        isinstance(factor, UnevaluatedExpr) for factor in predicted.args
    )
    return isinstance(predicted, Basic) and not predicted.free_symbols and not percent
