"""The prompts of RL in the order in which they are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infir2.data import ChatTokenizer, Prompt
from infir2.errors import DataError


@dataclass(frozen=True)
class DrawnPrompt:
    """A prompt to sample responses to. Example: `DrawnPrompt("0/p17", prompt, [5, 9, 2])`."""

    name: str  # "epoch/id", which seeds the sampling and differs within a step
    prompt: Prompt
    token_ids: list[int]
    opened_thought: str = ""  # beginning of the response that the prompt ends with: "<think>\n"


class PromptStream:
    """Draws the prompts in a seeded order, epoch after epoch.

    Attributes:
        cursor: number of prompts drawn so far; its whole state.
        num_too_long: prompts dropped because they exceed `rl.max_prompt_tokens`.
        longest_prompt_tokens: tokens of the longest prompt that was not dropped.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: ChatTokenizer,
        max_prompt_tokens: int,
        seed: int,
        cursor: int = 0,
        response_prefix: str = "",
    ) -> None:
        """Raises DataError when no prompt is short enough."""
        self.cursor = cursor
        self._seed = seed
        rendered = [
            (prompt, *tokenizer.encode_prompt(prompt.messages, response_prefix))
            for prompt in prompts
        ]
        self._prompts = [each for each in rendered if len(each[1]) <= max_prompt_tokens]
        self.num_too_long = len(rendered) - len(self._prompts)
        if not self._prompts:
            raise DataError(
                f"no prompt has at most {max_prompt_tokens} tokens: raise rl.max_prompt_tokens or "
                "fix data.sources"
            )
        self.longest_prompt_tokens = max(len(token_ids) for _, token_ids, _ in self._prompts)

    def draw(self, count: int) -> list[DrawnPrompt]:
        """The next `count` prompts."""
        drawn = [self._at(self.cursor + i) for i in range(count)]
        self.cursor += count
        return drawn

    def named(self, name: str) -> DrawnPrompt | None:
        """A prompt that was drawn, by its name; None if there is no such prompt anymore."""
        prompt_id = name.partition("/")[2]
        found = (each for each in self._prompts if each[0].id == prompt_id)
        return next((DrawnPrompt(name, *each) for each in found), None)

    def _at(self, position: int) -> DrawnPrompt:
        epoch, index = divmod(position, len(self._prompts))
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
        prompt, token_ids, opened_thought = self._prompts[order[index]]
        return DrawnPrompt(f"{epoch}/{prompt.id}", prompt, token_ids, opened_thought)
