"""F17: no answer keeps check_math busy longer than its limit, and none passes by chance."""

import pytest
from hostile_answers import hostile_answers
from stages import of_today

from infir2.verify import check_math_batch

REFERENCES = ("8", "\\frac12", "2\\sqrt{3}", "x^2+1", "(1,2)", "x<4", "100!", "1-2^{-2030}")


@pytest.mark.parametrize("reference", of_today(REFERENCES, 3))
def test_every_hostile_answer_gets_a_verdict_within_its_limit(reference: str) -> None:
    answers = hostile_answers(40, seed=REFERENCES.index(reference))
    verdicts = check_math_batch([(f"\\boxed{{{answer}}}", reference) for answer in answers], 1.0)
    assert {verdict.reason for verdict in verdicts} <= {"wrong", "no_answer", "timeout", "oom"}
    assert max(verdict.seconds for verdict in verdicts) < 30, "each has one second, and a restart"
