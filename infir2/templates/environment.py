"""Render chat templates as transformers does, but within bounds. Runs in a process of its own.

A template is a program that comes with a model. Its rounds of loops and its calls are counted, so
that an endless one fails after the same work on every rank; the process that runs it is limited in
memory and time (data/template.py). Whatever chooses at random is missing, and the date is given,
because all ranks and all resumed runs have to render the same text.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

MAX_ROUNDS = 200_000
MAX_CHARACTERS = 1 << 19


def render(
    source: str,
    variables: dict[str, Any],
    today: str,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
) -> str:
    """Return the text of a conversation.

    Args:
        source: the chat template.
        variables: names of special tokens and their text, such as {"bos_token": "<s>"}.
        today: the date that `strftime_now` formats, YYYY-MM-DD.

    Raises:
        TemplateError: the template calls `raise_exception`, has an error or exceeds a bound.
        Exception: anything else that the template's expressions raise.
    """
    environment, template = _compile(source, today)
    environment.rounds_left = MAX_ROUNDS
    pieces, length = [], 0
    for piece in template.generate(
        **variables,
        messages=[_with_thought_names(message) for message in messages],
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
    ):
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise TemplateError(f"the text exceeds {MAX_CHARACTERS:,} characters")
        pieces.append(piece)
    return _checked("".join(pieces))


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TemplateError("it writes half of a surrogate pair, which is no text") from None
    return text


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers' chat templates, with a budget of rounds and calls."""

    rounds_left = 0

    def spend_round(self) -> None:
        self.rounds_left -= 1
        if self.rounds_left < 0:
            raise TemplateError(f"more than {MAX_ROUNDS:,} rounds of loops and calls")

    def count_rounds(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.spend_round()
            yield value

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self.spend_round()
        return super().call(*args, **kwargs)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in list(source.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "count_rounds", [], [], None, None)
        return super()._generate(source, *args, **kwargs)


class _Generation(Extension):
    """The tag `{% generation %}`, in a scope of its own. Its mark is not needed here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: Macro) -> str:
        return caller()


class _Namespace(Namespace):
    """A namespace without attributes that reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class _Dict:
    """`dict` in a template: builds dictionaries and has no other attribute of Python's type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


@functools.lru_cache(8)
def _compile(source: str, today: str) -> tuple[_Environment, Any]:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    moment = datetime.combine(date.fromisoformat(today), time())
    environment.filters |= {"tojson": _to_json, "count_rounds": environment.count_rounds}
    del environment.filters["random"], environment.globals["lipsum"]
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": moment.strftime,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    try:
        return environment, environment.from_string(source)
    except TemplateSyntaxError as error:
        raise TemplateError(f"line {error.lineno}: {error.message}") from None


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter adds."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _with_thought_names(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose thought has the two names that templates read, as in transformers."""
    thought = message.get("reasoning_content")
    return message if thought is None else {"thinking": thought, **message}
