"""Multiple choice: the letters that a response chooses, against those of the label."""

import re

from infir2.verify.answers import AnswerFormat, extract_answer, normalize
from infir2.verify.verdict import Verdict

MAX_CHOICE_CHARACTERS = 1000
MAX_LETTERS = 8
_TOKEN = re.compile(r"[A-Za-z]+|[^A-Za-z\s]")
_BEFORE = ("option", "choice", "选", "项", "答", "案", "为", "是")
_BETWEEN = ("and", ",", ";", "/", "&", "(", "[", "*", "，", "、", "和")


def choice_letters(text: str) -> frozenset[str]:
    """The letters of a choice, in upper case; empty if the text is none.

    After `C)`, `(C)`, `C.` or `C:` the text of the option may follow. Example:
    choice_letters("(A) and C") and choice_letters("AC") are {"A", "C"}; choice_letters("A cat") is
    empty.
    """
    letters, last, opened = "", "", False
    for token in _TOKEN.findall(normalize(text[:MAX_CHOICE_CHARACTERS])):
        if letters and (last in (".", ":") or (last in (")", "]") and token not in _BETWEEN)):
            break  # the text of the option
        if _is_letters(token, letters):
            letters += token.upper()
        elif token in (")", "]", ".", ":"):
            if letters and token in (")", "]") and not opened:
                break
            opened = False
        elif token.lower() not in (_BETWEEN if letters else (*_BETWEEN, *_BEFORE)):
            return frozenset()
        opened = opened or token in ("(", "[")
        last = token
    return frozenset(letters)


def _is_letters(token: str, earlier: str) -> bool:
    """Whether a token is a letter, or several in capitals that stand alone."""
    alone = not earlier and token.isupper() and len(set(token)) == len(token) <= MAX_LETTERS
    return token.isalpha() and token.isascii() and (len(token) == 1 or alone)


def check_choice(response: str, label: str, answer_format: AnswerFormat = "answer_line") -> Verdict:
    """Compare the letters of the final answer (`extract_answer`) with the label's."""
    answer = extract_answer(response, answer_format)
    if answer is None:
        return Verdict("no_answer")
    wanted, letters = choice_letters(label), choice_letters(answer)
    return Verdict("ok" if wanted and letters == wanted else "wrong", answer[:100])
