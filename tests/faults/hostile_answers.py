"""Answers that are meant to keep a checker busy, of 16 kinds."""

import random
from collections.abc import Callable

ATOMS = (
    "1", "2", "x", "n", "i", "e", "0.5", "\\pi", "\\infty", "\\alpha", "\\sqrt{2}", "\\frac12",
    "10^{10}", "9^9", "\\binom{40}{20}", "∞", "٣", "²", "√", "\\log x", "\\sin x", "\\text{cm}",
    "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
)  # fmt: skip
SIGNS = (
    "+", "-", "*", "/", "^", "=", "<", ",", ";", ":", "|", " ", "_", "!", "\\cdot ", "\\times ",
    "\\pm ", "\\cup ", "\\le ", "\\in ",
)  # fmt: skip
OPEN = ("(", "{", "[", "\\left(", "\\sqrt{", "\\frac{1}{", "e^{", "\\sin(", "|", "\\text{")
SIZE = ("\\left", "\\left(", "\\right", "\\left|", "\\left.")
BLOCKS = ((32, 0x250), (0x370, 0x3000), (0x4E00, 0x9FFF), (0x1D400, 0x1D7FF))
SIZES = (3, 10, 30, 39, 41, 100, 400, 900)


def hostile_answers(count: int, seed: int) -> list[str]:
    """That many answers, without a box around them."""
    rng = random.Random(seed)
    return [rng.choice(KINDS)(rng, rng.choice(SIZES)) for _ in range(count)]


def _sum(rng: random.Random, size: int) -> str:
    return "".join(rng.choice(ATOMS) + rng.choice(SIGNS) for _ in range(min(size, 100)))


def _matrix(rng: random.Random, size: int) -> str:
    side = range(min(size, 12))
    rows = "\\\\".join("&".join(rng.choice(ATOMS) for _ in side) for _ in side)
    return f"\\begin{{pmatrix}}{rows}\\end{{pmatrix}}"


def _unicode(rng: random.Random, size: int) -> str:
    return "".join(chr(rng.randrange(*rng.choice(BLOCKS))) for _ in range(size))


def _radicals(rng: random.Random, size: int) -> str:
    numbers = (rng.randrange(10 ** rng.choice((1, 5, 30))) for _ in range(min(size, 60)))
    return "+".join(f"\\sqrt{{{number}}}" for number in numbers)


def _bound(rng: random.Random, size: int) -> str:
    sign, end = rng.choice(("sum", "prod", "int", "lim")), rng.choice(("10^9", "\\infty", "99999"))
    return f"\\{sign}_{{n=1}}^{{{end}}} {rng.choice(ATOMS)}^n"


def _polynomial(rng: random.Random, size: int) -> str:
    terms = "+".join(f"x_{{{index}}}" for index in range(min(size, 40)))
    return f"({terms})^{{{rng.choice((2, 20, 200, 3000))}}}"


def _functions(rng: random.Random, size: int) -> str:
    name = rng.choice(("sin", "tan", "log", "exp", "Gamma", "zeta"))
    inner = rng.choice(("10^{100}", "x^x", "9^{9^9}", "\\pi/7"))
    return f"\\{name}" * rng.choice((1, 5, 20)) + f"({inner})"


KINDS: tuple[Callable[[random.Random, int], str], ...] = (
    _sum, _matrix, _unicode, _radicals, _bound, _polynomial, _functions,
    lambda rng, size: rng.choice(OPEN) * size + rng.choice(ATOMS) + rng.choice(")}]") * size,
    lambda rng, size: f"{rng.choice('29xe')}^{{{10 ** rng.choice((3, 6, 9, 20, 300))}}}",
    lambda rng, size: "^".join(rng.choice("23459x") for _ in range(rng.randint(2, 4))),
    lambda rng, size: f"{rng.choice((20, 170, 5000, 10**7, 10**12))}" + "!" * rng.randint(1, 4),
    lambda rng, size: rng.choice(("{}", "()", "$", "\\{\\}", "\\\\", "&", "^{}", "_{}")) * size,
    lambda rng, size: rng.choice(SIZE) * size + "8",
    lambda rng, size: "\\frac{" * size + "1" + "}{2}" * size,
    lambda rng, size: "1" * size + rng.choice("/.^e!") + "7" * rng.choice((1, 3, size)),
    lambda rng, size: "".join(rng.choice("01278xyz+-*/^_{}()[]\\!|,.;:= ") for _ in range(size)),
)  # fmt: skip
