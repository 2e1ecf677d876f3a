"""`infir2 eval contamination`: which questions share word n-grams with the training data."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infir2.data.indexed import IndexedDocuments
from infir2.data.sources import Source
from infir2.data.types import RowError
from infir2.errors import DataError
from infir2.evaluate.benchmark_data import find_data_files, read_rows
from infir2.evaluate.benchmarks import text_of
from infir2.terminal import begin_phase

NGRAM = 13  # words, as in GPT-3 (arXiv 2005.14165, appendix C)
SHORTEST = 5  # a question of fewer words than an n-gram is looked for as a whole
QUESTION = ("problem", "question", "question content", "prompt", "text")
_WORD = re.compile(r"\w+")
Gram = tuple[str, ...]


@dataclass
class Overlap:
    """One question: `shared` of its `ngrams` occur in `rows` training rows, first in `found_in`."""

    question: str
    origin: str
    ngrams: int
    shared: int = 0
    rows: int = 0
    found_in: str = ""

    @property
    def share(self) -> float:
        return self.shared / self.ngrams if self.ngrams else 0.0

    def describe(self) -> str:
        more = f" and {self.rows - 1:,} more rows" if self.rows > 1 else ""
        return (
            f"{self.origin}: {self.shared} of {self.ngrams} n-grams "
            f"({100 * self.share:.0f} %) are in {self.found_in}{more}"
        )


@dataclass(frozen=True)
class Contamination:
    """`overlaps`: questions that share something, most first; `too_short`: skipped ones."""

    questions: int
    rows: int
    unreadable_rows: int
    overlaps: list[Overlap] = field(default_factory=list)
    too_short: list[str] = field(default_factory=list)

    def describe(self) -> str:
        lines = [each.describe() for each in self.overlaps]
        short = f"; {len(self.too_short)} are too short to tell" if self.too_short else ""
        bad = f" ({self.unreadable_rows:,} are not readable)" if self.unreadable_rows else ""
        lines.append(
            f"{len(self.overlaps)} of {self.questions} questions share {NGRAM}-grams with "
            f"{self.rows:,} rows of training data{bad}{short}."
        )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def find_contamination(training: Sequence[Path], data: Path) -> Contamination:
    """Look for the questions of `data` (a file or directory) in all texts of training rows.

    Words are compared without case and punctuation. Raises DataError for a path that is missing or
    has no questions, and for tokenized training data.
    """
    questions, grams = _questions(data)
    rows = bad = 0
    for path in training:
        begin_phase(f"reading {path}")
        source = Source(path)
        if any(isinstance(file, IndexedDocuments) for file in source.files):
            raise DataError(f"{path} is tokenized: name the text that it was made of.")
        rows += len(source)
        for index in range(len(source)):
            try:
                texts = list(_texts(source.read(index)))
            except RowError:
                bad += 1
                continue
            for number in _shared(texts, grams):
                overlap = questions[number]
                overlap.rows += 1
                overlap.found_in = overlap.found_in or source.origin(index)
    for number in (n for sizes in grams.values() for g in sizes.values() if g.found for n in g.of):
        questions[number].shared += 1
    hit = sorted((each for each in questions if each.shared), key=lambda each: -each.share)
    short = [each.origin for each in questions if not each.ngrams]
    return Contamination(len(questions), rows, bad, hit, short)


@dataclass
class _Owners:
    """The numbers of the questions that have an n-gram, and whether training data has it."""

    of: set[int] = field(default_factory=set)
    found: bool = False


Grams = dict[int, dict[Gram, _Owners]]  # by number of words


def _questions(data: Path) -> tuple[list[Overlap], Grams]:
    questions: list[Overlap] = []
    grams: Grams = {}
    for file in find_data_files(data):
        for origin, row in read_rows(file):
            try:
                text = text_of(row, *QUESTION)
            except RowError as error:
                raise DataError(f"{origin} {error}: name files with questions.") from None
            words = _words(text)
            size = min(NGRAM, len(words))
            own = set(_ngrams(words, size)) if size >= SHORTEST else set()
            for gram in own:
                grams.setdefault(size, {}).setdefault(gram, _Owners()).of.add(len(questions))
            questions.append(Overlap(text, origin, len(own)))
    return questions, grams


def _shared(texts: Iterable[str], grams: Grams) -> set[int]:
    """The questions that share an n-gram with a row; the n-grams are marked as found."""
    hit: set[int] = set()
    for text in texts:
        words = _words(text)
        for size, wanted in grams.items():
            for gram in wanted.keys() & set(_ngrams(words, size)):
                wanted[gram].found = True
                hit |= wanted[gram].of
    return hit


def _texts(value: Any) -> Iterator[str]:
    """All texts of a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: list[str], size: int) -> Iterator[Gram]:
    return zip(*(words[start:] for start in range(size)), strict=False)
