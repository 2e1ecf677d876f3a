"""Dynamic sampling: draw prompts until enough groups have rewards that differ, within a budget."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from infir2.config.schema import RlSection
from infir2.data import ChatTokenizer, Prompt
from infir2.engines.generate import generate_groups, items_of_rank
from infir2.engines.types import Completion, Engine, SamplingParams
from infir2.errors import DataError
from infir2.faults import fault
from infir2.rl.groups import Group, Response
from infir2.rl.journal import Journal
from infir2.rl.rewards import rate
from infir2.train.supervisor import Session

Check = Callable[[], None]
Work = Callable[
    [Check], dict[int, list[Response]]
]  # responses by place of their prompt; calls its argument all the time
Divide = Callable[[Work], Sequence[dict[int, list[Response]]]]  # what each rank's work gave


@dataclass
class Collected:
    """One step's rollouts: the groups to train on, and what was drawn to find them."""

    trained: list[Group] = field(default_factory=list)
    without_signal: list[Group] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        return self.trained + self.without_signal


class GroupSampler:
    """Walks over the prompts in a seeded order, epoch after epoch. Its whole state is `cursor`, the number of prompts drawn.

    A group is checked and written to the `journal` in a thread as soon as its last response is there; one that is in the journal
    is not sampled again. Ranks share the groups, and each gets to know all.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        tokenizer: ChatTokenizer,
        rl: RlSection,
        journal: Journal,
        session: Session,
        cursor: int = 0,
    ) -> None:
        self._tokenizer, self.rl, self._journal, self._ranks = tokenizer, rl, journal, session.ranks
        self._seed = session.recipe.run.seed
        self._checker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="infir2-verify")
        self.cursor = cursor
        rendered = [
            (prompt, tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True))
            for prompt in prompts
        ]
        self._prompts = [
            (prompt, ids) for prompt, ids in rendered if len(ids) <= rl.max_prompt_tokens
        ]
        self.num_too_long = len(rendered) - len(self._prompts)
        if not self._prompts:
            raise DataError(
                f"no prompt has at most {rl.max_prompt_tokens} tokens: raise rl.max_prompt_tokens or mend data.sources"
            )

    def collect(self, engine: Engine, weights: str, divide: Divide, earlier: str = "") -> Collected:
        """At most `over_sample_prompts` prompts, in rounds of `prompts_per_step`, until that many groups have signal.

        `weights` is a digest of the engine's, `earlier` of others whose groups in the journal are taken too. `divide` has every
        rank do its part.
        """
        collected, drawn = Collected(), 0
        while (
            len(collected.trained) < self.rl.prompts_per_step
            and drawn < self.rl.over_sample_prompts
        ):
            count = min(self.rl.prompts_per_step, self.rl.over_sample_prompts - drawn)
            drawn += count
            for group in self._sample(engine, weights, divide, earlier, count):
                wanted = group.has_signal and len(collected.trained) < self.rl.prompts_per_step
                (collected.trained if wanted else collected.without_signal).append(group)
        return collected

    def _sample(
        self, engine: Engine, weights: str, divide: Divide, earlier: str, count: int
    ) -> list[Group]:
        drawn = [self._prompt(self.cursor + i) for i in range(count)]
        self.cursor += count
        found: dict[int, list[Response]] = {}
        for digest in filter(None, (earlier, weights)):
            keys = [self._journal_key(name, ids, digest) for name, _, ids in drawn]
            found |= {
                i: kept
                for i, key in enumerate(keys)
                if (kept := self._journal.get(key)) is not None
            }
        mine = items_of_rank(engine, self._ranks, [i for i in range(count) if i not in found])
        for part in divide(
            lambda check: self._respond(engine, {i: (keys[i], *drawn[i]) for i in mine}, check)
        ):
            found |= part
        return [Group(prompt, ids, found[i]) for i, (_, prompt, ids) in enumerate(drawn)]

    def _respond(
        self, engine: Engine, drawn: dict[int, tuple[str, str, Prompt, list[int]]], check: Check
    ) -> dict[int, list[Response]]:
        """Responses to prompts, given with their keys and names."""
        missing = list(drawn.items())
        prompts = [(name, ids) for _, (_, name, _, ids) in missing]
        params = SamplingParams(
            self.rl.temperature, self.rl.max_response_tokens, self._tokenizer.eos_token_ids
        )
        checks: dict[int, Future[list[Response]]] = {}
        for index, completions in generate_groups(
            engine, prompts, self.rl.group_size, params, self._seed, check
        ):
            i, (key, _, prompt, _) = missing[index]
            checks[i] = self._checker.submit(self._finish, key, completions, prompt.answer)
        return {i: checked.result() for i, checked in checks.items()}

    def _finish(self, key: str, completions: list[Completion], answer: str) -> list[Response]:
        """Check a group and write it down."""
        fault("rollout.group")
        texts = [self._tokenizer.decode(completion.token_ids) for completion in completions]
        responses = rate(completions, texts, [answer] * len(completions), self.rl)
        self._journal.add(key, responses)
        return responses

    def _journal_key(self, name: str, ids: list[int], weights: str) -> str:
        """Of everything that a group's responses, log-probabilities and rewards depend on."""
        text = f"{self._seed}/{name}/{ids}/{weights}/{self.rl.model_dump_json()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _prompt(self, position: int) -> tuple[str, Prompt, list[int]]:
        epoch, index = divmod(position, len(self._prompts))
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
        prompt, ids = self._prompts[order[index]]
        return f"{epoch}/{prompt.id}", prompt, ids
