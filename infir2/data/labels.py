"""The label of a prompt: what each reward of a recipe needs of its row."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infir2.config.reward_rules import is_function, is_gym, is_server
from infir2.config.rl_section import RewardSection, RlSection
from infir2.data.messages import find
from infir2.data.types import RowError
from infir2.verify.answers import is_missing_label
from infir2.verify.choices import choice_letters
from infir2.verify.programs import read_tests

MATH = RewardSection(name="math")
GYM_FIELD = "reasoning_gym"  # of a generated problem: {"task": "reasoning_gym:NAME", ...}


def text_label(value: Any, field: str) -> str:
    """A text or a number that is no missing value. Raises RowError."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError("bad_field", f"`{field}` is neither text nor a number")
    if not str(value).strip():
        raise RowError("empty", f"`{field}` is empty")
    if is_missing_label(str(value)):
        raise RowError("bad_field", f"`{field}` is {value}, which is no answer")
    return str(value)


def choice_label(value: Any, field: str) -> str:
    """Letters of a choice. Raises RowError."""
    label = text_label(value, field)
    if not choice_letters(label):
        raise RowError("bad_field", f"`{field}` is {label[:50]!r}, which is no letter of a choice")
    return label


def code_label(value: Any, field: str) -> str:
    """Tests, as JSON. Raises RowError."""
    try:
        return json.dumps(read_tests(value))
    except (ValueError, TypeError, RecursionError) as error:
        raise RowError("bad_field", f"`{field}`: the tests {error}") from None


def any_label(value: Any, field: str) -> str:
    """Text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


# What reads a label; a reward that is not here needs none.
LABELS: dict[str, Callable[[Any, str], str]] = {
    "math": text_label,
    "answer": text_label,
    "require_thinking": text_label,
    "choice": choice_label,
    "code": code_label,
}


@dataclass(frozen=True)
class Labels:
    """Reads the labels of rows for these rewards, the choice of `rl.reward_field` among them."""

    rewards: tuple[RewardSection, ...] = (MATH,)
    field: str = ""
    keep_rows: bool = False  # for an environment of one's own

    @property
    def are_required(self) -> bool:
        """Whether every row has a label."""
        return all(each.name in LABELS or is_gym(each.name) for each in self.rewards)

    @property
    def need_whole_rows(self) -> bool:
        """Whether a reward may read any field of a row."""
        own = (is_function(each.name) or is_server(each.name) for each in self.rewards)
        return self.keep_rows or any(own)

    def read(self, row: dict[str, Any], answer_field: str) -> tuple[str, dict[str, Any]]:
        """The label as text ("" for none), and the fields that rewards need of the row.

        Raises:
            RowError: the label is missing or not what a reward needs, or no reward is for the row.
        """
        fields = {self.field: find(row, self.field)} if self.field else {}
        if self.need_whole_rows:
            fields |= json.loads(json.dumps(row, default=str))
        needed = [LABELS[each.name] for each in self.of_row(fields) if each.name in LABELS]
        if needed:
            value = find(row, answer_field)
            first, *_ = [read(value, answer_field) for read in needed]
            return first, fields
        try:
            return any_label(find(row, answer_field), answer_field), fields
        except RowError:
            return "", fields

    def of_row(self, fields: dict[str, Any]) -> list[RewardSection]:
        """The rewards of a row with these fields. Raises RowError if there is none.

        A generated problem has its task's reward and those that need no label; a row of a file has
        no task's.
        """
        task = gym_task(fields)
        value = task or (str(find(fields, self.field)) if self.field else "")
        chosen = [
            each
            for each in self.rewards
            if (not self.field or value in (each.rows or (each.name,)))
            and (each.name == task or not (each.name in LABELS if task else is_gym(each.name)))
        ]
        if not chosen:
            cause = f"`{self.field}` is {value[:50]!r}: " if self.field else ""
            raise RowError("bad_field", f"{cause}no rl.reward is for it")
        return chosen


def gym_task(fields: dict[str, Any]) -> str:
    """The task of reasoning-gym that has generated a prompt with these fields, or ""."""
    problem = fields.get(GYM_FIELD)
    return str(problem.get("task", "")) if isinstance(problem, dict) else ""


def labels_of(rl: RlSection) -> Labels:
    """The reader of a recipe's labels."""
    return Labels(rl.reward, rl.reward_field, is_function(rl.environment))
