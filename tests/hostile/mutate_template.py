"""Hostile chat templates: programs that cost time or memory, and mutants of a good template.

for name, template in itertools.islice(mutants(GOOD, seed=0), 100): ...
"""

import random
import re
from collections.abc import Iterator

GOOD = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SNIPPETS = (
    *("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",),
    *("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "{{ 'a' * 200000000 }}"),
    *("{{ (['a' * 1000000] * 1000) | join }}", "{{ 'a' | center(10000000000) }}"),
    *("{{ range(10000000000) | list }}", "{{ 10 ** (10 ** 9) }}", "{{ 9 ** 9 ** 9 ** 9 }}"),
    *("{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ undefined.a.b }}", "{{ m['x' * 10000000] }}"),
    *("{% set x = [1] %}{% for i in x %}{{ x.append(1) }}{% endfor %}",),
    *("{% set x = [] %}{{ x.append(x) or x }}", "{{ [[[]]] * 100000000 }}"),
    *("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "{{ '%1000000000d' % 1 }}"),
    *("{{ '{:1000000000}'.format(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    *("{{ cycler.__init__.__globals__.os.system('true') }}", "{{ lipsum(n=100000) }}"),
    *("{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'x' %}"),
    *("{{ raise_exception('\x1b[31m' * 9999) }}", "{{ strftime_now('%Y' * 1000000) }}"),
    *("{{ messages | tojson(indent=100000000) }}", "{{ messages.append(1) }}", "{{ loop }}"),
    *("{% set ns = namespace(a=1) %}{% set ns.a = ns %}{{ ns.a }}", "\0", "\ud800", "{#", "{%"),
    *("{{ " + "(" * 5000 + ")" * 5000 + " }}", "{{ " + "[" * 90 + "]" * 90 + " }}"),
    *("{% if 1 %}" * 3000, "{% for a in 'ab' %}" * 30 + "{% endfor %}" * 30, "{{ " + "-" * 9999),
    *("{{ " + "9" * 6000 + " * 1 }}", "{{ 'a' ~ " * 500 + "1 }}", "x" * 2000000),
)
VALUES = ("1", "''", "none", "[]", "messages", "m", "m.role * 1000000", "undefined", "-1", "loop")


def mutants(good: str, seed: int) -> Iterator[tuple[str, str]]:
    """Endless (name of the mutation, template): each snippet once, then mutants of `good`."""
    chance = random.Random(seed)
    for snippet in chance.sample(SNIPPETS, len(SNIPPETS)):
        yield f"snippet-{snippet[:40]!r}", snippet + good
    while True:
        parts = [part for part in re.split(r"(\{[{%].*?[}%]\})", good, flags=re.DOTALL) if part]
        names = [_change(parts, chance) for _ in range(chance.choice((1, 1, 2, 3)))]
        yield ", ".join(names), "".join(parts)


def _change(parts: list[str], chance: random.Random) -> str:
    """Change one tag or text of a template; returns what was done."""
    at, other = chance.randrange(len(parts)), chance.randrange(len(parts))
    kind = chance.choice(("insert", "delete", "repeat", "swap", "value", "character"))
    if kind == "insert":
        parts.insert(at, chance.choice(SNIPPETS))
    elif kind == "delete" and len(parts) > 1:
        del parts[at]
    elif kind == "repeat":
        parts[at] *= chance.choice((2, 3, 1000))
    elif kind == "swap":
        parts[at], parts[other] = parts[other], parts[at]
    elif kind == "value":
        value = chance.choice(VALUES)
        parts[at] = re.sub(r"messages|m\.\w+|'[^']*'", lambda _: value, parts[at], count=1)
    elif parts[at]:
        where = chance.randrange(len(parts[at]))
        letter = chance.choice("{}%'\"()[]|.+-~\n\0a9")
        parts[at] = parts[at][:where] + letter + parts[at][where + 1 :]
    return f"{kind}-{at}"
