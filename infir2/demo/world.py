"""The data of `infir2 demo`: a world of arithmetic that 1 M parameters learn in minutes.

A problem is a start value 1-20 and 2-4 steps of plus or minus 1-6 whose partial results stay in
0-49, asked as a formula ("What is 7+5-3?") or as a story ("Tom has 7 apples. Tom finds 5 more.
..."). A good answer thinks first:

    <think>7+5=12;12-3=9</think>\\boxed{9}

Continual pre-training teaches the arithmetic, SFT the form of an answer. A fraction of the SFT
rows answers without a thought, so that RL has a behavior to select. A hash of (start, steps)
decides whether a problem is held out; no training text contains a held-out chain of steps, not
even as a part of a longer chain.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from infir2.demo.tokenizer import build_vocabulary, pre_tokens, write_tokenizer
from infir2.directories import new_directory
from infir2.errors import OutputExistsError

DIFFICULTIES = (2, 3, 4)
LARGEST_START, LARGEST_STEP, LARGEST_VALUE = 20, 6, 49
HELD_OUT_ONE_IN = 16

NAMES = ("Anna", "Ben", "Lisa", "Mia", "Sam", "Tom")
THINGS = ("apples", "books", "cards", "coins", "pens", "shells")
GAINS = ("finds", "gets", "buys")
LOSSES = ("loses", "sells", "gives away")
FORMULA_QUESTIONS = ("What is {}?", "Compute {}.", "{}=?")


@dataclass(frozen=True)
class DemoWorld:
    """Sizes and proportions. A `difficulty` weighs problems of 2, 3 and 4 steps."""

    cpt_tokens: int = 1_638_400  # 1,600 steps of 1,024 tokens
    # solved problems, single facts, stories with their results
    cpt_shares: tuple[float, float, float] = (0.85, 0.1, 0.05)
    cpt_difficulty: tuple[float, float, float] = (0.3, 0.35, 0.35)
    validation_documents: int = 1024
    sft_rows: int = 4096
    sft_difficulty: tuple[tuple[float, float, float], ...] = ((0.5, 0.35, 0.15), (0.25, 0.35, 0.4))
    sft_empty_thoughts: tuple[float, ...] = (0.65, 0.4)
    rl_rows: tuple[int, ...] = (1536, 3072)
    rl_difficulty: tuple[tuple[float, float, float], ...] = ((0.4, 0.35, 0.25), (0.25, 0.35, 0.4))
    held_out_rows: int = 360


@dataclass(frozen=True)
class Chain:
    """`start`, then signed steps; `values` are the partial results, the last one is the answer."""

    start: int
    steps: tuple[int, ...]

    @property
    def values(self) -> tuple[int, ...]:
        values = [self.start]
        for step in self.steps:
            values.append(values[-1] + step)
        return tuple(values[1:])

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def formula(self) -> str:
        return str(self.start) + "".join(f"{step:+d}" for step in self.steps)

    @property
    def thought(self) -> str:
        befores = (self.start, *self.values)
        return ";".join(
            f"{before}{step:+d}={after}"
            for before, step, after in zip(befores, self.steps, self.values, strict=False)
        )


@cache
def held_out(start: int, steps: tuple[int, ...]) -> bool:
    """Whether this problem is in the held-out split, which is the same for every seed."""
    digest = hashlib.blake2b(f"{start} {steps}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def contains_held_out(chain: Chain) -> bool:
    """Whether any two or more consecutive steps of the chain are a held-out problem."""
    befores = (chain.start, *chain.values)
    length = len(chain.steps)
    return any(
        held_out(befores[first], chain.steps[first:last])
        for first in range(length - 1)
        for last in range(first + 2, length + 1)
    )


def random_chain(random_source: random.Random, num_steps: int, is_held_out: bool = False) -> Chain:
    """A chain with all partial results in 0-49; plus and minus are equally likely.

    With `is_held_out` the chain is a held-out problem, otherwise no part of it is one.
    """
    while True:
        steps = tuple(
            random_source.choice((-1, 1)) * random_source.randint(1, LARGEST_STEP)
            for _ in range(num_steps)
        )
        chain = Chain(random_source.randint(1, LARGEST_START), steps)
        if not all(0 <= value <= LARGEST_VALUE for value in chain.values):
            continue
        if held_out(chain.start, steps) if is_held_out else not contains_held_out(chain):
            return chain


def story(random_source: random.Random, chain: Chain, with_results: bool) -> str:
    """The chain as a story: a statement after each step, or one question at the end."""
    name, thing = random_source.choice(NAMES), random_source.choice(THINGS)
    sentences = [f"{name} has {chain.start} {thing}."]
    for step, value in zip(chain.steps, chain.values, strict=True):
        verb = random_source.choice(GAINS if step > 0 else LOSSES)
        sentences.append(f"{name} {verb} {abs(step)}{' more' * (step > 0)}.")
        if with_results:
            sentences.append(f"Now {name} has {value} {thing}.")
    if not with_results:
        sentences.append(f"How many {thing} does {name} have?")
    return " ".join(sentences)


def question(random_source: random.Random, chain: Chain) -> str:
    """Half formulas, half stories."""
    if random_source.random() < 0.5:
        return random_source.choice(FORMULA_QUESTIONS).format(chain.formula)
    return story(random_source, chain, with_results=False)


def random_fact(random_source: random.Random) -> tuple[int, int]:
    """A value 0-49 and one step from it that stays in the range."""
    while True:
        before = random_source.randint(0, LARGEST_VALUE)
        step = random_source.choice((-1, 1)) * random_source.randint(1, LARGEST_STEP)
        if 0 <= before + step <= LARGEST_VALUE:
            return before, step


def facts(random_source: random.Random, count: int) -> str:
    """Single steps over the range of values; none continues the one before, as a chain would."""
    lines: list[str] = []
    previous = -1
    while len(lines) < count:
        before, step = random_fact(random_source)
        if before != previous:
            lines.append(f"{before}{step:+d}={before + step}")
            previous = before + step
    return ";".join(lines)


def document(random_source: random.Random, world: DemoWorld) -> str:
    """One text of the pre-training corpus, 12-60 tokens."""
    (kind,) = random_source.choices(("problem", "facts", "story"), world.cpt_shares)
    if kind == "facts":
        return facts(random_source, random_source.randint(4, 8))
    (num_steps,) = random_source.choices(DIFFICULTIES, world.cpt_difficulty)
    if kind == "story":
        if num_steps == DIFFICULTIES[0]:
            before, step = random_fact(random_source)
            return story(random_source, Chain(before, (step,)), with_results=True)
        return story(random_source, random_chain(random_source, num_steps - 1), with_results=True)
    chain = random_chain(random_source, num_steps)
    return f"{question(random_source, chain)}\n{chain.thought}\nThe answer is {chain.answer}."


def documents(random_source: random.Random, world: DemoWorld) -> Iterator[str]:
    """Documents until `cpt_tokens` are reached, the end token of each counted."""
    tokens = 0
    while tokens < world.cpt_tokens:
        text = document(random_source, world)
        tokens += len(pre_tokens(text)) + 1
        yield text


def problems(
    random_source: random.Random,
    count: int,
    difficulty: tuple[float, ...],
    is_held_out: bool = False,
) -> Iterator[tuple[str, Chain]]:
    """`count` problems with the given weights of difficulties, up to rounding.

    They differ from each other as long as 100 draws find a new one.
    """
    seen: set[Chain] = set()
    sizes = [round(count * share / sum(difficulty)) for share in difficulty]
    sizes[-1] = count - sum(sizes[:-1])
    order = [
        num_steps for num_steps, size in zip(DIFFICULTIES, sizes, strict=True) for _ in range(size)
    ]
    random_source.shuffle(order)
    for num_steps in order:
        for _ in range(100):
            chain = random_chain(random_source, num_steps, is_held_out)
            if chain not in seen:
                break
        seen.add(chain)
        yield question(random_source, chain), chain


def conversations(random_source: random.Random, world: DemoWorld, stage: int) -> Iterator[dict]:
    """`messages` rows of one SFT stage; an exact fraction answers right with an empty thought."""
    empty = round(world.sft_rows * world.sft_empty_thoughts[stage])
    thinks = [False] * empty + [True] * (world.sft_rows - empty)
    random_source.shuffle(thinks)
    rows = problems(random_source, world.sft_rows, world.sft_difficulty[stage])
    for think, (text, chain) in zip(thinks, rows, strict=True):
        answer = f"<think>{chain.thought if think else ''}</think>\\boxed{{{chain.answer}}}"
        yield {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer},
            ],
            "difficulty": len(chain.steps),
        }


def prompts(rows: Iterable[tuple[str, Chain]]) -> Iterator[dict]:
    for text, chain in rows:
        yield {"prompt": text, "label": str(chain.answer), "difficulty": len(chain.steps)}


def every_phrase() -> Iterator[str]:
    """Texts that use every word of the world, for the vocabulary."""
    for name in NAMES:
        for thing in THINGS:
            statements = f"{name} has 1 {thing}. {name} does. Now {name} has 2."
            yield f"{statements} How many {thing} does {name} have?"
    yield from (f"Tom {verb} 1 more." for verb in (*GAINS, *LOSSES))
    yield from (text.format("1+1-1=1;1") for text in FORMULA_QUESTIONS)
    yield "1=1\nThe answer is 1.\\boxed{1}"


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_demo_world(directory: Path, seed: int, world: DemoWorld | None = None) -> None:
    """Write the demo's tokenizer and data; the same seed and sizes give the same bytes.

    Writes `tokenizer/`, `cpt.jsonl` and `cpt_validation.jsonl` (`text`), `sft1.jsonl` and
    `sft2.jsonl` (`messages`, `difficulty`), `rl1.jsonl`, `rl2.jsonl` and `heldout.jsonl`
    (`prompt`, `label`, `difficulty`). A difficulty is a number of steps.

    Raises OutputExistsError if the directory is not empty. After an error nothing is left of it.
    """
    if directory.exists() and any(directory.iterdir()):
        raise OutputExistsError(
            f"{directory} already holds files: "
            "choose another directory for the demo's data, or remove it."
        )
    if directory.exists():
        directory.rmdir()
    with new_directory(directory) as work:
        _write_world(work, seed, world or DemoWorld())


def _write_world(directory: Path, seed: int, world: DemoWorld) -> None:
    write_tokenizer(directory / "tokenizer", build_vocabulary(every_phrase()))

    def source(name: str) -> random.Random:
        # random hashes a text seed with SHA-512, the same on every platform.
        return random.Random(f"{seed}/{name}")

    corpus = list(documents(source("cpt"), world))
    write_rows(directory / "cpt.jsonl", ({"text": text} for text in corpus))
    known, unseen, validation_source = set(corpus), set[str](), source("cpt_validation")
    while len(unseen) < world.validation_documents:
        unseen |= {document(validation_source, world)} - known
    write_rows(directory / "cpt_validation.jsonl", ({"text": text} for text in sorted(unseen)))
    for stage in range(len(world.sft_empty_thoughts)):
        write_rows(
            directory / f"sft{stage + 1}.jsonl",
            conversations(source(f"sft{stage + 1}"), world, stage),
        )
    for stage, count in enumerate(world.rl_rows):
        rows = problems(source(f"rl{stage + 1}"), count, world.rl_difficulty[stage])
        write_rows(directory / f"rl{stage + 1}.jsonl", prompts(rows))
    held = problems(source("heldout"), world.held_out_rows, (1, 1, 1), is_held_out=True)
    write_rows(directory / "heldout.jsonl", prompts(held))
