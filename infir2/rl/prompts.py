"""The prompts of RL in the order in which they are drawn.

All prompts of the files are drawn once per epoch, in a seeded order; sources with different weights
are mixed in proportion to these instead, each with epochs of its own. A prompt whose responses were
all right rests for the next `rl.rest_epochs` epochs. A task of reasoning-gym is a source of
`rl.gym_problems` new problems per epoch, whose level rises by one after a step whose responses to
problems of that level have scored at least `rl.gym_raise_at` on average.
"""

import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from infir2.config.reward_rules import GYM, is_gym
from infir2.config.schema import RlSection
from infir2.data import ChatTokenizer, Prompt
from infir2.data.labels import gym_task
from infir2.data.mixture import Mixture, RowPosition
from infir2.errors import DataError
from infir2.rl.groups import Group
from infir2.rl.reward_services import make_prompt
from infir2.verify.gym import highest_level

MAX_TOO_LONG = 1000  # problems of a task in a row


@dataclass(frozen=True)
class DrawnPrompt:
    """A prompt to sample responses to. Example: `DrawnPrompt("0/p17", prompt, [5, 9, 2])`."""

    name: str  # "epoch/id", which seeds the sampling and differs within a step
    prompt: Prompt
    token_ids: list[int]
    opened_thought: str = ""  # beginning of the response that the prompt ends with: "<think>\n"


class _Rendered(NamedTuple):
    prompt: Prompt
    token_ids: list[int]
    opened_thought: str


class PromptStream:
    """Draws the prompts, epoch after epoch.

    Attributes:
        num_too_long: prompts dropped because they exceed `rl.max_prompt_tokens`.
        num_duplicates: prompts dropped because they equal an earlier one (`normalized`).
        longest_prompt_tokens: tokens of the longest prompt that may be drawn.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: ChatTokenizer,
        rl: RlSection,
        seed: int,
        state: dict[str, Any] | None = None,
        weights: Sequence[float] = (),
        system_prompt: str = "",
    ) -> None:
        """Begin where a stream of the same arguments had the given `state`.

        `weights` are those of the sources. Raises DataError for a source without a usable prompt.
        """
        state = state or {}
        self._tokenizer, self._rl, self._seed, self._system = tokenizer, rl, seed, system_prompt
        self._cursor: int = state.get("cursor", 0)
        self._tasks = [each.name for each in rl.reward if is_gym(each.name)]
        self._levels = dict.fromkeys(self._tasks, 0) | state.get("levels", {})
        distinct: dict[Hashable, Prompt] = {}
        for prompt in prompts:
            distinct.setdefault(normalized(prompt), prompt)
        self.num_duplicates = len(prompts) - len(distinct)
        rendered = list(map(self._render, distinct.values()))
        self._sources = self._split(prompts, rendered, weights)
        kept = [each for source in self._sources for each in source]
        self.num_too_long = len(rendered) - len(kept)
        self._mixture = self._mix(weights)
        self._epoch, self._order = -1, np.empty(0, dtype=int)  # of the one source of files
        self._row_of = {each.prompt.id: each for each in kept}
        longest = [len(each.token_ids) for each in kept]
        self.longest_prompt_tokens = max(longest) if not self._tasks else rl.max_prompt_tokens
        # The epoch until which a prompt rests, by its id.
        resting: dict[str, list[str]] = state.get("resting", {})
        self._rests = {name: int(until) for until, names in resting.items() for name in names}

    @property
    def state(self) -> dict[str, Any]:
        """What a stream needs to continue here: rows drawn, resting prompts, levels of tasks."""
        resting: dict[str, list[str]] = {}
        for name, until in sorted(self._rests.items()):
            resting.setdefault(str(until), []).append(name)
        return {"cursor": self._cursor, "resting": resting, "levels": dict(self._levels)}

    def draw(self, count: int) -> list[DrawnPrompt]:
        """The next `count` prompts that do not rest. Raises DataError if no problem is short."""
        drawn: list[DrawnPrompt] = []
        num_missed = 0
        while len(drawn) < count:
            found = self._at(self._cursor)
            self._cursor += 1
            num_missed = 0 if found else num_missed + 1
            drawn += [found] if found else []
            if num_missed > MAX_TOO_LONG + (self._rl.rest_epochs + 1) * self._num_rows:
                raise DataError(
                    f"{', '.join(self._tasks)}: no problem has at most "
                    f"{self._rl.max_prompt_tokens} tokens: raise rl.max_prompt_tokens"
                )
        return drawn

    def named(self, name: str) -> DrawnPrompt | None:
        """A prompt that was drawn, by its name; None if there is no such prompt anymore."""
        prompt_id = name.partition("/")[2]
        if is_gym(prompt_id):
            task, level, number = prompt_id.rsplit("/", 2)
            made = make_prompt(task, self._seed, int(level), int(number), self._system)
            return DrawnPrompt(name, *self._render(made))
        rendered = self._row_of.get(prompt_id)
        return DrawnPrompt(name, *rendered) if rendered else None

    def observe(self, groups: Iterable[Group]) -> None:
        """Learn from a step's groups which prompts rest, and which tasks get harder."""
        scores: dict[str, list[float]] = {}
        for group in groups:
            epoch, _, prompt_id = group.name.partition("/")
            task = gym_task(group.prompt.fields)
            if task in self._tasks:
                if group.prompt.difficulty == self._levels[task]:
                    scores.setdefault(task, []).extend(_scores(group, task))
            elif self._rl.rest_epochs and all(each.correct for each in group.responses):
                self._rests[prompt_id] = int(epoch) + self._rl.rest_epochs
        for task, values in scores.items():
            weight = next(each.weight for each in self._rl.reward if each.name == task)
            if sum(values) >= self._rl.gym_raise_at * weight * max(1, len(values)):
                name, harder = task.removeprefix(GYM), self._levels[task] + 1
                level = highest_level(name, self._seed, harder)
                self._levels[task] = max(level, self._levels[task])

    @property
    def _num_rows(self) -> int:
        return sum(map(len, self._sources))

    def _render(self, prompt: Prompt) -> _Rendered:
        prefix = self._rl.response_prefix
        return _Rendered(prompt, *self._tokenizer.encode_prompt(prompt.messages, prefix))

    def _split(
        self, prompts: Sequence[Prompt], rendered: list[_Rendered], weights: Sequence[float]
    ) -> list[list[_Rendered]]:
        """The prompts that are not too long by source; all in one if drawn equally often."""
        kept = [each for each in rendered if len(each.token_ids) <= self._rl.max_prompt_tokens]
        sources = [kept] if kept else []
        if len(set(weights)) > 1:
            sources = [
                [each for each in kept if each.prompt.id.startswith(f"{number}/")]
                for number in range(len(weights))
            ]
            for number, source in enumerate(sources):
                if not source:
                    distinct = [each.prompt for each in rendered]
                    raise DataError(self._cause(number, prompts, distinct))
        if not (sources or self._tasks):
            raise DataError(
                f"no prompt has at most {self._rl.max_prompt_tokens} tokens: raise "
                "rl.max_prompt_tokens or fix data.sources"
            )
        return sources

    def _cause(self, number: int, prompts: Sequence[Prompt], distinct: Sequence[Prompt]) -> str:
        """Why a source gives no prompt."""
        own, new = (
            sum(each.id.startswith(f"{number}/") for each in some) for some in (prompts, distinct)
        )
        if not own:
            cause = "none of its rows is a usable prompt; fix or remove the source"
        elif not new:
            cause = (
                "each of its prompts is also in an earlier source; remove the source, or give all "
                "sources the same weight"
            )
        else:
            cause = (
                f"none of its prompts{' that no earlier source has' * (new < own)} has at most "
                f"{self._rl.max_prompt_tokens} tokens: raise rl.max_prompt_tokens, or fix or "
                "remove the source"
            )
        return f"data.sources.{number}: {cause}"

    def _mix(self, weights: Sequence[float]) -> Mixture | None:
        """How sources and tasks are mixed; None for one source of files."""
        sizes = [*map(len, self._sources), *(self._rl.gym_problems for _ in self._tasks)]
        if len(sizes) == 1 and not self._tasks:
            return None
        shares = [float(size) for size in sizes]
        if len(set(weights)) > 1:
            shares = [*weights, *(1.0 for _ in self._tasks)]
        return Mixture(sizes, shares, self._seed)

    def _position(self, position: int) -> RowPosition:
        if self._mixture is not None:
            return self._mixture.row_at(position)
        epoch, index = divmod(position, len(self._sources[0]))
        if epoch != self._epoch:
            rows = np.random.default_rng([self._seed, epoch]).permutation(len(self._sources[0]))
            self._epoch, self._order = epoch, rows
        return RowPosition(0, int(self._order[index]), epoch)

    def _at(self, position: int) -> DrawnPrompt | None:
        """The prompt at a position; None for one that rests, and for a problem that is too long."""
        source, row, epoch = self._position(position)
        if source < len(self._sources):
            rendered = self._sources[source][row]
            is_drawn = self._rests.get(rendered.prompt.id, -1) < epoch
        else:
            task = self._tasks[source - len(self._sources)]
            number = epoch * self._rl.gym_problems + row
            rendered = self._render(
                make_prompt(task, self._seed, self._levels[task], number, self._system)
            )
            is_drawn = len(rendered.token_ids) <= self._rl.max_prompt_tokens
        return DrawnPrompt(f"{epoch}/{rendered.prompt.id}", *rendered) if is_drawn else None


def normalized(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """What makes two prompts equal: roles and texts, without case, spaces and Unicode's forms."""
    return tuple(
        (each["role"], " ".join(unicodedata.normalize("NFC", each["content"]).casefold().split()))
        for each in prompt.messages
    )


def _scores(group: Group, task: str) -> list[float]:
    """The weighted scores that a task's scorer gave."""
    return [response.parts[task] for response in group.rated]
