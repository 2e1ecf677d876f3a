"""check_math on real benchmark answers, and the library behind it."""

import gzip
import json
import socket
import threading
import time
from pathlib import Path

import pytest

from infir2.verify import check_math, check_math_batch
from infir2.verify.math import shared_pool
from infir2.verify.pool import Pool
from infir2.verify.process import Channel

DATA = Path(__file__).parents[2] / "../shared/data/eval"


def answers(name: str) -> list[str]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    text = gzip.decompress(path.read_bytes()).decode() if name.endswith("gz") else path.read_text()
    return [json.loads(line)["answer"] for line in text.splitlines()]


def boxed(answer: str) -> str:
    return f"<think>hm, \\boxed{{0}}?</think>The answer is $\\boxed{{{answer}}}$."


def test_math500_answers_equal_themselves_in_the_library_and_outside() -> None:
    references = answers("math500.jsonl")[::4]
    outcomes = shared_pool().run(
        [(answer, answer) for answer in references], item_seconds=20, batch_seconds=120
    )
    assert sum(outcome.value is True for outcome in outcomes) >= 0.99 * len(references)
    assert all(
        verdict.reason == "ok"
        for verdict in check_math_batch([(boxed(answer), answer) for answer in references])
    )


def test_math500_answers_differ_from_perturbed_ones() -> None:
    references = answers("math500.jsonl")[1::6]
    verdicts = check_math_batch(
        [(boxed("7" + answer), answer) for answer in references], item_seconds=20
    )
    assert [v.answer for v in verdicts if v.reason != "wrong"] == []


def test_gsm8k_answers_in_other_spellings() -> None:
    references = answers("gsm8k_test.jsonl.gz")
    began = time.process_time()
    assert all(
        v.correct for v in check_math_batch([(boxed(answer), answer) for answer in references])
    )
    assert not any(
        v.correct
        for v in check_math_batch([(boxed(answer + "1"), answer) for answer in references])
    )
    assert (time.process_time() - began) / (2 * len(references)) < 1e-3, (
        "plain integers take microseconds"
    )
    spellings = ["\\${}", "{} \\text{{ dollars}}", "x = {}", "{}.0"]
    other = [
        (boxed(spellings[i % 4].format(answer)), answer) for i, answer in enumerate(references[:40])
    ]
    assert [v.answer for v in check_math_batch(other, item_seconds=20) if not v.correct] == []


@pytest.mark.parametrize(
    ("answer", "reference", "correct"),
    [
        ("\\frac12", "0.5", True),
        ("1+x^2", "x^2+1", True),
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("2,1", "\\{1,2\\}", True),
        ("0.333333", "\\frac{1}{3}", True),
        ("0.33", "\\frac{1}{3}", False),
        ("(2,1)", "(1,2)", False),
        ("[1,2]", "(1,2)", False),
        ("90^\\circ", "90", True),
        ("x=5", "5", True),
        ("50\\%", "50", True),
        ("3+4", "7", False),
        ("\\frac{14}{2}", "7", False),
        ("\\sqrt{49}", "7", False),
        ("x=3+4", "7", False),
        ("\\frac{14}{4}", "\\frac{7}{2}", True),
        ("\\text{Tuesday}", "Monday", False),
        ("5,6", "5", False),
        ("\\infty", "\\infty", True),
        ("\\text{None of them}", "None of them", True),
        ("", "5", False),
    ],
)
def test_equivalence_and_its_limits(answer: str, reference: str, correct: bool) -> None:
    assert check_math(boxed(answer), reference, seconds=20).correct is correct


@pytest.mark.parametrize(
    "label",
    ["nan", "NaN", "inf", "-Infinity", "null", "None", "N/A", "$nan$", "\\boxed{None}", " "],
)
def test_a_label_that_is_no_answer_never_scores(label: str) -> None:
    assert check_math(boxed(label), label).reason in ("wrong", "no_answer")


def test_reasons_tell_what_happened() -> None:
    responses = [
        ("\\boxed{2}", "2"),
        ("\\boxed{3}", "2"),
        ("2", "2"),
        ("<think>\\boxed{2}", "2"),
        ("\\boxed{5^5^5^5^5}", "2"),
    ]
    verdicts = check_math_batch(responses)
    assert [v.reason for v in verdicts] == ["ok", "wrong", "no_answer", "no_answer", "wrong"]
    assert "nested" in verdicts[4].detail
    assert check_math_batch([]) == []


def test_the_order_is_kept_across_the_quick_path_and_the_workers() -> None:
    pairs = [
        (boxed(f"{i}/2" if i % 3 else str(i)), f"{i / 2}" if i % 3 else str(i + i % 2))
        for i in range(40)
    ]
    assert [v.correct for v in check_math_batch(pairs, item_seconds=20)] == [
        bool(i % 3) or i % 2 == 0 for i in range(40)
    ]


def test_workers_import_neither_torch_nor_transformers() -> None:
    pool = Pool("builtins:eval", size=1)
    shared_pool().run([("1", "1")], 20, 60)  # the library's worker starts at all
    heavy = ("torch", "transformers", "numpy", "pydantic")
    looks = f"[name for name in {heavy} if name in __import__('sys').modules]"
    library = "__import__('infir2.verify.equivalence', fromlist=['x']).equivalent('1/2', '0.5')"
    try:
        assert [o.value for o in pool.run([(looks,), (library,), (looks,)], 30, 60)] == [
            [],
            True,
            [],
        ]
    finally:
        pool.close()


def test_one_item_is_checked_without_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool("builtins:eval", size=1)
    monkeypatch.setattr(threading.Thread, "start", None)
    try:
        assert pool.run([("1 + 1",)], 20)[0].value == 2
    finally:
        pool.close()


def test_the_reply_to_an_interrupted_item_is_not_taken_for_that_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def receive(channel: Channel, deadline: float) -> None:
        raise KeyboardInterrupt

    pool = Pool("builtins:eval", size=1)
    try:
        pool.run([("1",)], 20)
        with monkeypatch.context() as patch:
            patch.setattr(Channel, "receive", receive)
            with pytest.raises(KeyboardInterrupt):
                pool.run([("2",)], 20)
        assert pool.run([("3",)], 20)[0].value == 3
    finally:
        pool.close()


def test_the_item_after_one_that_hangs_does_not_wait_for_a_new_worker() -> None:
    pool = Pool("builtins:eval", size=1)
    try:
        hangs = "__import__('time').sleep(60)"
        pool.run([("1",)], 20)
        first = next(iter(pool._workers)).process.pid
        assert pool.run([(hangs,)], 4)[0].reason == "timeout"
        (spare,) = pool._workers
        assert spare.process.pid != first
        assert spare.channel.socket.recv(64, socket.MSG_PEEK) == b'{"ready": true}\n'
        (outcome,) = pool.run([("1 + 1",)], 4)
        assert (outcome.value, [worker.process.pid for worker in pool._workers]) == (
            2,
            [spare.process.pid],
        )
        assert pool.run([("__import__('time').sleep(2.5)",)], 4)[0].reason == ""
        assert [worker.process.pid for worker in pool._workers] == [spare.process.pid]
    finally:
        pool.close()


def test_a_delimiter_that_is_left_open_is_no_answer() -> None:
    for answer in (r"\left.8", r"\left.\left.\left.8", r"\left. 8", r"\frac{1}{2}\left."):
        assert not check_math(rf"\boxed{{{answer}}}", "8").correct, answer
    assert check_math(r"\boxed{\left.8\right.}", "8").correct
