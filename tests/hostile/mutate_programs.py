"""Hostile programs: mutants of other programs, many with a line that attacks the jail.

for name, program in itertools.islice(mutants(program, seed=0), 10): ...
"""

import random
from collections.abc import Iterator

ATTACKS = (
    *("import os; [os.fork() for _ in range(20)]", "x = bytearray(1 << 40)", "while True: pass"),
    *("x = [0]\nwhile True: x += x", "import os; os._exit(0)", "raise SystemExit(0)"),
    *("import sys; sys.setrecursionlimit(10**9); f = lambda *a: f(*a)", "print('x' * (1 << 26))"),
    *('import os; [os.write(n, b\'{"outcome": "ok"}\\n\') for n in (1, 2)]', "1 / 0", "(" * 9999),
    *("import os, signal; os.kill(0, signal.SIGKILL)", "import ctypes; ctypes.string_at(0)"),
    *("import socket; socket.create_connection(('127.0.0.1', 80))", "open('/etc/passwd').read()"),
    *("import threading; [threading.Thread(target=input).start() for _ in range(99)]", "\0", "é"),
    *("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "x = 9 ** 9 ** 9"),
    *("open('/tmp/x', 'wb').write(bytes(1 << 30))", "import os; os.setsid(); os.fork()"),
    *(
        "import builtins; builtins.abs = builtins.len = lambda *a: 0",
        "del f",
        "def f(*a): return f",
    ),
)


def mutants(program: str, seed: int) -> Iterator[tuple[str, str]]:
    """Endless (name of the mutation, program)."""
    chance = random.Random(seed)
    while True:
        lines = program.splitlines() or [""]
        names = [_change(lines, chance) for _ in range(chance.choice((1, 1, 2, 3)))]
        yield ", ".join(names), "\n".join(lines)


def _change(lines: list[str], chance: random.Random) -> str:
    at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    kind = chance.choice(("attack", "attack", "delete", "repeat", "swap", "cut"))
    if kind == "attack":
        attack = chance.choice(ATTACKS)
        begin = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines[at:at] = [begin + line for line in attack.splitlines()]
        return f"{attack[:40]!r} in line {at}"
    if kind == "delete" and len(lines) > 1:
        del lines[at]
    elif kind == "repeat":
        lines.insert(at, lines[at])
    elif kind == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines[at] = lines[at][: chance.randrange(len(lines[at]) + 1)]
    return f"{kind} line {at}"
