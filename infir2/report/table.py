"""Lines of metrics.jsonl as numbers: a long run's lines need not fit into memory as objects."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from infir2.report.samples import LARGEST, Row, number


class _Part(NamedTuple):
    """The lines with the same names in the same order."""

    indices: dict[str, int]  # of the names
    positions: np.ndarray  # of the lines in the table
    values: np.ndarray  # float64 [lines, names]


@dataclass(frozen=True, eq=False)
class Table:
    """Lines of one kind, by step.

    Example: `table["loss"]` is float64 [steps], NaN where it is absent or not finite.

    Attributes:
        steps: float64 [steps], ascending.
        rows: the lines themselves, if they were kept.
    """

    steps: np.ndarray = field(default_factory=lambda: np.empty(0))
    rows: tuple[Row, ...] = ()
    parts: Sequence[_Part] = ()
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.columns:
            column = np.full(len(self), np.nan)
            for part in self.parts:
                if name in part.indices:
                    column[part.positions] = part.values[:, part.indices[name]]
            self.columns[name] = np.where(np.abs(column) < LARGEST, column, np.nan)
        return self.columns[name]

    def has(self, name: str) -> bool:
        return bool(np.isfinite(self[name]).any())


class Lines:
    """Collects the lines of one kind and, if `keep_rows`, keeps them whole."""

    def __init__(self, keep_rows: bool = False) -> None:
        self._num_lines = 0
        self._newest: dict[float, int] = {}  # step -> the last line of that step
        self._rows: dict[float, Row] | None = {} if keep_rows else None
        self._parts: dict[tuple[str, ...], tuple[array[int], array[float]]] = {}  # lines, values

    def add(self, row: Row) -> None:
        """The next line of the file, without its kind; one without a finite step is left out."""
        step = number(row.get("step", 0))
        if not math.isfinite(step):
            return
        self._newest[step] = self._num_lines
        if self._rows is not None:
            self._rows[step] = row
        try:
            numbers = array("d", row.values())
        except (TypeError, OverflowError):  # slower, for texts and nulls
            numbers = array("d", map(number, row.values()))
        lines, values = self._parts.setdefault(tuple(row), (array("q"), array("d")))
        lines.append(self._num_lines)
        values.extend(numbers)
        self._num_lines += 1

    def table(self) -> Table:
        """The last line of each step, in the order of steps."""
        steps = sorted(self._newest)
        position = np.full(self._num_lines, -1)
        position[[self._newest[step] for step in steps]] = np.arange(len(steps))
        return Table(
            steps=np.array(steps, dtype=np.float64),
            rows=tuple(self._rows[step] for step in steps) if self._rows else (),
            parts=[_part(names, *part, position) for names, part in self._parts.items()],
        )


def _part(
    names: tuple[str, ...], lines: Sequence[int], values: Sequence[float], position: np.ndarray
) -> _Part:
    """Without the lines that have no position, -1."""
    positions = position[np.asarray(lines)]
    matrix = np.asarray(values).reshape(len(positions), len(names))
    indices = {name: index for index, name in enumerate(names)}
    return _Part(indices, positions[positions >= 0], matrix[positions >= 0])
