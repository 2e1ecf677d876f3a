"""The program in a response, and the tests in a row, in the forms in which people store them."""

import json
import re
from typing import Any

from infir2.verify.answers import visible_text

# A fence closes a block only at the beginning of a line, with as many ticks as it was opened with.
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)
_PYTHON = ("", "python", "python3", "py")
MAX_TESTS = 1000


def extract_program(response: str) -> str | None:
    """The last fenced block of Python after the thinking; None without one that is closed."""
    text, program, opened = visible_text(response) or "", None, None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence[1][0] == opened[1][0] and len(fence[1]) >= len(opened[1]) and not fence[2]:
            if opened[2].lower() in _PYTHON:
                program = text[opened.end() + 1 : fence.start()]
            opened = None
    return program if program and program.strip() else None


def read_tests(value: Any) -> list[dict[str, Any]]:
    """The tests of a row as `run_code` has them.

    `value` is a list of such tests, or of asserts as text; one of them alone; {"inputs": [...],
    "outputs": [...]} of standard input and output; or JSON text of any of these.

    Raises ValueError, whose text continues "the tests ...".
    """
    if isinstance(value, str):
        value = _decoded(value)
    if isinstance(value, dict):
        value = _pairs(value) if "inputs" in value else [value]
    if not isinstance(value, list) or not value:
        raise ValueError("are neither a list nor an object, or there are none")
    if len(value) > MAX_TESTS:
        raise ValueError(f"are {len(value)}, more than {MAX_TESTS}")
    if all(isinstance(each, str) for each in value):
        value = [{"code": "\n".join(value)}]
    return [_checked(number, each) for number, each in enumerate(value)]


def _decoded(text: str) -> Any:
    """JSON, or else the text of asserts."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict | list):
        return value
    try:
        compile(text, "tests", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("are text that is neither JSON nor Python") from None
    if "assert" not in text:
        raise ValueError("are text without an assert")
    return [{"code": text}]


def _pairs(value: dict[str, Any]) -> list[dict[str, Any]]:
    inputs, outputs = value["inputs"], value.get("outputs")
    if value.get("fn_name"):
        raise ValueError("call a function; write them as fn_name, args and expected")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError("have inputs and outputs that are not two lists")
    if len(inputs) != len(outputs):
        raise ValueError(f"have {len(inputs)} inputs and {len(outputs)} outputs")
    return [{"input": a, "output": b} for a, b in zip(inputs, outputs, strict=True)]


def _checked(number: int, test: Any) -> dict[str, Any]:
    if not isinstance(test, dict):
        raise ValueError(f"have no object as number {number}")
    test = {key: value for key, value in test.items() if value is not None}  # Parquet's structs
    has_input = {"input", "output"} <= test.keys()
    if has_input and not isinstance(test["input"], str | int | float):
        raise ValueError(f"have an input that is no text, number {number}")
    if has_input and not isinstance(test["output"], str | int | float):
        raise ValueError(f"have an output that is no text, number {number}")
    calls = {"fn_name", "args", "expected"} <= test.keys() and isinstance(test["args"], list)
    if not (has_input or calls or isinstance(test.get("code"), str)):
        raise ValueError(
            f"need input and output, or fn_name, args and expected, or code; number {number} has "
            f"{', '.join(sorted(test)) or 'nothing'}"
        )
    return test
