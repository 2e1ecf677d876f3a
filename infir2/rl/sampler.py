"""Dynamic sampling: draw prompts until enough groups have rewards that differ, within a budget."""

from dataclasses import dataclass, field

import numpy as np

from infir2.config.schema import RlSection
from infir2.data import ChatTokenizer, Prompt
from infir2.errors import DataError
from infir2.rl.groups import Group
from infir2.rl.rewards import rate
from infir2.rollout.types import Engine, Request, SamplingParams, sampling_key


@dataclass
class Collected:
    """One step's rollouts: the groups to train on, and what was drawn to find them."""

    trained: list[Group] = field(default_factory=list)
    without_signal: list[Group] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        return self.trained + self.without_signal


class GroupSampler:
    """Walks over the prompts in a seeded order, epoch after epoch. Its whole state is `cursor`, the number of prompts drawn."""

    def __init__(self, prompts: list[Prompt], tokenizer: ChatTokenizer, rl: RlSection, seed: int, cursor: int = 0) -> None:
        self._tokenizer, self._rl, self._seed = tokenizer, rl, seed
        self.cursor = cursor
        rendered = [(prompt, tokenizer.render(prompt.messages, add_generation_prompt=True)) for prompt in prompts]
        self._prompts = [(prompt, ids) for prompt, ids in rendered if len(ids) <= rl.max_prompt_tokens]
        self.num_too_long = len(rendered) - len(self._prompts)
        if not self._prompts:
            raise DataError(f"no prompt has at most {rl.max_prompt_tokens} tokens: raise rl.max_prompt_tokens or mend data.sources")

    def collect(self, engine: Engine) -> Collected:
        """At most `over_sample_prompts` prompts, in rounds of `prompts_per_step`, until that many groups have signal."""
        collected, drawn = Collected(), 0
        while len(collected.trained) < self._rl.prompts_per_step and drawn < self._rl.over_sample_prompts:
            count = min(self._rl.prompts_per_step, self._rl.over_sample_prompts - drawn)
            drawn += count
            for group in self._sample(engine, count):
                wanted = group.has_signal and len(collected.trained) < self._rl.prompts_per_step
                (collected.trained if wanted else collected.without_signal).append(group)
        return collected

    def _sample(self, engine: Engine, count: int) -> list[Group]:
        drawn = [self._prompt(self.cursor + i) for i in range(count)]
        self.cursor += count
        requests = [
            Request(f"{key}/{i}", ids, sampling_key(self._seed, key, i, engine.policy_version))
            for key, _, ids in drawn
            for i in range(self._rl.group_size)
        ]
        params = SamplingParams(self._rl.temperature, self._rl.max_response_tokens, self._tokenizer.eos_ids)
        completions = engine.generate(requests, params)
        texts = [self._tokenizer.decode(completion.token_ids) for completion in completions]
        answers = [prompt.answer for _, prompt, _ in drawn for _ in range(self._rl.group_size)]
        responses = rate(completions, texts, answers, self._rl)
        size = self._rl.group_size
        return [Group(prompt, ids, responses[i * size : (i + 1) * size]) for i, (_, prompt, ids) in enumerate(drawn)]

    def _prompt(self, position: int) -> tuple[str, Prompt, list[int]]:
        epoch, index = divmod(position, len(self._prompts))
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
        prompt, ids = self._prompts[order[index]]
        return f"{epoch}/{prompt.id}", prompt, ids
