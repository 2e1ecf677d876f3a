"""What a line that is not TOML was probably meant to be."""

import re
import tomllib
from pathlib import Path

_MAX_SHOWN = 80
_POSITION = re.compile(r"\(at line (\d+), column \d+\)")
# A pattern of the line, and what to do; the first that matches is said.
_HABITS = (
    (r"[“”‘’]", "quotes are \" or ', not the typographic ones"),
    (r"=\s*(?:True|False)\b", "write true and false in lower case"),
    (r"=\s*(?:None|null|nil|~)\s*(?:#.*)?$", "there is no empty value; remove the line"),
    (r"=\s*[+-]?\d+,\d+\s*(?:#.*)?$", "the decimal sign is a point"),
    (r'^[^"\']*//', "a comment begins with #"),
    (r"^\s*[{\]}]", "this looks like JSON; write [SECTION], and KEY = VALUE under it"),
    (r"^\s*[\w.-]+\s*:", "write KEY = VALUE, not KEY: VALUE"),
    (r'=\s*"[^"]*\\', "a backslash starts an escape; write / or put the text in single quotes"),
    (r"""=\s*(?:"[^"]*|'[^']*)$""", "the closing quote is missing"),
    (r"""^[^"']*["']\s*(?:#.*)?$""", "the opening quote is missing"),
    (r"=\s*$", "the value is missing"),
    (r"^\s*[\w.-]+\s+[^=\s]", "write KEY = VALUE"),
    (r"=\s*[A-Za-z/.$~]", 'text needs quotes: KEY = "VALUE"'),
)
_OTHER_FORMATS = (".json", ".jsonl", ".yaml", ".yml", ".py", ".sh", ".safetensors", ".gguf")


def toml_advice(path: Path, text: str, error: ValueError) -> str:
    """What follows the parser's words in the sentence about a recipe that is not TOML.

    Example: " in `dir = runs/x`: text needs quotes: KEY = \"VALUE\""
    """
    if path.suffix in _OTHER_FORMATS:
        return "; a recipe is a .toml file, and infir2 init writes one"
    if isinstance(error, UnicodeDecodeError):
        return "; save the file as UTF-8"
    position = _POSITION.search(str(error))
    if not isinstance(error, tomllib.TOMLDecodeError) or not position:
        return ""
    line = text.splitlines()[int(position[1]) - 1].strip()
    shown = line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}…"
    return f" in `{shown}`{_meaning(line, str(error))}"


def _meaning(line: str, error: str) -> str:
    if error.startswith("Cannot declare"):
        return ": this section is in the file already; put all its keys under one header"
    if error.startswith("Cannot overwrite"):
        return ": this key is in the section already; remove one of the two"
    return next((f": {advice}" for pattern, advice in _HABITS if re.search(pattern, line)), "")
