"""Rewards for answers: text in, verdict out, with no state."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from infir2.config.schema import RlSection
from infir2.data import Prompt
from infir2.rl.reward_score import Score, score_of
from infir2.verify import Limits, Verdict, check_math_batch, run_code
from infir2.verify.answers import AnswerFormat, extract_answer
from infir2.verify.choices import check_choice
from infir2.verify.programs import extract_program

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
MAX_TESTS_SECONDS = 10  # of all tests of a program, in limits of one


def math_reward(texts: Sequence[str], prompt: Prompt, answer_format: AnswerFormat) -> list[Score]:
    """1 if the final answer equals the label."""
    pairs = [(text, prompt.answer) for text in texts]
    return [score_of(verdict) for verdict in check_math_batch(pairs, answer_format=answer_format)]


def thinking_reward(
    texts: Sequence[str], prompt: Prompt, answer_format: AnswerFormat
) -> list[Score]:
    """As `math_reward`, and 0 without a thought that was closed."""
    # Without its end a response is one long thought, which has no answer.
    closed = [text if THINK_CLOSE in text else THINK_OPEN for text in texts]
    return math_reward(closed, prompt, answer_format)


def format_reward(texts: Sequence[str], prompt: Prompt, answer_format: AnswerFormat) -> list[Score]:
    """1 for one thought that is not empty, at the beginning and closed once, and then an answer."""
    return [score_of(_check_format(text, answer_format)) for text in texts]


def _check_format(text: str, answer_format: AnswerFormat) -> Verdict:
    thought, closed, rest = text.partition(THINK_CLOSE)
    thought = thought.strip().removeprefix(THINK_OPEN).strip()
    if not closed or not thought or THINK_OPEN in thought + rest or THINK_CLOSE in rest:
        return Verdict("wrong", detail="not one thought that is closed once")
    if extract_answer(text, answer_format) is None:
        return Verdict("no_answer")
    return Verdict("ok")


def choice_reward(texts: Sequence[str], prompt: Prompt) -> list[Score]:
    """1 if the letters of the final answer are the label's."""
    return [score_of(check_choice(text, prompt.answer)) for text in texts]


def code_reward(texts: Sequence[str], prompt: Prompt, rl: RlSection) -> list[Score]:
    """1 if the last program passes every test of the label (JSON).

    Raises JailError if this machine cannot run programs safely.
    """
    tests = json.loads(prompt.answer)
    limits = Limits(rl.reward_seconds, MAX_TESTS_SECONDS * rl.reward_seconds)

    programs = [extract_program(text) for text in texts]

    def judge(program: str) -> Score:
        return score_of(run_code(program, tests, limits))

    distinct = list(dict.fromkeys(filter(None, programs)))  # a policy repeats itself
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as threads:
        scores = dict(zip(distinct, threads.map(judge, distinct), strict=True))
    return [scores.get(each or "", Score(0.0, "no_answer")) for each in programs]
